"""Write the report of a run: one self-contained HTML page, and where in the store it stands.

Reads the artifacts of a run and their manifests; writes ``<store>/reports/<name>-<key>.html`` and the picture beside
it.  The key of the last artifact is in the names, so neither can show another result.  The page needs no network:
pictures are data URIs (those of a gallery that is too large lie in a folder beside the page), charts inline SVG, and
everything that comes from the run is escaped.  Its one script moves the gallery; without it the page is complete.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.config.run_config import RunConfig
from pipeline.delivery.submission import archive_command
from pipeline.engine.outcomes import RunOutcome
from pipeline.engine.plan import Plan
from pipeline.report.charts import Drawing, cooccurrence_picture, line_chart, matrix_picture
from pipeline.report.colours import ERRORS, VIRIDIS, Palette, PaletteName, colour_css, find_palette
from pipeline.report.gallery import Shot, make_gallery, scored_sets
from pipeline.report.pictures import load_confusions, show_examples, write_picture_grid
from pipeline.report.tables import (
    class_table,
    collapse_notes,
    format_seconds,
    format_time,
    metric_rows,
    name_revision,
    stage_rows,
    step_rows,
)
from pipeline.store.artifacts import Store
from stages.contracts import BACKGROUND_INDEX, ImageSet, open_image_set, read_json, write_atomic
from stages.errors import WsssError
from stages.ops.metrics.confusion import SparseConfusions

Manifests = Mapping[str, Mapping[str, Any]]
"""``manifest.json`` by stage."""

CARDS = ("attention.miou", "masks.miou", "segmenter.miou", "segmenter.miou_ms", "localization.top1_loc")
HARDWARE = ("host", "machine", "cpu", "cpu_capability", "cores", "memory", "device")
"""What the ``run`` part of a manifest may say of the machine, in the order of the page."""
WATCHED = {"peak_logit": "logit", "recall": "share", "kept": "share"}
"""What methods log beside their losses, with its unit: on charts of their own."""
NOT_CURVES = frozenset({"step", "epoch", "learning_rate", *WATCHED})


def run_name(run: RunConfig, plan: Plan) -> str:
    """Name and key of what the run is for: ``demo-1f0c23ab``."""
    return f"{run.name}-{plan.keys[plan.table.names[-1]][:8]}"


def report_path(run: RunConfig, plan: Plan, store: Store, *, is_complete: bool) -> Path:
    """The report's file; a run that has not reached its end has one of its own."""
    return store.root / "reports" / f"{run_name(run, plan)}{'' if is_complete else '-partial'}.html"


def ensure_report(run: RunConfig, plan: Plan, store: Store, outcome: RunOutcome, invocation: str) -> Path | None:
    """The report of a run that reached its end, None for another.

    It is written again when one of its stages was, and when what is there was drawn by another version of this package.
    ``invocation`` is config and options as the user wrote them.
    """
    states = {stage.stage: stage.state for stage in outcome.stages}
    if plan.table.names[-1] not in states:
        return None
    path = report_path(run, plan, store, is_complete=True)
    if all(state in ("cached", "skipped") for state in states.values()) and path.is_file():
        with path.open("rb") as file:
            if f'content="wsss {_generator()}"'.encode() in file.read(2**12):
                return path
    return write_report(run, plan, store, plan.keys, path, invocation=invocation, states=states)


def write_report(
    run: RunConfig,
    plan: Plan,
    store: Store,
    stages: Collection[str],
    out: Path,
    *,
    invocation: str,
    states: Mapping[str, str] | None = None,
    palette: PaletteName = "safe",
) -> Path:
    """Write the report of the artifacts of ``stages``, which the store holds; the rest as for ``build_report``."""
    found = {name: store.require(name, plan.keys[name]) for name in stages}
    artifacts = {name: artifact.path for name, artifact in found.items()}
    manifests = {name: artifact.manifest for name, artifact in found.items()}
    return build_report(
        run, artifacts, manifests, plan.data.root, out, invocation=invocation, states=states, palette=palette
    )


