"""A run's numbers as rows for the page, Prefect and the terminal: what each is called and what it means.

Reads manifests and confusion counts that the caller loaded, and ``metrics.csv`` beside this file; writes nothing.
Shapes: C classes with background.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from stages.contracts import ClassList
from stages.ops.metrics.confusion import SparseConfusions, iou

STAGE_MEANINGS: dict[str, str] = {
    "prepare_data": "indexes and checks the images",
    "train_classifier": "learns the image-level labels",
    "make_attention": "shows where the classifier looks",
    "make_masks": "turns attention into pseudo-masks",
    "train_segmenter": "learns the masks",
    "evaluate": "compares with true masks",
}
"""Every stage in the order of a run, with what it does."""

Unit = Literal["percent", "number", "count", "bytes"]


class MetricText(NamedTuple):
    """How one metric is shown."""

    group: str
    label: str
    unit: Unit
    meaning: str


with Path(__file__).with_name("metrics.csv").open(encoding="utf-8", newline="") as _table:
    METRICS = {name: MetricText._make(texts) for name, *texts in list(csv.reader(_table))[1:]}
"""Known metrics in the order of the table; others follow under their own names."""

THINGS: dict[str, str] = {
    "attention": "Attention",
    "masks_before_crf": "Before refinement",
    "masks_after_random_walk": "After random walk",
    "masks_after_par": "After PAR",
    "masks_after_crf": "After CRF",
    "masks": "Pseudo-masks",
    "masks_labelled": "Sure pixels",
    "segmenter": "Segmenter",
    "segmenter_ms": "Multi-scale",
    "segmenter_ms_crf": "Multi-scale + CRF",
    "segmenter_test": "Test",
    "segmenter_test_ms": "Test, multi-scale",
    "segmenter_test_ms_crf": "Test, multi-scale + CRF",
}
"""Column titles of what ``evaluate`` counts confusions of."""


@dataclass(frozen=True)
class MetricRow:
    """One line of the table of numbers."""

    name: str
    group: str
    label: str
    text: str
    meaning: str
    bar: float | None
    """Percent, 0 to 100; None where the number is no share."""
    interval: str = ""
    """``41.0 … 45.2``: its 95 % interval over images, where it has one."""


def metric_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """The flat metrics as rows: known ones in their order, then the others; dictionaries are left to other tables.

    The limits of an interval, ``<name>_low`` and ``<name>_high``, stand in the row of their metric.
    """
    numbers = {n: v for n, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    limits = {f"{name}_{end}" for name in numbers for end in ("low", "high")}
    unknown = sorted((name for name in numbers if name not in METRICS and name not in limits), key=natural_key)
    rows = []
    for name in [*(name for name in METRICS if name in numbers), *unknown]:
        text = METRICS.get(name) or MetricText("Other", name, "number", "")
        value, low, high = numbers[name], numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
        bar = min(max(value * 100.0, 0.0), 100.0) if text.unit == "percent" and math.isfinite(value) else None
        interval = "" if low is None or high is None else f"{low * 100:.1f} … {high * 100:.1f}"
        shown = format_value(value, text.unit)
        rows.append(MetricRow(name, text.group, text.label, shown, text.meaning, bar, interval))
    return rows


STEPS = "masks.steps"
"""The metric: a list of the steps in order, each with ``step``, ``miou``, ``coverage`` and maybe ``miou_labelled``."""
STEP_HEAD = ("Step", "mIoU", "Change", "mIoU, sure pixels", "Coverage")
STEP_LABELS: dict[str, str] = {
    "threshold": "threshold rule",
    "random_walk": "random walk",
    "par": "pixel-adaptive",
    "crf": "dense CRF",
}
"""What a step is called on pages and under pictures; one that is not here keeps its name."""


class StepRow(NamedTuple):
    """One line of the table of steps; all but ``bar`` are texts in the order of ``STEP_HEAD``."""

    label: str
    miou: str
    change: str
    """Against the step before, in points of percent; empty for the first."""
    miou_labelled: str
    coverage: str
    bar: float
    """The mIoU in percent, 0 to 100."""

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts in the order of ``STEP_HEAD``."""
        return self[:5]


def step_label(name: str) -> str:
    """What the step ``name`` is called."""
    return STEP_LABELS.get(name, name.replace("_", " "))


def step_rows(metrics: Mapping[str, Any]) -> list[StepRow]:
    """The rows of ``metrics[STEPS]``; none where no step was scored."""
    steps: Sequence[Mapping[str, Any]] = metrics.get(STEPS) or ()
    before = [None, *(step["miou"] for step in steps)]
    return [
        StepRow(
            label=step_label(step["step"]),
            miou=format_value(step["miou"], "percent"),
            change="" if last is None else f"{(step['miou'] - last) * 100:+.1f}",
            miou_labelled=format_value(step.get("miou_labelled", float("nan")), "percent"),
            coverage=format_value(step["coverage"], "percent"),
            bar=step["miou"] * 100,
        )
        for step, last in zip(steps, before, strict=False)
    ]


