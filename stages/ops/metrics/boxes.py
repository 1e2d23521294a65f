"""Boxes around connected components of masks and around contours, and how much boxes overlap.

Pure functions of numpy, scipy and OpenCV; nothing is read or written.
Shapes: H W image pixels, n components or contours, a b numbers of boxes.

A box is (x0, y0, x1, y1): its left-most column, top-most row, right-most column and bottom-most row, all counted from 0
and all inside the box.  A box of one pixel has x0 = x1 and an area of 1.
Source: wsolevaluation (Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020),
evaluation.py: areas and intersections with + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.contracts import Box

_EIGHT = np.ones((3, 3), dtype=np.uint8)
"""Pixels that touch at a corner belong together."""


def component_boxes(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A box (n, 4) around each component of a mask (H, W), in the order of their first pixels, row by row.

    Pixels that touch at a side or a corner are connected.
    """
    from scipy import ndimage  # late: configs are checked without it

    labels, _ = ndimage.label(mask, structure=_EIGHT)  # pyright: ignore[reportGeneralTypeIssues] - a pair
    slices = ndimage.find_objects(labels)
    boxes = [(columns.start, rows.start, columns.stop - 1, rows.stop - 1) for rows, columns in slices]
    return np.array(boxes, dtype=np.int64).reshape(-1, 4)


@dataclass(frozen=True)
class Contours:
    """The outlines of a mask's components and of the holes in them, in OpenCV's order."""

    boxes: NDArray[np.int64]
    """(n, 4) as x0, y0, x1, y1, but x1 and y1 are one past the outline unless that leaves the image."""
    areas: NDArray[np.float64]
    """(n,) square pixels of the polygon through the centres of the outline's pixels; 0 of a single pixel or a line."""

    @property
    def largest(self) -> int:
        """Position of the contour of the largest area, the first among equals; there must be one."""
        return int(self.areas.argmax())


def find_contours(mask: NDArray[np.bool_]) -> Contours:
    """The contours of a mask (H, W), those of holes too; an empty mask has none.

    A hole's contour runs through the pixels around it, so its box is that of the hole grown by one pixel.

    Source:
        wsolevaluation (96f4b88) evaluation.py ``compute_bboxes_from_scoremaps``: every contour of ``RETR_TREE``, the
        box from ``boundingRect`` as x, y, x + width, y + height, cut at the last column and row.
    """
    import cv2  # late: configs are checked without it

    found, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    boxes = np.array([cv2.boundingRect(contour) for contour in found], dtype=np.int64).reshape(-1, 4)
    boxes[:, 2:] = np.minimum(boxes[:, :2] + boxes[:, 2:], (mask.shape[1] - 1, mask.shape[0] - 1))
    return Contours(boxes, np.array([cv2.contourArea(contour) for contour in found], dtype=np.float64))


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
    return tuple((int(x0), int(y0), int(x1), int(y1)) for x0, y0, x1, y1 in component_boxes(mask == class_index))