def ensure_picture(report: Path, run: RunConfig, plan: Plan, store: Store) -> Path:
    """One PNG of examples beside ``report``, written again only when the report is newer."""
    path = report.with_suffix(".png")
    if path.is_file() and path.stat().st_mtime_ns >= report.stat().st_mtime_ns:
        return path
    artifacts = {name: store.require(name, key).path for name, key in plan.keys.items()}
    return write_picture_grid(artifacts, plan.data.root, path, predictions=run.evaluate.written_score)


def build_report(
    run: RunConfig,
    artifacts: Mapping[str, Path],
    manifests: Manifests,
    data_root: Path | None,
    out: Path,
    *,
    invocation: str,
    states: Mapping[str, str] | None = None,
    palette: PaletteName = "safe",
) -> Path:
    """Write the report of ``run`` to ``out``; parts whose stage did not run are left out with one sentence.

    ``artifacts`` has the folder of each stage that ran or was cached, and ``manifests`` their ``manifest.json``;
    prepare_data may be all there is.  ``data_root`` is None where prepare_data generated the data.  ``invocation``
    is config and options as the user wrote them.  ``states`` says built, cached, resumed, skipped or failed by stage,
    where the report follows a run.  ``palette`` colours the classes on the page.  ``out`` is written atomically.
    """
    config = run.model_dump(mode="json")
    images = open_image_set(artifacts["prepare_data"], data_root) if "prepare_data" in artifacts else None
    confusions = load_confusions(artifacts)
    scored = {thing: counts for thing, counts in confusions.items() if len(counts.ids)}
    runs = [manifest["run"] for manifest in manifests.values()]
    metrics = {name: value for found in runs for name, value in (found.get("metrics") or {}).items()}
    packages = {name: version for found in runs for name, version in (found.get("packages") or {}).items()}
    rows = metric_rows(metrics)
    colours = find_palette(palette)
    script = resources.files("pipeline.report").joinpath("gallery.js").read_text("utf-8") if scored else ""
    return write_template(
        "report.html",
        out,
        generator=_generator(),
        name=run.name,
        summary=_summarise(config, images, manifests),
        facts=_facts(run, config, runs, invocation, has_scores="evaluate" in artifacts),
        cards=[row for name in CARDS for row in rows if row.name == name],
        notes=collapse_notes(scored, images.index.classes) if images else [],
        metrics=rows,
        class_table=class_table(scored, images.index.classes) if scored and images else None,
        matrix=_matrix(confusions, images),
        together=_together(images),
        losses=_training_charts(artifacts),
        sweep=_sweep(artifacts),
        steps=step_rows(metrics),
        legend=_legend(images, colours),
        colours=[colour_css(colour) for colour in colours],
        stages=stage_rows(manifests, states or {}),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        packages="\n".join(f"{name}=={version}" for name, version in sorted(packages.items())),
        **show_examples(images, artifacts, confusions, run.evaluate.written_score, colours),
        gallery=_gallery(images, artifacts, confusions, run.evaluate.written_score, colours, out),
        errors=[{"name": name, "colour": colour_css(np.array(c, np.uint8))} for name, c in ERRORS.items()],
        heat=", ".join(colour_css(colour.astype(np.uint8)) for colour in VIRIDIS),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _legend(images: ImageSet | None, colours: Palette) -> list[dict[str, str]]:
    """The classes by their colours; background is the photo itself."""
    names = images.index.classes.names_with_background if images else ()
    return [
        {"name": name, "colour": colour_css(colours[index])}
        for index, name in enumerate(names)
        if index != BACKGROUND_INDEX
    ]


def _gallery(
    images: ImageSet | None,
    artifacts: Mapping[str, Path],
    confusions: Mapping[str, SparseConfusions],
    predictions: str,
    palette: Palette,
    out: Path,
) -> dict[str, Any]:
    """Every scored image; a data root that has moved since the run costs the gallery, not the page."""
    sets = scored_sets(artifacts, confusions, predictions) if images else []
    missing = "no image with a true mask was scored."
    shots: list[Shot] = []
    if images and sets:
        try:
            shots = make_gallery(images, sets, confusions, palette, out)
        except WsssError as error:
            missing = f"the pictures could not be read: {error}"
    names = images.index.classes.names_with_background if images else ()
    present = sorted({index for shot in shots for index in shot.class_iou})
    return {
        "missing": missing,
        "sets": [group.title for group in sets],
        "classes": [(index, names[index]) for index in present],
        "shots": shots,
    }


def write_template(template: str, out: Path, **context: object) -> Path:
    """Fill one of this package's templates and write it to ``out``, atomically."""
    import jinja2  # takes 0.1 s, which a run without a new report does not need

    loader = jinja2.PackageLoader("pipeline.report", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    write_atomic(out, environment.get_template(template).render(context).encode())
    return out


def _generator() -> str:
    """Names the code and the templates that draw a page."""
    files = sorted(file for file in Path(__file__).parent.iterdir() if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _summarise(config: Mapping[str, Any], images: ImageSet | None, manifests: Manifests) -> str:
    """One sentence: what was trained on what, every use of true masks named."""
    supervision = _dig(config, "train_segmenter", "supervision")
    labels = "true masks (the upper bound)" if supervision == "full" else "image-level labels"
    masks = {stage: len(_dig(manifest, "content", "mask_supervision") or ()) for stage, manifest in manifests.items()}
    seen = [] if supervision == "full" else [f"the true masks of {n:,} ({stage})" for stage, n in masks.items() if n]
    if _dig(config, "train_segmenter", "init") == "coco":
        seen.append("a backbone trained on COCO's pixel masks")
    count = f"{len(images.index.splits.get('train', ())):,} training images with " if images else ""
    return f"Semantic segmentation from {' and '.join([count + labels, *seen])}, supervision: {supervision or 'weak'}."


def _facts(
    run: RunConfig, config: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], invocation: str, *, has_scores: bool
) -> list[tuple[str, str]]:
    """What the run is and where it ran, as (label, text); what is not known is left out."""
    segmenter = _dig(config, "train_segmenter", "net")
    body = _dig(segmenter, "backbone", "name") or _dig(segmenter, "encoder")
    machines = [", ".join(str(found[name]) for name in HARDWARE if found.get(name)) for found in runs]
    commits = [name_revision(str(found.get("revision") or "")) for found in runs]
    facts = {
        "Command": f"wsss run {invocation}",
        "Data": f"{_dig(config, 'data', 'format')} {_dig(config, 'data', 'root') or ''}",
        "Method": f"{_dig(config, 'train_classifier', 'method', 'name')}",
        "Classifier": f"{_dig(config, 'train_classifier', 'backbone', 'name')}",
        "Segmenter": " on ".join(str(part) for part in (_dig(segmenter, "name"), body) if part),
        "Starts from": f"{_dig(config, 'train_segmenter', 'init')}",
        "Seed": str(config.get("seed", "")),
        "Started": format_time(min((str(found["started"]) for found in runs if found.get("started")), default="")),
        "Stage time": format_seconds(sum(found.get("seconds") or 0.0 for found in runs)),
        "Hardware": _join_distinct(machines),
        "Threads": _join_distinct(str(found.get("threads") or "") for found in runs),
        "Math": ", ".join(sorted({name for found in runs for name in found.get("libraries") or ()})),
        "Code": _join_distinct(commits),
        "Python": _join_distinct(str(found.get("python") or "") for found in runs),
    }
    if has_scores and run.evaluate.segmentation:
        facts["Predictions"] = run.evaluate.describe_predictions()
    if has_scores:
        facts["Test archive"] = archive_command(run, invocation) or ""
    return [(label, text.strip()) for label, text in facts.items() if text.strip() not in ("", "None")]


def _dig(value: object, *path: str) -> Any:  # noqa: ANN401 - JSON is any
    """The value at ``path`` in nested dictionaries, or None."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _join_distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _matrix(confusions: Mapping[str, SparseConfusions], images: ImageSet | None) -> Drawing | None:
    """The confusions of the segmenter, or of the pseudo-masks where no segmenter was scored."""
    for thing, title in (("segmenter", "the segmenter, single scale, on val"), ("masks", "the pseudo-masks")):
        if images and thing in confusions and confusions[thing].count.size:
            return matrix_picture(title, confusions[thing].total(), images.index.classes.names_with_background)
    return None


def _read(artifacts: Mapping[str, Path], stage: str, name: str) -> Any:  # noqa: ANN401 - JSON is any
    """A JSON file of a stage's artifact; None where there is none."""
    path = artifacts[stage] / name if stage in artifacts else None
    return read_json(path) if path is not None and path.is_file() else None


def _together(images: ImageSet | None) -> dict[str, Any] | None:
    """Which classes are on one training image, by the image-level labels; None where there are none."""
    labels = [record.labels for record in images.index.split("train") if record.labels] if images else []
    if images is None or not labels:
        return None
    names = images.index.classes.names
    has = np.zeros((len(labels), len(names)), np.int64)
    for row, found in enumerate(labels):
        has[row, list(found)] = 1
    count = has.T @ has
    num_mixed = int((has.sum(axis=1) > 1).sum())
    without = [name for name, number in zip(names, np.diagonal(count).tolist(), strict=True) if not number]
    picture = cooccurrence_picture("the image-level labels", count, names) if num_mixed else None
    return {"images": len(labels), "mixed": num_mixed, "without": without, "picture": picture}


def _training_charts(artifacts: Mapping[str, Path]) -> list[Drawing]:
    """The losses of both trainings, what their methods watched, and the segmenter on its held-out training images."""
    charts = []
    for stage, title in (("train_classifier", "Classifier"), ("train_segmenter", "Segmenter")):
        if history := _read(artifacts, stage, "history.json"):
            charts += _history_charts(title, history)
    if (found := _read(artifacts, "train_segmenter", "validation.json")) is not None:
        curves = {"mIoU": "miou", "pixel accuracy": "pixel_accuracy"}
        per_step = _epochs_per_step(_read(artifacts, "train_segmenter", "history.json"))
        best = found["best_step"] * per_step
        chart = line_chart(
            f"Segmenter on {len(found['held_out'])} held-out images, against their {found['compared_with']}",
            x_label="epoch",
            y_label="%",
            x=[look["step"] * per_step for look in found["curve"]],
            lines={label: [100 * look[name] for look in found["curve"]] for label, name in curves.items()},
            marks={f"best, epoch {best:.3g}": best},
        )
        charts.append(chart)
    return charts


def _epochs_per_step(history: Sequence[Mapping[str, float]]) -> float:
    return history[-1]["epoch"] / history[-1]["step"]


def _history_charts(title: str, history: Sequence[Mapping[str, float]]) -> list[Drawing]:
    """The losses with the learning rate, then one chart for each unit of what was watched."""

    def chart(title: str, unit: str, names: Sequence[str], faint: Mapping[str, Sequence[float]]) -> Drawing:
        lines = {name.replace("_", " "): [entry.get(name, float("nan")) for entry in history] for name in names}
        epochs = [entry["epoch"] for entry in history]
        return line_chart(title, x_label="epoch", y_label=unit, x=epochs, lines=lines, faint=faint)

    names = sorted((name for name in history[0] if name not in NOT_CURVES), key=lambda name: (name != "loss", name))
    rates = [entry.get("learning_rate", 0.0) for entry in history]
    charts = [chart(title, "loss", names, {f"learning rate (peak {max(rates):.3g})": rates} if any(rates) else {})]
    for unit in sorted({*WATCHED.values()}):
        if names := [name for name in history[0] if WATCHED.get(name) == unit]:
            charts.append(chart(f"{title}: {', '.join(name.replace('_', ' ') for name in names)}", unit, names, {}))
    return charts


def _sweep(artifacts: Mapping[str, Path]) -> dict[str, Any] | None:
    if (sweep := _read(artifacts, "evaluate", "sweep.json")) is None:
        return None
    chosen = {name: sweep[name] for name in ("configured", "oracle") if sweep.get(name) is not None}
    chart = line_chart(
        "mIoU of the attention maps by threshold",
        x_label="threshold, fraction of each map's maximum",
        y_label="mIoU, %",
        x=sweep["thresholds"],
        lines={"attention mIoU": [100.0 * value for value in sweep["miou"]]},
        marks={f"{name} {value:.2f}": float(value) for name, value in chosen.items()},
    )
    return {**sweep, "chart": chart}
