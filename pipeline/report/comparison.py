"""Compare finished evaluations: what was set otherwise, every score on the images that all have, and pictures.

Reads the store: run records, ``evaluate`` artifacts, the manifests of all their stages, the index of their
``prepare_data`` and, for the page, images; writes nothing but the page.
Scores can be compared where they are of the same classes, on the same images, against the same truth; what differs is
refused in words.
Source: paired bootstrap over images (``stages.ops.metrics.bootstrap``): each resample scores all runs on the same
images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.run_config import find_config, load_config
from pipeline.engine.invocation import write_invocation
from pipeline.engine.plan import plan_run
from pipeline.engine.records import find_run, read_runs
from pipeline.report.colours import Palette, PaletteName, find_palette
from pipeline.report.page import write_template
from pipeline.report.pictures import PICTURE_PX, figure, fit, outline, score_images
from pipeline.report.tables import METRICS, STAGE_MEANINGS, MetricText, format_value, name_revision, natural_key
from pipeline.store.artifacts import MANIFEST, Store, check_manifest, examine
from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    ImageRecord,
    ImageSet,
    expand_path,
    open_image_set,
    read_index_mask,
    read_json,
)
from stages.errors import ConfigError, DamagedFileError, InputError, MissingArtifactError, WsssError
from stages.evaluate import SCORE_SUFFIXES
from stages.ops.metrics.bootstrap import Interval, interval, mean_over_classes, resample_iou
from stages.ops.metrics.confusion import SparseConfusions, read_confusions
from stages.scoring.intervals import Score, score_of

STAGE = "evaluate"
_COUNTS = "confusions.npz"
_OUTLINES = "boundaries.npz"
_TRAINING = ("attention", "masks")
"""Scores of training images, of which each run leaves out those whose masks it was trained on."""
_NAMED = 5
"""Ids and classes that a refusal names."""
NUM_PICTURES = 12
"""Images that a page shows: those on which the runs differ most."""


@dataclass(frozen=True)
class ScoredRun:
    """One finished evaluation."""

    word: str
    """How the user named it."""
    title: str
    """Name and key, as ``demo-1f0c23ab``; the key alone where no run of this name is known."""
    key: str
    path: Path
    classes: tuple[str, ...] | None
    """Names with background; None where the data's index is not there any more."""
    counts: Mapping[str, SparseConfusions]
    """Counts of each image by what was scored, outlines too."""
    metrics: Mapping[str, Any]
    val: tuple[ImageRecord, ...] | None = None
    """The images of val; None where the data's index is not there any more."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What decided its result, by dotted name, of the stages whose manifests are there; empty where none is."""
    images: ImageSet | None = None
    """Images and true masks; None where nobody knows where they lie."""


@dataclass(frozen=True)
class SettingRow:
    """One setting that is not the same in all runs; None for a run without such a setting."""

    name: str
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class Difference:
    """One run's score less the first one's, in fractions."""

    value: float
    interval: Interval | None = None
    """95 % over images; None for a score without counts of each image."""
    better_ratio: float | None = None
    """Share of the resamples in which this run is strictly the better one."""


@dataclass(frozen=True)
class ScoreRow:
    """One score of all runs; entries of a run that does not have it are None."""

    metric: str
    class_name: str | None
    """The class for an IoU, None for a mean over classes and for other numbers."""
    num_images: int | None
    """Images that it stands on; None where that is not known."""
    values: tuple[float | None, ...]
    intervals: tuple[Interval | None, ...]
    differences: tuple[Difference | None, ...]
    """To the first run; None for the first."""


@dataclass(frozen=True)
class Comparison:
    """Scores of several runs, side by side."""

    runs: tuple[ScoredRun, ...]
    rows: tuple[ScoreRow, ...]
    class_rows: tuple[ScoreRow, ...]
    """The same for each class."""
    notes: tuple[str, ...] = ()
    """What a reader must know, one sentence each."""
    settings: tuple[SettingRow, ...] = ()
    """What was set otherwise, in the order of the stages."""

    def rows_by_metric(self) -> dict[str, list[ScoreRow]]:
        """The rows of the classes for each metric that has them."""
        metrics = dict.fromkeys(row.metric for row in self.class_rows)
        return {metric: [row for row in self.class_rows if row.metric == metric] for metric in metrics}


