"""Which score each kind of counts gives, its value, and its interval.

Pure functions; nothing is read or written.
Source: ``stages.ops.metrics.bootstrap`` (95 % percentile interval over images), ``stages.ops.metrics.boundaries``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.ops.metrics.bootstrap import interval, mean_over_classes, resample_iou
from stages.ops.metrics.boundaries import BOUNDARY, TRIMAPS, boundary_iou
from stages.ops.metrics.confusion import SparseConfusions, iou

_TRAINING = {
    "attention": "attention.miou",
    "masks_before_crf": "masks.miou_before_crf",
    "masks": "masks.miou",
    "masks_labelled": "masks.miou_labelled",
}
_SPLITS = ("segmenter_test", "segmenter")
"""Things of the segmenter begin with one of these, the longer ones first; what follows says how it looked."""


@dataclass(frozen=True)
class Score:
    """One metric that is a mean IoU of counts."""

    metric: str
    """Its name in ``metrics.json``."""
    has_inside: bool = False
    """Whether the counts have one more class, for what lies off the boundary, which is not scored."""

    def class_iou(self, total: NDArray[np.int64]) -> NDArray[np.float64]:
        """IoU of each class (C,) from the summed counts; NaN for a class that does not occur."""
        return boundary_iou(total) if self.has_inside else iou(total)

    def value(self, total: NDArray[np.int64]) -> float:
        """The mean over the classes that occur; NaN where nothing was counted."""
        values = self.class_iou(total)
        present = values[~np.isnan(values)]
        return float(present.mean()) if present.size else float("nan")

    def num_classes(self, counts: SparseConfusions) -> int:
        """C."""
        return counts.num_classes - self.has_inside


def score_of(thing: str) -> Score | None:
    """What the counts called ``thing`` are a score of; None for those that are no metric.

    >>> score_of("segmenter_ms_boundary")
    Score(metric='segmenter.boundary_iou_ms', has_inside=True)
    """
    if thing in _TRAINING:
        return Score(_TRAINING[thing])
    for split in _SPLITS:
        if thing == split or thing.startswith(f"{split}_"):
            return _segmenter_score(split, thing.removeprefix(split))
    return None


def _segmenter_score(split: str, look: str) -> Score:
    if look.endswith(BOUNDARY):
        return Score(f"{split}.boundary_iou{look.removesuffix(BOUNDARY)}", has_inside=True)
    for band, width_px in TRIMAPS.items():
        if look.endswith(band):
            return Score(f"{split}.trimap_miou_{width_px}px{look.removesuffix(band)}")
    return Score(f"{split}.miou{look}")


def is_boundary(thing: str) -> bool:
    """Whether the counts called ``thing`` are of outlines only, and no confusion matrix of whole masks."""
    return thing.endswith((BOUNDARY, *TRIMAPS))


def boundary_metrics(counts: Mapping[str, SparseConfusions]) -> dict[str, float]:
    """Boundary IoU and trimap mIoU of the counts that have them; those that counted nothing are left out."""
    found = {score_of(thing): counts[thing].total() for thing in counts if is_boundary(thing)}
    values = {score.metric: score.value(total) for score, total in found.items() if score is not None}
    return {metric: value for metric, value in values.items() if not np.isnan(value)}


def interval_metrics(counts: Mapping[str, SparseConfusions]) -> dict[str, float]:
    """``<metric>_low`` and ``<metric>_high`` of every mean IoU in ``counts``: its 95 % interval over images."""
    found: dict[str, float] = {}
    by_shape: dict[tuple[tuple[str, ...], int], list[tuple[Score, SparseConfusions]]] = {}
    for thing, value in counts.items():
        score = score_of(thing)
        if score is not None:
            by_shape.setdefault((value.ids, score.num_classes(value)), []).append((score, value))
    for (_, num_classes), group in by_shape.items():
        resampled = mean_over_classes(resample_iou([value for _, value in group], num_classes=num_classes))
        for (score, _), scores in zip(group, resampled, strict=True):
            limits = interval(scores)
            if limits is not None:
                found |= {f"{score.metric}_low": limits.low, f"{score.metric}_high": limits.high}
    return found
