"""Count how well a segmentation follows the outlines of objects: boundary IoU and trimaps.

Pure functions of numpy and scipy; nothing is read or written.  What is counted per image adds up over images, as
confusion matrices do, so that scores, intervals and comparisons come from the same code.
Shapes: C classes with background, H W image pixels.
Source: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021, and its code
``boundary_iou/utils/boundary_utils.py`` (``mask_to_boundary``); Krähenbühl and Koltun, "Efficient Inference in Fully
Connected CRFs with Gaussian Edge Potentials", NIPS 2011, section 4 (trimaps, after Kohli et al., CVPR 2008).
Differs: both sources know no void pixels; here a prediction is cut out where the truth is void, so that one that is
right on all pixels that count scores 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX
from stages.ops.metrics.confusion import confusion_matrix, iou

DILATION_RATIO = 0.02
"""Width of the boundary of boundary IoU, as a share of the image's diagonal."""

TRIMAP_WIDTHS_PX = (2, 5, 10, 20)
"""Half widths of the bands around the outlines of the truth."""

BOUNDARY = "_boundary"
"""Ends the name of what boundary IoU is counted of: ``segmenter_boundary``."""

TRIMAPS = {f"_trimap_{width}px": width for width in TRIMAP_WIDTHS_PX}
"""What ends the name of each band's counts, with its half width in pixels."""


def count_boundaries(
    truth: NDArray[np.uint8], prediction: NDArray[np.uint8], num_classes: int, *, trimaps: bool = True
) -> dict[str, NDArray[np.int64]]:
    """Count one image's pixels on and near outlines; pixels whose truth is 255 do not count.

    Args:
        truth: Class indices 0 … C-1 and 255, (H, W).
        prediction: Class indices 0 … C-1 and 255, which counts as background, (H, W).
        num_classes: C.
        trimaps: Whether to count the bands too.

    Returns:
        ``_boundary``: int64 (C + 1, C + 1), what ``boundary_iou`` takes; every name of ``TRIMAPS``: the confusion
        matrix int64 (C, C) of the pixels at most that far from a pixel with another truth (void is another one).
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth and prediction must have one shape, got {truth.shape} and {prediction.shape}")
    distance = distance_to_others(truth)
    found = {BOUNDARY: _boundary_matrix(truth, prediction, distance, num_classes)}
    for name, width in TRIMAPS.items() if trimaps else ():
        band = np.where(distance <= width, truth, np.uint8(IGNORE_INDEX))
        found[name] = confusion_matrix(band, prediction, num_classes)
    return found


def boundary_iou(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Boundary IoU of each class (C,) from counts (C + 1, C + 1); NaN for a class without any boundary."""
    return iou(matrix)[:-1]


def boundary_width_px(size: tuple[int, ...]) -> int:
    """Width of an image's boundary: 2 % of the diagonal, at least one pixel.

    Args:
        size: (height, width) in pixels.
    """
    return max(1, round(DILATION_RATIO * math.hypot(*size)))


def distance_to_others(labels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """How far each pixel is from the nearest one with another label, in king's moves; int32 (H, W).

    Next to another label it is 1; in an image of one label it is more than any distance in the image.
    """
    from scipy import ndimage  # late: configs are checked without it

    edge = _is_edge(labels)
    if not edge.any():
        return np.full(labels.shape, sum(labels.shape), np.int32)
    # the way to the nearest other label leads over an edge pixel of the own label
    return np.asarray(ndimage.distance_transform_cdt(~edge, metric="chessboard"), np.int32) + np.int32(1)


def _is_edge(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether one of a pixel's eight neighbours has another label."""
    edge = np.zeros(labels.shape, bool)
    whole, first, last = slice(None), slice(None, -1), slice(1, None)
    for here, there in (
        ((whole, first), (whole, last)),
        ((first, whole), (last, whole)),
        ((first, first), (last, last)),
        ((first, last), (last, first)),
    ):
        differs = labels[here] != labels[there]
        edge[here] |= differs
        edge[there] |= differs
    return edge


def _distance_to_border(size: tuple[int, ...]) -> NDArray[np.int32]:
    """How far each pixel is from the outside of an image of ``size``; 1 on its rim."""
    rows, columns = (np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)).astype(np.int32) for n in size)
    return np.minimum(rows[:, None], columns[None])


def _boundary_matrix(
    truth: NDArray[np.uint8], prediction: NDArray[np.uint8], distance: NDArray[np.int32], num_classes: int
) -> NDArray[np.int64]:
    """Boundary pixels of each class: on the diagonal those of both masks, in the last column and row those of one.

    A mask's boundary is what an erosion by ``boundary_width_px`` takes away; outside the image is no mask.
    """
    counted, width = truth != IGNORE_INDEX, boundary_width_px(truth.shape)
    cut = np.where(prediction == IGNORE_INDEX, np.uint8(BACKGROUND_INDEX), prediction)
    cut = np.where(counted, cut, np.uint8(IGNORE_INDEX))
    near_border = _distance_to_border(truth.shape) <= width
    of_truth = ((distance <= width) | near_border) & counted
    of_prediction = ((distance_to_others(cut) <= width) | near_border) & counted
    of_both = of_truth & of_prediction & (truth == cut)
    counts = [
        np.bincount(labels[chosen], minlength=num_classes)
        for labels, chosen in ((truth, of_both), (truth, of_truth), (cut, of_prediction))
    ]
    both, true, predicted = counts
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    np.fill_diagonal(matrix[:-1, :-1], both)
    matrix[:-1, -1] = true - both
    matrix[-1, :-1] = predicted - both
    return matrix
