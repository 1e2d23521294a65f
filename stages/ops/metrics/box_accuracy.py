"""Count how well attention maps point at objects: box accuracy at every threshold, and pixel precision and recall.

Pure numpy; nothing is read or written.  A case is one map with the true boxes of its class.
Shapes: H W image pixels, T IoU thresholds, b true boxes.

Maps are bytes, 255 = the map's own maximum, 0 = no evidence, or the map's own minimum.  A threshold is a fraction of
that maximum, and a pixel is above it when its byte is above ``floor(255 · threshold)``: so 256 cuts are all that any
list of thresholds can tell apart, wsolevaluation's steps of 0.001 among them, and a maximum over the cuts is exact.
Source: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016 (20 % of the maximum, largest
outline); Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020, section 4
(MaxBoxAcc, PxAP) and its code wsolevaluation, evaluation.py (MaxBoxAccV2).
Differs: wsolevaluation scales maps and boxes to 224 × 224 where ours keep the image's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from stages.contracts import IGNORE_INDEX
from stages.ops.metrics.boxes import box_ious, find_contours

NUM_CUTS = 256
"""Cuts 0 … 255; above the last one there is no pixel."""


def check_map(attention: NDArray[np.uint8]) -> None:
    """Refuse what is no byte map (H, W).

    Raises:
        ValueError: another type or shape; a float map may hold NaN and has to be made bytes first.
    """
    if attention.dtype != np.uint8 or attention.ndim != 2:
        raise ValueError(
            f"an attention map must be uint8 of shape (H, W), got {attention.dtype} {attention.shape}; "
            "a float map may hold NaN: bring it to bytes with quantise_attention, which refuses NaN"
        )


@dataclass(frozen=True)
class CutOverlaps:
    """How well the boxes of one map fit its best true box, at each of the 256 cuts; 0 where there is no pixel."""

    largest: NDArray[np.float64]
    """(256,) IoU of the box of the contour with the largest area."""
    best: NDArray[np.float64]
    """(256,) IoU of the best contour's box."""


def cut_overlaps(attention: NDArray[np.uint8], boxes: NDArray[np.int64]) -> CutOverlaps:
    """Compare the boxes of one map with its true boxes at every cut.

    Args:
        attention: uint8 (H, W).
        boxes: The true boxes (b, 4) as x0, y0, x1, y1; at least one, and the best-fitting one counts.

    Source:
        Differs: wsolevaluation gives a map without a pixel above the threshold the box (0, 0, 0, 0); here it has none.
    """
    check_map(attention)
    if len(boxes) == 0:
        raise ValueError("a case needs at least one true box")
    largest, best = np.zeros(NUM_CUTS), np.zeros(NUM_CUTS)
    values = np.unique(attention)
    corner = np.zeros(2, dtype=np.int64)
    # between two values of the map the mask does not change: cuts values[i-1] … values[i] - 1 are one
    for value, before in zip(values, (0, *values), strict=False):
        if value == 0:
            continue
        contours = find_contours(attention >= value)
        fits = box_ious(contours.boxes + np.tile(corner, 2), boxes).max(axis=1)
        largest[before:value], best[before:value] = fits[contours.largest], fits.max()
        # a higher cut has nothing outside; boxes end a pixel past their contour, so only the image's edge cuts them
        low, high = contours.boxes[:, :2].min(axis=0), contours.boxes[:, 2:].max(axis=0)
        attention = attention[low[1] : high[1] + 1, low[0] : high[0] + 1]
        corner = corner + low
    return CutOverlaps(largest, best)


