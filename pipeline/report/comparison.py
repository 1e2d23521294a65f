"""Compare finished evaluations: every score on the images that all have, and differences to the first with intervals.

Pure: evaluations in, tables out.
Source: paired bootstrap over images (``stages.ops.metrics.bootstrap``): each resample scores all runs on the same
images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.report.comparable import check_classes, check_localization, check_truth, common_ids
from pipeline.report.scored_runs import ScoredRun
from pipeline.report.tables import METRICS
from stages.errors import InputError
from stages.ops.metrics.bootstrap import Interval, interval, mean_over_classes, resample_iou
from stages.ops.metrics.confusion import SparseConfusions
from stages.scoring.intervals import Score, score_of


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
    """What ``compare_runs`` found."""

    runs: tuple[ScoredRun, ...]
    rows: tuple[ScoreRow, ...]
    class_rows: tuple[ScoreRow, ...]
    """The same for each class."""
    notes: tuple[str, ...] = ()
    """What a reader must know, one sentence each."""


@dataclass
class _Table:
    """Rows and notes as they are found."""

    class_names: Sequence[str]
    rows: list[ScoreRow] = field(default_factory=list)
    class_rows: list[ScoreRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare_runs(runs: Sequence[ScoredRun]) -> Comparison:
    """Compare evaluations of the same data with the first of them.

    Args:
        runs: At least two.

    Raises:
        InputError: they have other classes, other scored images of val or test, or other true masks or boxes; says
            which.
    """
    if len(runs) < 2:
        raise InputError(f"a comparison needs at least two runs, found {len(runs)}")
    check_classes(runs)
    table = _Table(class_names=_class_names(runs), notes=check_localization(runs))
    apart: set[str] = set()
    for thing in dict.fromkeys(thing for run in runs for thing in run.counts):
        score = score_of(thing)
        if score is not None and not _compare_counts(table, runs, thing, score):
            apart.add(score.metric.partition(".")[0])
    _compare_numbers(table, runs, apart)
    order = {metric: place for place, metric in enumerate(METRICS)}
    rows = sorted(table.rows, key=lambda row: order.get(row.metric, len(order)))
    return Comparison(tuple(runs), tuple(rows), tuple(table.class_rows), tuple(dict.fromkeys(table.notes)))


def _class_names(runs: Sequence[ScoredRun]) -> tuple[str, ...]:
    """The classes with background; numbered where no run knows their names."""
    for run in runs:
        if run.classes is not None:
            return run.classes
    most = max((counts.num_classes for run in runs for counts in run.counts.values()), default=0)
    return tuple(f"class {index}" for index in range(most))


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def _compare_counts(table: _Table, runs: Sequence[ScoredRun], thing: str, score: Score) -> bool:
    """Add the rows of one thing that was counted; whether all runs that have it have the same images."""
    having = [run for run in runs if thing in run.counts]
    if len({run.counts[thing].num_classes for run in having}) > 1:
        raise InputError(f"{', '.join(run.word for run in having)} have other numbers of classes ({thing})")
    ids, is_same = common_ids(runs, thing)
    chosen = [_select(run.counts[thing], ids) for run in having]
    check_truth(having, chosen, thing)
    if not is_same:
        table.notes.append(
            f"{score.metric.partition('.')[0]}: only the {len(ids)} images count that all runs were scored on"
        )
    num_classes = score.num_classes(chosen[0])
    resampled = resample_iou(chosen, num_classes=num_classes)
    by_class = np.stack([score.class_iou(counts.total()) for counts in chosen])
    places = [place for place, run in enumerate(runs) if thing in run.counts]

    def add(rows: list[ScoreRow], name: str | None, values: NDArray[np.float64], draws: NDArray[np.float64]) -> None:
        if not np.isnan(values).all():
            rows.append(_row(score.metric, name, len(ids), len(runs), places, values, draws))

    add(table.rows, None, mean_over_classes(by_class), mean_over_classes(resampled))
    for index, name in enumerate(table.class_names[:num_classes]):
        add(table.class_rows, name, by_class[:, index], resampled[:, :, index])
    return is_same


def _select(counts: SparseConfusions, ids: tuple[str, ...]) -> SparseConfusions:
    return counts if counts.ids == ids else counts.select(ids)


def _row(
    metric: str,
    class_name: str | None,
    num_images: int,
    num_runs: int,
    places: Sequence[int],
    values: NDArray[np.float64],
    resampled: NDArray[np.float64],
) -> ScoreRow:
    """One row of the runs at ``places``, from their values (n,) and resampled values (n, S)."""
    found: list[float | None] = [None] * num_runs
    intervals: list[Interval | None] = [None] * num_runs
    differences: list[Difference | None] = [None] * num_runs
    for place, value, scores in zip(places, values, resampled, strict=True):
        if np.isnan(value):
            continue
        found[place], intervals[place] = float(value), interval(scores)
        if place > 0 and found[0] is not None:
            differences[place] = _difference(float(value) - found[0], scores - resampled[0])
    return ScoreRow(metric, class_name, num_images, tuple(found), tuple(intervals), tuple(differences))


def _difference(value: float, resampled: NDArray[np.float64]) -> Difference:
    """Resamples in which a run has no score (a class that does not occur in them) count for neither."""
    known = resampled[~np.isnan(resampled)]
    return Difference(value, interval(resampled), float((known > 0).mean()) if known.size else None)


def _compare_numbers(table: _Table, runs: Sequence[ScoredRun], apart: set[str]) -> None:
    """Add the metrics without counts of each image; not those of groups whose images differ between the runs."""
    metrics = [_numbers(run.metrics) for run in runs]
    counted = {row.metric for row in table.rows}
    for metric in dict.fromkeys(metric for found in metrics for metric in found):
        is_limit = metric.endswith(("_low", "_high")) and metric.rpartition("_")[0] in counted
        if metric in counted or is_limit:
            continue
        if metric.partition(".")[0] in apart:
            table.notes.append(f"{metric} is left out: the runs have it of other images")
            continue
        values = [found.get(metric) for found in metrics]
        first = values[0]
        differences = [
            None if place == 0 or value is None or first is None else Difference(value - first)
            for place, value in enumerate(values)
        ]
        nothing = (None,) * len(runs)
        table.rows.append(ScoreRow(metric, None, None, tuple(values), nothing, tuple(differences)))


def _numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    }
