"""The scores of attention maps and pseudo-masks, out of the counts of all training images that are scored.

Pure: counts in, numbers out.
Shapes: C classes with background; matrices are int64 (C, C) with the truth in rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.masks.label_rules import cut_byte
from stages.masks.mask_files import step_names
from stages.ops.metrics.confusion import SparseConfusions, ThresholdSweep, mean_iou

THINGS = ("attention", "masks_before_crf", "masks", "masks_labelled")
"""Attention at the configured threshold for all classes, the strongest map winning (so that methods compare, and the
oracle is the best of it); pseudo-masks by the whole label rule before refinement, with 255 as background, with 255
dropped.  Where the masks between the steps were kept there are also ``masks_before_crf_labelled`` and, for each
refinement but the last, ``masks_after_<refinement>`` and the same with ``_labelled``."""


def step_things(chain: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What is counted of the masks after each step, 255 as background and 255 dropped; nothing of no chain."""
    if not chain:
        return {}
    between = [f"masks_after_{name}" for name in chain[:-1]]
    things = ("masks_before_crf", *between, "masks")
    return {name: (thing, f"{thing}_labelled") for name, thing in zip(step_names(chain), things, strict=True)}


@dataclass(frozen=True)
class TrainingScores:
    """Counts over all scored training images."""

    confusions: Mapping[str, SparseConfusions]
    sweep: ThresholdSweep | None
    """None without maps."""
    level: float
    """The configured threshold (of ``background: power``: the equivalent one)."""
    chain: tuple[str, ...] = ()
    """The refinements, where the masks between the steps were scored."""

    def metrics(self) -> dict[str, Any]:
        """The ``attention.*`` and ``masks.*`` scores; empty where no pixel was counted."""
        total = {thing: counts.total() for thing, counts in self.confusions.items()}
        counted = int(total["masks"].sum())
        if counted == 0:
            return {}
        scores: dict[str, Any] = {
            **self._attention_metrics(),
            "masks.miou_before_crf": mean_iou(total["masks_before_crf"]),
            "masks.miou": mean_iou(total["masks"]),
            "masks.coverage": int(total["masks_labelled"].sum()) / counted,
        }
        if total["masks_labelled"].any():
            scores["masks.miou_labelled"] = mean_iou(total["masks_labelled"])
        if self.chain:
            scores["masks.steps"] = [
                score_step(name, total[thing], total[labelled])
                for name, (thing, labelled) in step_things(self.chain).items()
            ]
        return scores

    def _attention_metrics(self) -> dict[str, float]:
        if self.sweep is None:
            return {}
        by_cut = _miou_by_cut(self.sweep)
        best = int(by_cut.argmax())
        return {
            "attention.miou": mean_iou(self.confusions["attention"].total()),
            "attention.miou_oracle": float(by_cut[best]),
            "attention.threshold_oracle": best / 255,
        }

    def curve(self) -> dict[str, object] | None:
        """The threshold sweep for people: 0.00 … 1.00 in steps of 0.01, exact at each; None without maps."""
        if self.sweep is None:
            return None
        by_cut = _miou_by_cut(self.sweep)
        thresholds = [step / 100 for step in range(101)]
        return {
            "thresholds": thresholds,
            "miou": [float(by_cut[cut_byte(threshold)]) for threshold in thresholds],
            "configured": self.level,
            "oracle": int(by_cut.argmax()) / 255,
            "split": "train_score",
            "images": len(self.confusions["masks"].ids),
        }


def _miou_by_cut(sweep: ThresholdSweep) -> NDArray[np.float64]:
    """The mIoU at each of the 256 cuts that bytes can be told apart at."""
    return np.array([mean_iou(matrix) for matrix in sweep.matrices()])


def score_step(name: str, counted: NDArray[np.int64], labelled: NDArray[np.int64]) -> dict[str, str | float]:
    """What the masks after one step are worth.

    Args:
        name: ``threshold``, or the refinement.
        counted: Confusions with 255 as background, at least one pixel.
        labelled: Confusions with 255 dropped.

    Returns:
        ``step``, ``miou``, ``coverage`` and, where any pixel is labelled, ``miou_labelled``; fractions.
    """
    sure = int(labelled.sum())
    entry: dict[str, str | float] = {"step": name, "miou": mean_iou(counted), "coverage": sure / int(counted.sum())}
    return entry | ({"miou_labelled": mean_iou(labelled)} if sure else {})