def find_scored_run(word: str, store: Store) -> ScoredRun:
    """Read the evaluation that ``word`` means.

    It is a config file or the name of a shipped config; the folder of an ``evaluate`` artifact, of whatever store; the
    name of a run (``demo``, ``demo-1f0c23ab``), the beginning of one, or ``last``; or a run id or the key of an
    ``evaluate`` artifact, or the first digits of either.

    Raises:
        InputError: ``word`` means nothing, or several things.
        MissingArtifactError: the evaluation has not been made, or is gone.
        DamagedFileError: it does not read back.
    """
    path, config = expand_path(word), None
    if not (path / _COUNTS).is_file():  # a folder may be called as a shipped config
        try:
            config = find_config(word)
        except ConfigError:
            if word.endswith((".yaml", ".yml")):
                raise
    if config is None and path.is_dir():
        return _read_folder(word, path)
    if config is not None:
        run = load_config(config)
        name, key = run.name, plan_run(run, store.digest_cache).keys[STAGE]
        command = f"wsss run {write_invocation(word, None, store.location)}"
    else:
        (name, key), command = _find_key(word, store), "wsss run with its config"
    if store.lookup(STAGE, key) is None:
        raise MissingArtifactError(
            f"the evaluation of {word} ({STAGE} {key}) is not in {store.location}; build it with: {command}"
        )
    artifact = store.require(STAGE, key)
    prepared = artifact.run.get("upstream", {}).get("prepare_data", "")
    has_index = bool(prepared) and store.lookup("prepare_data", prepared) is not None
    data = store.require("prepare_data", prepared).path if has_index else None
    roots = [record.config.get("data", {}).get("root") for record in read_runs(store) if record.keys.get(STAGE) == key]
    return _read_files(word, _title(name, key), key, artifact.path, data, next(filter(None, roots), None))


def _title(name: str, key: str) -> str:
    return "-".join(part for part in (name, key[:8]) if part)


def _find_key(word: str, store: Store) -> tuple[str, str]:
    """Run name, which may be unknown, and key of the evaluation that ``word`` names, or whose id or key it begins."""
    records = [record for record in read_runs(store) if STAGE in record.keys]
    meant = [record for record in records if record.run_id.startswith(word) or record.path.stem == word]
    if not meant:  # the runs of that name, or of that name and key, whose evaluation is there
        named = [record for record in records if word in (record.name, _title(record.name, record.keys[STAGE]))]
        meant = [record for record in named if store.lookup(STAGE, record.keys[STAGE]) is not None]
    found = {record.keys[STAGE]: record.name for record in meant}
    stage, _, digits = word.strip("/").rpartition("/")
    names = {record.keys[STAGE]: record.name for record in reversed(records)}
    for other, key in store.folders():
        if key.startswith(digits) and stage in ("", other):
            if other == STAGE:
                found.setdefault(key, names.get(key, ""))
            elif not found and key == digits:
                raise InputError(f"{word} is an artifact of {other}; name one of {STAGE}, a run id or a config")
    if len(found) > 1:
        raise InputError(f"{word} means {len(found)} evaluations; give more digits", sorted(found))
    for key, name in found.items():
        return name, key
    return _find_run_key(word, store)


def _find_run_key(word: str, store: Store) -> tuple[str, str]:
    """Name and evaluation of the run that ``word`` means to every other command, too: ``last``, or how one begins."""
    try:
        record = find_run(store, word)
    except InputError as error:
        if f"'{word}' means" in error.message:
            raise
        raise InputError(
            f"'{word}' is no config, run name, run id, folder or key of an evaluation in {store.location}; "
            "`wsss runs` and `wsss artifacts list` show what is there"
        ) from None
    if STAGE not in record.keys:
        raise MissingArtifactError(f"{record.path.stem} has no evaluation; build it with: wsss run {record.path.stem}")
    return record.name, record.keys[STAGE]


def _read_folder(word: str, path: Path) -> ScoredRun:
    if not (path / _COUNTS).is_file():
        raise InputError(f"{word} is no folder of an {STAGE} artifact: it has no {_COUNTS}; name one, or a config")
    key, upstream = path.resolve().name, dict[str, str]()
    if (path / MANIFEST).is_file():
        manifest = check_manifest(read_json(path / MANIFEST), str(path / MANIFEST), STAGE)
        key, upstream = manifest["content"]["key"], manifest["run"].get("upstream", {})
        if damage := examine(path, manifest["content"]["files"])[0]:
            raise DamagedFileError(f"{word} is not as it was written; rebuild {STAGE}", sorted(damage.values()))
    prepared = path.resolve().parent.parent / "prepare_data" / upstream.get("prepare_data", "none")
    return _read_files(word, key[:8], key, path, prepared if (prepared / "index.json").is_file() else None)


