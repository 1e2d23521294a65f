"""Boxes of components and their overlaps, by hand; the overlaps are those of wsolevaluation's own tests."""

import numpy as np
import pytest

from stages.ops.metrics.boxes import box_ious, boxes_of_class, find_components


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
    found = find_components(mask)
    np.testing.assert_array_equal(found.boxes, [[0, 0, 1, 1], [4, 0, 4, 2], [0, 3, 0, 3]])
    assert found.areas.tolist() == [2, 3, 1]
    assert found.largest == 1


def test_the_first_of_two_equally_large_components_is_the_largest() -> None:
    assert find_components(np.array([[1, 0, 1]], dtype=bool)).largest == 0


def test_a_ring_counts_its_own_pixels_and_not_its_hole() -> None:
    mask = np.zeros((5, 12), dtype=bool)
    mask[:, :5] = True
    mask[1:4, 1:4] = False  # 16 pixels around a hole of 9
    mask[:3, 6:] = True  # 18 pixels
    found = find_components(mask)
    assert found.areas.tolist() == [16, 18]
    assert found.boxes[found.largest].tolist() == [6, 0, 11, 2]


def test_an_empty_mask_has_no_component() -> None:
    found = find_components(np.zeros((3, 3), dtype=bool))
    assert found.boxes.shape == (0, 4)
    assert found.areas.shape == (0,)


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