class ClassTable(NamedTuple):
    """IoU of every class for every thing scored, in percent; None where the class never occurs."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, int, tuple[float | None, ...]], ...]
    """(class name, class index, one IoU for each column)."""
    means: tuple[float | None, ...]
    num_images: tuple[int, ...]


def class_table(confusions: Mapping[str, SparseConfusions], classes: ClassList) -> ClassTable:
    """Per-class IoU out of the counts: background first, and the segmenter in the first columns."""
    others = sorted(thing for thing in set(confusions) - set(THINGS) if not thing.endswith("_labelled"))
    things = [thing for thing in THINGS if thing in confusions] + others
    things.sort(key=lambda thing: not thing.startswith("segmenter"))  # what the run is for stands beside the names
    ious = [iou(confusions[thing].total()).tolist() for thing in things]
    scores = [[value * 100.0 if math.isfinite(value) else None for value in column] for column in ious]
    present = [[value for value in column if value is not None] for column in scores]
    names = enumerate(classes.names_with_background)
    return ClassTable(
        columns=tuple(THINGS.get(thing, thing.replace("masks_after_", "After ")) for thing in things),
        rows=tuple((name, index, tuple(column[index] for column in scores)) for index, name in names),
        means=tuple(sum(values) / len(values) if values else None for values in present),
        num_images=tuple(len(confusions[thing].ids) for thing in things),
    )


_NAMED = 5
"""Classes that a note names."""
_COLLAPSE_FOUND, _COLLAPSE_TRUE = 0.9, 0.6
"""One class has at least this share of the object pixels that were found, and at most this one of the true ones."""


def collapse_notes(confusions: Mapping[str, SparseConfusions], classes: ClassList) -> list[tuple[str, str]]:
    """(what, sentence) for the masks and the segmenter where they say one thing only, or never say some class."""
    notes = []
    for thing in ("masks", "segmenter", "segmenter_test"):
        if thing not in confusions:
            continue
        total = confusions[thing].total()[1:, :]
        true, found = total.sum(axis=1), confusions[thing].total().sum(axis=0)[1:]
        if not true.any():
            continue
        title = THINGS[thing].lower()
        never = [classes.names[index] for index in np.flatnonzero((true > 0) & (found == 0)).tolist()]
        top = int(found.argmax())
        if not found.any():
            notes.append((title, "every pixel is background, though there are objects: it has collapsed"))
        elif found[top] >= _COLLAPSE_FOUND * found.sum() and true[top] <= _COLLAPSE_TRUE * true.sum():
            shares = f"{found[top] / found.sum():.0%} of the object pixels are {classes.names[top]}"
            notes.append(
                (title, f"{shares}, of the true ones {true[top] / true.sum():.0%}: it has collapsed to one class")
            )
        elif never:
            shown = ", ".join(never[:_NAMED]) + (f" and {len(never) - _NAMED} more" if len(never) > _NAMED else "")
            notes.append((title, f"{len(never)} of {np.count_nonzero(true)} classes never appear: {shown}"))
    return notes


def name_revision(revision: str) -> str:
    """A commit in ten digits; a ``+`` behind it says that the tree had changes."""
    return f"{revision[:10]}, with changes" if revision.endswith("+") else revision[:10]


def natural_key(text: str) -> tuple[tuple[bool, int, str], ...]:
    """To sort texts so that ``image2`` stands before ``image10``."""
    parts = re.split(r"(\d+)", text)
    return tuple((part.isdecimal(), int(part) if part.isdecimal() else 0, part.casefold()) for part in parts if part)


def stage_rows(manifests: Mapping[str, Mapping[str, Any]], states: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every stage in order, also those that this run skipped: name, meaning, state, key, seconds, size, started."""
    rows = []
    for name, meaning in STAGE_MEANINGS.items():
        manifest = manifests.get(name, {})
        content, run = manifest.get("content", {}), manifest.get("run", {})
        size = sum(file["size"] for file in content.get("files", {}).values())
        row = {
            "name": name,
            "meaning": meaning,
            "state": states.get(name) or ("in the store" if manifest else "skipped"),
            "key": content.get("key", ""),
            "seconds": format_seconds(run.get("seconds")),
            "size": format_value(size, "bytes") if manifest else "–",
            "started": format_time(run.get("started")) if manifest else "–",
            "warnings": run.get("warnings", ()),
        }
        rows.append(row)
    return rows


def format_value(value: float, unit: Unit) -> str:
    """``0.4312`` as 43.1 %, 0.431, 0 or 0 B by unit; "–" for what is not finite."""
    if not math.isfinite(value):
        return "–"
    if unit == "percent":
        return f"{value * 100:.1f} %"
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "number":
        return f"{value:.3g}"
    names, step = ("B", "kB", "MB", "GB", "TB"), 0
    while value >= 999.5 and step < len(names) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.0f} {names[step]}" if step == 0 or value >= 99.5 else f"{value:.1f} {names[step]}"


def describe_value(name: str, value: float) -> str:
    """A number that is shown beside progress: ``loss 0.1235``, ``3.1 images/s`` for ``images_per_s``."""
    unit = name.removesuffix("_per_s")
    return f"{name} {value:.4g}" if unit == name else f"{value:.2g} {unit}/s" if value < 10 else f"{value:.0f} {unit}/s"


def format_seconds(seconds: float | None) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 14 min``; "–" for None."""
    if seconds is None:
        return "–"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_time(started: object) -> str:
    """An ISO time or a Unix time as ``2026-11-20 12:05 UTC``; anything else as it is."""
    if isinstance(started, int | float):
        return datetime.fromtimestamp(started, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
    try:
        moment = datetime.fromisoformat(str(started))
    except ValueError:
        return str(started)
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()