def _read_files(
    word: str, title: str, key: str, path: Path, prepared: Path | None, data_root: str | None = None
) -> ScoredRun:
    counts = read_confusions(path / _COUNTS)
    counts |= read_confusions(path / _OUTLINES) if (path / _OUTLINES).is_file() else {}
    metrics = read_json(path / "metrics.json")
    if not isinstance(metrics, dict):
        raise DamagedFileError(f"{path / 'metrics.json'} holds no metrics; rebuild {STAGE}")
    settings = _read_settings(path.resolve())
    if prepared is None:
        return ScoredRun(word, title, key, path, None, counts, metrics, settings=settings)
    images = open_image_set(prepared, None if data_root is None else Path(data_root))
    classes, val = images.index.classes.names_with_background, images.index.split("val")
    found = images if images.root.is_dir() else None
    return ScoredRun(word, title, key, path, classes, counts, metrics, val, settings, found)


def _read_settings(evaluate: Path) -> dict[str, str]:
    """What the manifests of an evaluation and of the stages before it say, in the order of the stages."""
    if not (evaluate / MANIFEST).is_file():
        return {}
    manifests = {STAGE: read_json(evaluate / MANIFEST)}
    for stage, key in manifests[STAGE].get("run", {}).get("upstream", {}).items():
        path = evaluate.parent.parent / stage / key / MANIFEST
        if path.is_file():
            manifests[stage] = read_json(path)
    settings: dict[str, str] = {}
    for stage in STAGE_MEANINGS:
        if stage not in manifests:
            continue
        content = manifests[stage].get("content", {})
        data = content.get("data") if stage == "prepare_data" else None
        own = {"made by version": content.get("version"), "seed": content.get("seed")}
        own |= {"code": name_revision(manifests[stage].get("run", {}).get("revision") or "") or None}
        settings |= _flatten("data", data or {})
        settings |= _flatten(stage, {**content.get("config", {}), **{n: v for n, v in own.items() if v is not None}})
    return settings


def _flatten(name: str, value: object) -> dict[str, str]:
    """Leaves of nested dictionaries by dotted name, as YAML would have them on one line."""
    if isinstance(value, Mapping) and value:
        return {inner: text for key, part in value.items() for inner, text in _flatten(f"{name}.{key}", part).items()}
    return {name: "" if value == {} else json.dumps(value, ensure_ascii=False).strip('"')}


def _compare_settings(runs: Sequence[ScoredRun]) -> tuple[SettingRow, ...]:
    """The settings in which ``runs`` differ; of a stage that only some have, one line says so."""
    sections = {name.partition(".")[0]: None for run in runs for name in run.settings}
    rows = []
    for section in sections:
        theirs = [{n: v for n, v in run.settings.items() if n.partition(".")[0] == section} for run in runs]
        if not all(theirs):
            rows.append(SettingRow(section, tuple("yes" if found else None for found in theirs)))
        having = [found for found in theirs if found]
        for name in sorted({name for found in having for name in found}, key=natural_key):
            if len({found.get(name) for found in having}) > 1:
                rows.append(SettingRow(name, tuple(found.get(name) for found in theirs)))
    return tuple(rows)


def compare_runs(runs: Sequence[ScoredRun]) -> Comparison:
    """Compare at least two evaluations of the same data with the first of them.

    Raises:
        InputError: they have other classes, other scored images of val or test, or other true masks or boxes; says
            which.
    """
    if len(runs) < 2:
        raise InputError(f"a comparison needs at least two runs, found {len(runs)}")
    _check_classes(runs)
    notes = _check_localization(runs)
    rows: list[ScoreRow] = []
    class_rows: list[ScoreRow] = []
    apart: set[str] = set()  # groups of scores whose images differ between the runs
    for thing in dict.fromkeys(thing for run in runs for thing in run.counts):
        if (score := score_of(thing)) is None:
            continue
        ids, is_same = _common_ids(runs, thing)
        if not is_same:
            group = score.metric.partition(".")[0]
            apart.add(group)
            notes.append(f"{group}: only the {len(ids)} images count that all runs were scored on")
        means, classes = _compare_counts(runs, thing, score, ids)
        rows += means
        class_rows += classes
    more, left_out = _compare_numbers(runs, {row.metric for row in rows}, apart)
    order = {metric: place for place, metric in enumerate(METRICS)}
    rows = sorted([*rows, *more], key=lambda row: (order.get(row.metric, len(order)), natural_key(row.metric)))
    notes = tuple(dict.fromkeys([*notes, *left_out]))
    return Comparison(tuple(runs), tuple(rows), tuple(class_rows), notes, _compare_settings(runs))


