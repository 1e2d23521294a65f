"""Boxes of components and contours, and overlaps, by hand; the overlaps are those of wsolevaluation's own tests."""

import numpy as np
import pytest
from scipy import ndimage

from stages.ops.metrics.boxes import box_ious, boxes_of_class, component_boxes, find_contours


def test_a_component_is_all_pixels_that_touch_at_a_side_or_a_corner() -> None:
    mask = np.array(
        [
            [1, 0, 0, 0, 1],
            [0, 1, 0, 0, 1],
            [0, 0, 0, 0, 1],
            [1, 0, 0, 0, 0],
        ],
        dtype=bool,
    )
    np.testing.assert_array_equal(component_boxes(mask), [[0, 0, 1, 1], [4, 0, 4, 2], [0, 3, 0, 3]])


def test_an_empty_mask_has_no_component_and_no_contour() -> None:
    nothing = np.zeros((3, 3), dtype=bool)
    assert component_boxes(nothing).shape == (0, 4)
    found = find_contours(nothing)
    assert (found.boxes.shape, found.areas.shape) == ((0, 4), (0,))


def test_contours_are_those_of_components_and_of_holes() -> None:
    mask = np.zeros((10, 12), dtype=bool)
    mask[1:8, 1:8] = True
    mask[3:6, 3:6] = False  # a hole of 3 x 3; the ring around it is two pixels wide
    mask[4, 4] = True  # an island in it
    mask[9, 10:] = True  # at the image's corner
    found = find_contours(mask)
    boxes = {tuple(box): area for box, area in zip(found.boxes.tolist(), found.areas.tolist(), strict=True)}
    assert boxes == {
        (1, 1, 8, 8): 36.0,  # 6 x 6 between the centres of its outer pixels
        (2, 2, 7, 7): 14.0,  # columns and rows 2 ... 6 hold the hole's contour, which cuts the corners: 4 x 4 - 4 / 2
        (4, 4, 5, 5): 0.0,
        (10, 9, 11, 9): 0.0,  # ends with the image
    }
    assert found.boxes[found.largest].tolist() == [1, 1, 8, 8]


def test_of_two_outlines_the_larger_counts_not_the_one_with_more_pixels() -> None:
    mask = np.zeros((9, 20), dtype=bool)
    mask[:, :9] = True
    mask[1:8, 1:8] = False  # 32 pixels around 64
    mask[:6, 11:18] = True  # 42 pixels, whose outline holds 5 x 6
    found = find_contours(mask)
    assert found.boxes[found.largest].tolist() == [0, 0, 9, 8]


@pytest.mark.parametrize("seed", range(4))
def test_a_hole_s_box_is_the_hole_grown_by_one_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = ndimage.zoom(rng.random((10, 13)), 4, order=1) > 0.45
    holes, count = ndimage.label(np.pad(~mask, 1, constant_values=True))  # pixels touch at sides; 1 is the outside
    outside = holes[0, 0]
    expected = [(x0, y0, x1 + 1, y1 + 1) for x0, y0, x1, y1 in component_boxes(mask).tolist()]
    for label in range(1, count + 1):
        if label != outside:
            rows, columns = np.nonzero(holes[1:-1, 1:-1] == label)
            grown = (columns.min() - 1, rows.min() - 1, columns.max() + 1, rows.max() + 1)
            expected.append((grown[0], grown[1], grown[2] + 1, grown[3] + 1))
    last = (mask.shape[1] - 1, mask.shape[0] - 1)
    clipped = sorted((int(x0), int(y0), int(min(x1, last[0])), int(min(y1, last[1]))) for x0, y0, x1, y1 in expected)
    assert len(clipped) > len(component_boxes(mask)), "some hole"
    assert sorted(map(tuple, find_contours(mask).boxes.tolist())) == clipped


def test_overlaps_of_boxes() -> None:
    zeros = np.zeros((1, 4), dtype=np.int64)
    np.testing.assert_array_equal(box_ious(np.repeat(zeros, 3, 0), np.repeat(zeros, 5, 0)), np.ones((3, 5)))
    own = np.array([[1, 1, 3, 3], [4, 4, 5, 5]])
    np.testing.assert_array_equal(box_ious(own, own), np.eye(2))
    # 5 x 5 and 2 x 5 pixels share 2 x 4
    assert box_ious(np.array([[1, 2, 5, 6]]), np.array([[3, 1, 4, 5]])).item() == 8 / 27


def test_a_box_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="x0 <= x1"):
        box_ious(np.array([[1, 1, 0, 0]]), np.array([[1, 1, 2, 2]]))


def test_boxes_of_a_class_leave_void_out() -> None:
    mask = np.array(
        [
            [2, 255, 2, 0],
            [2, 255, 2, 1],
            [0, 255, 0, 1],
        ],
        dtype=np.uint8,
    )
    assert boxes_of_class(mask, 2) == ((0, 0, 0, 1), (2, 0, 2, 1))
    assert boxes_of_class(mask, 1) == ((3, 1, 3, 2),)
    assert boxes_of_class(mask, 3) == ()