@dataclass
class BoxAccuracy:
    """How many cases are right at every cut; adding up is exact, in any order and grouping."""

    iou: float
    """What the largest contour's box must reach."""
    iou_thresholds: tuple[float, ...]
    """What the best contour's box must reach, for MaxBoxAccV2."""
    cut: int
    """The cut of GT-known Loc and Top-1 Loc."""
    num_cases: int
    num_top1: int
    """Cases whose class is the classifier's first."""
    num_top1_loc: int
    """Those of them whose box is right at ``cut``."""
    largest: NDArray[np.int64]
    """(256,) cases whose largest contour is right."""
    best: NDArray[np.int64]
    """(T, 256) cases with a contour that is right."""

    @classmethod
    def empty(cls, *, iou: float, iou_thresholds: tuple[float, ...], cut: int) -> Self:
        """Nothing counted yet."""
        counts = np.zeros(NUM_CUTS, dtype=np.int64)
        return cls(iou, iou_thresholds, cut, 0, 0, 0, counts, np.zeros((len(iou_thresholds), NUM_CUTS), dtype=np.int64))

    def accumulate(self, overlaps: CutOverlaps, *, is_top1: bool) -> None:
        """Count one case."""
        is_right = overlaps.largest >= self.iou
        self.largest += is_right
        for row, least in zip(self.best, self.iou_thresholds, strict=True):
            row += overlaps.best >= least
        self.num_cases += 1
        self.num_top1 += is_top1
        self.num_top1_loc += bool(is_top1 and is_right[self.cut])

    def merge(self, other: BoxAccuracy) -> None:
        """Add the cases of ``other``, which was counted by the same rule."""
        self.num_cases += other.num_cases
        self.num_top1 += other.num_top1
        self.num_top1_loc += other.num_top1_loc
        self.largest += other.largest
        self.best += other.best

    def compute(self) -> dict[str, float]:
        """Fractions of the cases; empty without a case.

        ``max_box_acc``: the best of all cuts, each cut with one threshold for the whole data set.
        ``max_box_acc_v2``: the mean over the IoU thresholds of the best of all cuts, which may differ between them.
        """
        if self.num_cases == 0:
            return {}
        accuracy = self.largest / self.num_cases
        return {
            "top1_loc": self.num_top1_loc / self.num_cases,
            "gt_known_loc": float(accuracy[self.cut]),
            "top1_clas": self.num_top1 / self.num_cases,
            "max_box_acc": float(accuracy.max()),
            "max_box_acc_threshold": int(accuracy.argmax()) / (NUM_CUTS - 1),
            "max_box_acc_v2": float((self.best / self.num_cases).max(axis=1).mean()),
        }


@dataclass
class PixelPrecision:
    """Map values on and off the objects, pooled over cases."""

    positive: NDArray[np.int64]
    """(256,) pixels of the class by their byte."""
    negative: NDArray[np.int64]
    """(256,) all other pixels but void."""

    @classmethod
    def empty(cls) -> Self:
        """Nothing counted yet."""
        return cls(np.zeros(NUM_CUTS, dtype=np.int64), np.zeros(NUM_CUTS, dtype=np.int64))

    def accumulate(self, attention: NDArray[np.uint8], truth: NDArray[np.uint8], class_index: int) -> None:
        """Count one case.

        Args:
            attention: uint8 (H, W).
            truth: Class indices (H, W); 255 is left out.
            class_index: The class that the map is of (1 … K).
        """
        check_map(attention)
        is_object = truth == class_index
        self.positive += np.bincount(attention[is_object], minlength=NUM_CUTS)
        self.negative += np.bincount(attention[~is_object & (truth != IGNORE_INDEX)], minlength=NUM_CUTS)

    def merge(self, other: PixelPrecision) -> None:
        """Add the pixels of ``other``."""
        self.positive += other.positive
        self.negative += other.negative

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Precision and recall of "byte ≥ v" for v = 255 … 0, each (256,); precision is 1 where no pixel is marked."""
        hits = self.positive[::-1].cumsum()
        marked = hits + self.negative[::-1].cumsum()
        precision = np.where(marked > 0, hits / np.maximum(marked, 1), 1.0)
        return precision, hits / max(int(self.positive.sum()), 1)

    def compute(self) -> float | None:
        """The area under the curve, every recall gained at the precision reached there; None without an object's pixel.

        Source:
            wsolevaluation, MaskEvaluator, whose 1,000 bins give the same on byte maps.  Differs: its maps are floats,
            and every pixel weighs the same here, where its images are scaled to one size.
        """
        if not self.positive.any():
            return None
        precision, recall = self.curve()
        return float((precision * np.diff(recall, prepend=0.0)).sum())