def _compare_counts(
    runs: Sequence[ScoredRun], thing: str, score: Score, ids: tuple[str, ...]
) -> tuple[list[ScoreRow], list[ScoreRow]]:
    """The mean over the classes of one thing that was counted on the images ``ids``, and the rows of its classes."""
    places = [place for place, run in enumerate(runs) if thing in run.counts]
    having = [runs[place] for place in places]
    chosen = [run.counts[thing] if run.counts[thing].ids == ids else run.counts[thing].select(ids) for run in having]
    num_classes = score.num_classes(chosen[0])
    _check_truth(having, chosen, thing, num_classes)
    resampled = resample_iou(chosen, num_classes=num_classes)
    by_class = np.stack([score.class_iou(counts.total()) for counts in chosen])
    means = mean_over_classes(by_class), mean_over_classes(resampled)

    def compare(class_name: str | None, values: NDArray[np.float64], resampled: NDArray[np.float64]) -> ScoreRow:
        """One row from the values (n,) and resampled values (n, S) of the runs at ``places``."""
        found: list[float | None] = [None] * len(runs)
        intervals: list[Interval | None] = [None] * len(runs)
        differences: list[Difference | None] = [None] * len(runs)
        for place, value, scores in zip(places, values.tolist(), resampled, strict=True):
            if np.isnan(value):
                continue
            found[place], intervals[place] = value, interval(scores)
            if place > 0 and found[0] is not None:
                draws = scores - resampled[0]
                known = draws[~np.isnan(draws)]  # without resamples in which a class does not occur
                better_ratio = float((known > 0).mean()) if known.size else None
                differences[place] = Difference(value - found[0], interval(draws), better_ratio)
        return ScoreRow(score.metric, class_name, len(ids), tuple(found), tuple(intervals), tuple(differences))

    # with background; numbered where no run knows the names
    names = next((run.classes for run in runs if run.classes is not None), [f"class {i}" for i in range(num_classes)])
    present = [index for index in range(num_classes) if not np.isnan(by_class[:, index]).all()]
    classes = [compare(names[index], by_class[:, index], resampled[:, :, index]) for index in present]
    return ([] if np.isnan(means[0]).all() else [compare(None, *means)]), classes


def _compare_numbers(runs: Sequence[ScoredRun], counted: set[str], apart: set[str]) -> tuple[list[ScoreRow], list[str]]:
    """The metrics without counts of each image, and what is said of those of groups whose images differ."""
    rows, notes = [], []
    numbers = [
        {name: float(v) for name, v in run.metrics.items() if type(v) in (int, float) and np.isfinite(v)}
        for run in runs
    ]
    for metric in dict.fromkeys(metric for found in numbers for metric in found):
        is_limit = metric.endswith(("_low", "_high")) and metric.rpartition("_")[0] in counted
        if metric in counted or is_limit:
            continue
        if metric.partition(".")[0] in apart:
            notes.append(f"{metric} is left out: the runs have it of other images")
            continue
        values = [found.get(metric) for found in numbers]
        first, *others = values
        differences = [None if value is None or first is None else Difference(value - first) for value in others]
        rows.append(ScoreRow(metric, None, None, tuple(values), (None,) * len(runs), (None, *differences)))
    return rows, notes


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _check_classes(runs: Sequence[ScoredRun]) -> None:
    """Refuse runs with other classes, where these are known."""
    known = [(run.word, run.classes) for run in runs if run.classes is not None]
    for word, classes in known[1:]:
        first, ours = known[0]
        if classes != ours:
            extras = {word: [n for n in classes if n not in ours], first: [n for n in ours if n not in classes]}
            alike = "has no class of its own; the order may differ"
            raise InputError(
                f"{first} and {word} have other classes ({len(ours)} and {len(classes)} with background) and cannot be "
                "compared; compare runs on one data set",
                [f"only {who}: {_shorten(more)}" if more else f"{who} {alike}" for who, more in extras.items()],
            )


