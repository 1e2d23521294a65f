"""Which images are worth a correction: those whose attention, pseudo-mask and prediction agree least.

Works on masks in memory; reads and writes nothing.
Shapes: C classes with background, H W image pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.contracts import BACKGROUND_INDEX, ClassList
from stages.ops.metrics.confusion import confusion_matrix, iou


@dataclass(frozen=True)
class Agreement:
    """How far the views of one image agree."""

    image_id: str
    value: float
    """Mean over all pairs of views of the mean IoU of the pair, in [0, 1]."""
    why: str
    """The class and the pair that agree least."""


def measure_agreement(
    image_id: str, views: Mapping[str, NDArray[np.uint8]], labels: Sequence[int], classes: ClassList
) -> Agreement:
    """Compare every two views of an image.

    The IoU of a pair is a mean over background, the classes in either view and the image's labels: a label that both
    views miss counts as 0, since two masks of nothing agree on nothing.  Pixels of 255 in either view do not count.

    Args:
        image_id: The image.
        views: At least two masks of class indices and 255, (H, W), by what they are called.
        labels: The image's label indices.
        classes: The class list.
    """
    values: list[float] = []
    worst, why = 2.0, ""
    for (one, first), (other, second) in itertools.combinations(views.items(), 2):
        matrix = confusion_matrix(first, second, classes.num_classes, unsure="drop")
        found = iou(matrix)
        expected = [ClassList.class_index(label) for label in labels]
        missing = [index for index in expected if np.isnan(found[index])]
        found[missing] = 0
        if np.isnan(found).all():  # nothing but unsure pixels
            found[BACKGROUND_INDEX] = 0
        values.append(float(np.nanmean(found)))
        index = int(np.nanargmin(found))
        if found[index] < worst:
            name = classes.names_with_background[index]
            worst = float(found[index])
            why = (
                f"{name} is in neither {one} nor {other}"
                if index in missing
                else (f"{name}: IoU {worst:.0%} of {one} and {other}")
            )
    return Agreement(image_id, float(np.mean(values)), why)


def least_agreed(found: Iterable[Agreement], count: int) -> list[Agreement]:
    """The ``count`` images that agree least, the least first; equal ones by id."""
    return sorted(found, key=lambda agreement: (agreement.value, agreement.image_id))[:count]
