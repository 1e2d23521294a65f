"""Outlines against the published code of boundary IoU, brute-force distances, and masks scored by hand."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.ops.metrics.boundaries import (
    BOUNDARY,
    TRIMAPS,
    boundary_iou,
    boundary_width_px,
    count_boundaries,
    distance_to_others,
)
from stages.ops.metrics.confusion import confusion_matrix, iou


def published_boundary(mask: np.ndarray, ratio: float = 0.02) -> np.ndarray:
    """``mask_to_boundary`` of the paper's repository."""
    height, width = mask.shape
    dilation = max(1, round(ratio * np.sqrt(height**2 + width**2)))
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=dilation)
    return mask - eroded[1 : height + 1, 1 : width + 1]


def blobs(seed: int, size: tuple[int, int], num_classes: int, *, void: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    mask = np.zeros(size, np.uint8)
    for _ in range(4):
        y, x = rng.uniform(0, 1, 2) * size
        value = 255 if void and rng.random() < 0.4 else rng.integers(0, num_classes)
        mask[np.hypot(rows - y, columns - x) < rng.uniform(4, size[0] / 2)] = value
    return mask


@pytest.mark.parametrize("size", [(120, 170), (33, 47), (9, 5)])
def test_boundary_iou_is_the_published_one(size: tuple[int, int]) -> None:
    totals, hits, unions = 0, np.zeros(4), np.zeros(4)
    for seed in range(3):
        truth, prediction = blobs(seed, size, 4), blobs(seed + 10, size, 4)
        totals = totals + count_boundaries(truth, prediction, 4)[BOUNDARY]
        for index in range(4):
            of_truth = published_boundary((truth == index).astype(np.uint8))
            of_prediction = published_boundary((prediction == index).astype(np.uint8))
            hits[index] += (of_truth & of_prediction).sum()
            unions[index] += (of_truth | of_prediction).sum()
    assert (unions > 0).all()
    np.testing.assert_allclose(boundary_iou(np.asarray(totals)), hits / unions)


def test_void_counts_nowhere_and_a_prediction_right_elsewhere_scores_one() -> None:
    truth = blobs(3, (60, 80), 3, void=True)
    assert (truth == 255).any()
    prediction = np.where(truth == 255, 1, truth).astype(np.uint8)
    counts = count_boundaries(truth, prediction, 3)
    for name, matrix in counts.items():
        values = boundary_iou(matrix) if name == BOUNDARY else iou(matrix)
        assert np.nanmin(values) == 1, name
    other = np.where(truth == 255, 2, truth).astype(np.uint8)
    for name, matrix in count_boundaries(truth, other, 3).items():
        np.testing.assert_array_equal(matrix, counts[name])


def test_only_the_shape_of_the_outline_decides() -> None:
    """A disc that is two pixels too large keeps nine tenths of its area and loses much of its boundary."""
    rows, columns = np.mgrid[:200, :200]
    distance = np.hypot(rows - 100, columns - 100)
    truth, prediction = (distance < 60).astype(np.uint8), (distance < 63).astype(np.uint8)
    whole = iou(confusion_matrix(truth, prediction, 2))[1]
    outline = boundary_iou(count_boundaries(truth, prediction, 2)[BOUNDARY])[1]
    assert whole > 0.9
    assert 0.3 < outline < 0.45, "bands of 6 pixels, 3 apart: about 3 of 9 are common"


@pytest.mark.parametrize(("size", "width"), [((375, 500), 12), ((500, 375), 12), ((10, 10), 1), ((1024, 2048), 46)])
def test_width_is_two_percent_of_the_diagonal(size: tuple[int, int], width: int) -> None:
    assert boundary_width_px(size) == width


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 14), st.integers(1, 14), st.integers(1, 3))
def test_distance_is_that_of_the_nearest_other_label(seed: int, height: int, width: int, num_labels: int) -> None:
    labels = np.random.default_rng(seed).integers(0, num_labels, (height, width)).astype(np.uint8)
    labels[: height // 2] = 0
    found = distance_to_others(labels)
    places = np.stack(np.mgrid[:height, :width], axis=-1).reshape(-1, 2)
    steps = np.abs(places[:, None] - places[None]).max(axis=-1)
    differs = labels.ravel()[:, None] != labels.ravel()[None]
    if not differs.any():
        assert found.min() > max(height, width) - 1
        return
    expected = np.where(differs, steps, height + width).min(axis=1).reshape(height, width)
    np.testing.assert_array_equal(found, expected)


def test_trimaps_are_the_confusions_of_a_band() -> None:
    """One column of objects: the border between columns 9 and 10 has w columns on each side within w pixels."""
    truth = np.zeros((7, 60), np.uint8)
    truth[:, 10:] = 1
    prediction = np.zeros_like(truth)
    counts = count_boundaries(truth, prediction, 2)
    for name, width in TRIMAPS.items():
        left = min(width, 10)
        np.testing.assert_array_equal(counts[name], [[7 * left, 0], [7 * width, 0]], err_msg=name)
    assert set(count_boundaries(truth, prediction, 2, trimaps=False)) == {BOUNDARY}


def test_an_image_of_one_class_has_a_border_and_no_band() -> None:
    """As in the published code the image's rim is a boundary, of two masks that agree there."""
    truth = np.ones((50, 50), np.uint8)
    counts = count_boundaries(truth, truth, 2)
    np.testing.assert_array_equal(counts[BOUNDARY], [[0, 0, 0], [0, 4 * 49, 0], [0, 0, 0]])
    assert not any(counts[name].any() for name in TRIMAPS)


def test_masks_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        count_boundaries(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2)