def _common_ids(runs: Sequence[ScoredRun], thing: str) -> tuple[tuple[str, ...], bool]:
    """Ids that all runs with this score have, and whether none has others; not those of val or test."""
    having = [run for run in runs if thing in run.counts]
    if len({run.counts[thing].num_classes for run in having}) > 1:
        raise InputError(f"{', '.join(run.word for run in having)} have other numbers of classes ({thing})")
    first, *rest = having
    ids = first.counts[thing].ids
    if not thing.startswith(_TRAINING):
        for run in rest:
            _check_images(thing, (first.word, ids), (run.word, run.counts[thing].ids))
    common = set(ids).intersection(*(run.counts[thing].ids for run in rest))
    is_same = all(len(run.counts[thing].ids) == len(common) for run in having)
    return tuple(image_id for image_id in ids if image_id in common), is_same


def _check_images(thing: str, first: tuple[str, Sequence[str]], other: tuple[str, Sequence[str]]) -> None:
    """Refuse scores on other images: (word, ids) of two runs."""
    (word, ids), (other_word, others) = first, other
    mine, theirs = set(ids), set(others)
    if mine != theirs:
        extras = ((word, [i for i in ids if i not in theirs]), (other_word, [i for i in others if i not in mine]))
        raise InputError(
            f"{word} and {other_word} were scored on other images ({thing}: {len(ids)} and {len(others)}) and cannot "
            "be compared; evaluate both on one list",
            [f"only {name}: {_shorten(extra) or 'none'} ({len(extra)} images)" for name, extra in extras],
        )


def _check_localization(runs: Sequence[ScoredRun]) -> list[str]:
    """Refuse localisation on other images of val, or against other labels or boxes; a note where nothing can tell.

    It is counted over all of val and not by image: what it stands on is known from the data's index alone.
    """
    having = [run for run in runs if any(name.startswith("localization.") for name in run.metrics)]
    # labels and true boxes by id; masks have no digest in the index
    known = [(r.word, {image.id: (image.labels, image.boxes) for image in r.val}) for r in having if r.val is not None]
    for word, theirs in known[1:]:
        first, ours = known[0]
        _check_images("localization", (first, list(ours)), (word, list(theirs)))
        differs = [image_id for image_id, truth in ours.items() if truth != theirs[image_id]]
        _refuse_truth((first, word), "labels or boxes", "localization", differs)
    unknown = ", ".join(run.word for run in having if run.val is None)
    note = f"localisation: on which images {unknown} was scored is not in the store any more; they may be others"
    return [note] if unknown and len(having) > 1 else []


def _check_truth(runs: Sequence[ScoredRun], chosen: Sequence[SparseConfusions], thing: str, num_classes: int) -> None:
    """Refuse ``chosen`` counts of the same images against other true masks."""
    if thing.endswith("_labelled"):
        return  # these drop each run's unsure pixels and cannot tell
    first, *rest = [counts.true_pixels()[:, :num_classes] for counts in chosen]
    for run, pixels in zip(runs[1:], rest, strict=True):
        differs = [i for i, same in zip(chosen[0].ids, (pixels == first).all(axis=1), strict=True) if not same]
        _refuse_truth((runs[0].word, run.word), "true masks", thing, differs)


def _refuse_truth(words: tuple[str, str], truth: str, thing: str, differs: Sequence[str]) -> None:
    if differs:
        raise InputError(
            f"{' and '.join(words)} were scored against other {truth} ({thing}: {len(differs)} images, "
            f"{_shorten(differs)}) and cannot be compared; evaluate both on the same data"
        )


def _text_of(row: ScoreRow) -> MetricText:
    return METRICS.get(row.metric) or MetricText("", row.metric, "percent" if any(row.intervals) else "number", "")


def label_text(row: ScoreRow) -> str:
    """``Segmenter mIoU``; the metric's own name where it has no other."""
    text = _text_of(row)
    return f"{text.group} {text.label}".strip()


