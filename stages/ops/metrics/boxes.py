"""Boxes around connected components of masks, and how much boxes overlap.

Pure functions of numpy and scipy; nothing is read or written.
Shapes: H W image pixels, n components, a b numbers of boxes.

A box is (x0, y0, x1, y1): its left-most column, top-most row, right-most column and bottom-most row, all counted from 0
and all inside the box.  A box of one pixel has x0 = x1 and an area of 1.
Source: wsolevaluation (Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020),
evaluation.py: areas and intersections with + 1.  Differs: OpenCV's x + width makes wsolevaluation's predicted boxes one
pixel wider and higher than their component, unless they touch the border.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.contracts import Box

_EIGHT = np.ones((3, 3), dtype=np.uint8)
"""Pixels that touch at a corner belong together."""


@dataclass(frozen=True)
class Components:
    """The connected components of a mask, in the order of their first pixel, row by row."""

    boxes: NDArray[np.int64]
    """(n, 4) as x0, y0, x1, y1."""
    areas: NDArray[np.int64]
    """(n,) pixels."""

    @property
    def largest(self) -> int:
        """Position of the component with the most pixels, the first among equals; there must be one."""
        return int(self.areas.argmax())


def find_components(mask: NDArray[np.bool_]) -> Components:
    """The components of a mask (H, W); pixels that touch at a side or a corner are connected.

    Source:
        Differs: wsolevaluation takes OpenCV's contours, whose area is that of a polygon through the outer pixels, and
        in its first version holes too; here a component is all its pixels and its area is their number.
    """
    from scipy import ndimage  # late: configs are checked without it

    if not mask.any():
        return Components(np.zeros((0, 4), dtype=np.int64), np.zeros(0, dtype=np.int64))
    labels, _ = ndimage.label(mask, structure=_EIGHT)  # pyright: ignore[reportGeneralTypeIssues] - a pair
    slices = ndimage.find_objects(labels)
    boxes = [(columns.start, rows.start, columns.stop - 1, rows.stop - 1) for rows, columns in slices]
    return Components(np.array(boxes, dtype=np.int64), np.bincount(labels.ravel())[1:].astype(np.int64))


def box_ious(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of every pair of boxes.

    Args:
        first: (a, 4) as x0, y0, x1, y1.
        second: (b, 4).

    Returns:
        float64 (a, b), fractions.

    Raises:
        ValueError: a box ends before it begins.
    """
    for boxes in (first, second):
        if (boxes[:, 2:] < boxes[:, :2]).any():
            raise ValueError("a box must be (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1")
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.maximum(high - low + 1, 0).prod(axis=-1)
    union = _areas(first)[:, None] + _areas(second)[None] - shared
    return shared / union


def _areas(boxes: NDArray[np.int64]) -> NDArray[np.int64]:
    return (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1)


def boxes_of_class(mask: NDArray[np.uint8], class_index: int) -> tuple[Box, ...]:
    """A box for each connected component of one class in a mask of class indices; void (255) belongs to no class.

    Objects of one class that touch share a box, and an object that something in front cuts in two has two.
    """
    return tuple((int(x0), int(y0), int(x1), int(y1)) for x0, y0, x1, y1 in find_components(mask == class_index).boxes)