def value_text(row: ScoreRow, place: int) -> str:
    """``43.1 % (41.0 … 45.2)``; a dash for a run without this score."""
    value, limits = row.values[place], row.intervals[place]
    if value is None:
        return "–"
    text = format_value(value, _text_of(row).unit)
    return text if limits is None else f"{text} ({limits.low * 100:.1f} … {limits.high * 100:.1f})"


def difference_text(row: ScoreRow, place: int) -> str:
    """``+1.2 (-0.3 … +2.7)`` in points of percent; nothing for the run that is compared with."""
    found = row.differences[place]
    if found is None:
        return ""
    if _text_of(row).unit != "percent":
        return f"{found.value:+.3g}"
    if found.interval == Interval(0.0, 0.0):
        return "the same"
    text = f"{found.value * 100:+.1f}"
    if found.interval is None:
        return text
    return f"{text} ({found.interval.low * 100:+.1f} … {found.interval.high * 100:+.1f})"


def odds_text(row: ScoreRow, place: int) -> str:
    """``better in 93 % of resamples``; nothing where nothing was resampled, or where the runs are the same."""
    found = row.differences[place]
    if found is None or found.better_ratio is None or found.interval == Interval(0.0, 0.0):
        return ""
    return f"better in {found.better_ratio * 100:.0f} % of resamples"


def table_lines(rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    """The rows of a table, each with one cell a run; a difference whose interval leaves out zero has a sign."""
    lines = []
    for row in rows:
        cells = []
        for place, difference in enumerate(row.differences):
            limits = None if difference is None else difference.interval
            sign = "" if limits is None else "better" if limits.low > 0 else "worse" if limits.high < 0 else ""
            texts = {"difference": difference_text(row, place), "odds": odds_text(row, place)}
            cells.append({"value": value_text(row, place), **texts, "sign": sign})
        images = "" if row.num_images is None else str(row.num_images)
        lines.append({"label": row.class_name or label_text(row), "images": images, "cells": cells})
    return lines


def write_page(found: Comparison, out: Path, palette: PaletteName = "safe") -> Path:
    """Write ``found`` as one self-contained HTML page that needs no network and no script, atomically.

    It shows the images on which the predictions differ most; where they cannot be read, the page says why.
    """
    classes = {label_text(rows[0]): table_lines(rows) for rows in found.rows_by_metric().values()}
    try:
        examples, missing = _show_pictures(found, find_palette(palette))
    except WsssError as error:
        examples, missing = [], f"the pictures could not be read: {error}"
    return write_template(
        "comparison.html",
        out,
        runs=found.runs,
        settings=found.settings,
        unknown=[run.title for run in found.runs if not run.settings],
        lines=table_lines(found.rows),
        classes=classes,
        notes=found.notes,
        examples=examples,
        missing=missing,
    )


def _show_pictures(found: Comparison, palette: Palette) -> tuple[list[dict[str, Any]], str]:
    """Image, truth and each run's prediction where their IoU is furthest apart; or why there is nothing to show."""
    images = next((run.images for run in found.runs if run.images is not None), None)
    if images is None:
        return [], "where the images lie is not known any more."
    scores = []
    for run in found.runs:
        written = run.settings.get("evaluate.predictions", "single")
        suffixes = [suffix for kind, suffix in SCORE_SUFFIXES.items() if kind == written]
        scores.append(score_images(run.counts, "segmenter" + "".join(suffixes)))
    common = set.intersection(*(set(own) for own in scores))
    if not common:
        return [], "no image's predictions were scored in all runs."

    def spread(image_id: str) -> float:
        values = [own[image_id] for own in scores]
        return max(values) - min(values)

    chosen = sorted(common, key=lambda image_id: (-spread(image_id), natural_key(image_id)))[:NUM_PICTURES]
    examples = []
    for image_id in chosen:
        record = images.index.record(image_id)
        photo, truth = fit(images.read_image(record), PICTURE_PX), images.read_mask(record)
        pictures = {"image": photo, "truth": outline(photo, truth, palette)}
        for number, (run, own) in enumerate(zip(found.runs, scores, strict=True), start=1):
            mask = read_index_mask(run.path / "predictions" / f"{image_id}.png")
            pictures[f"run {number}: {own[image_id] * 100:.1f} %"] = outline(photo, mask, palette)
        present = [v for v in np.unique(truth).tolist() if v not in (BACKGROUND_INDEX, IGNORE_INDEX)]
        examples.append(figure(image_id, pictures, present, images.index.classes, palette))
    return examples, ""
