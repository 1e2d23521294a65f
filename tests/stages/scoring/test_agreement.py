"""How far the views of an image agree, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from stages.contracts import ClassList
from stages.scoring.agreement import Agreement, least_agreed, measure_agreement

CLASSES = ClassList(names=("cat", "dog"))


def measure(labels: tuple[int, ...], **views: list[int]) -> Agreement:
    masks = {name: np.array([row], dtype=np.uint8) for name, row in views.items()}
    return measure_agreement("a", masks, labels, CLASSES)


def test_equal_views_agree():
    found = measure((0,), mask=[0, 0, 1, 1], prediction=[0, 0, 1, 1])
    assert found.value == 1


def test_the_worst_class_of_the_worst_pair_is_named():
    # mask against prediction: background 1 of 3, cat 1 of 3; the other pairs are 1 and the same
    found = measure((0,), attention=[0, 0, 1, 1], mask=[0, 0, 1, 1], prediction=[0, 1, 0, 1])
    assert found.value == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert found.why == "background: IoU 33% of attention and prediction"


def test_a_label_that_no_view_shows_is_disagreement():
    found = measure((0,), mask=[0, 0, 0, 0], prediction=[0, 0, 0, 0])
    assert found.value == pytest.approx((1 + 0) / 2)
    assert found.why == "cat is in neither mask nor prediction"
    assert measure((), mask=[0, 0, 0, 0], prediction=[0, 0, 0, 0]).value == 1


def test_a_class_that_the_image_does_not_have_counts():
    # background 2 of 2, cat 1 of 2, dog 0 of 1
    found = measure((0,), mask=[0, 0, 1, 1], prediction=[0, 0, 1, 2])
    assert found.value == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found.why == "dog: IoU 0% of mask and prediction"


def test_unsure_pixels_do_not_count_and_alone_agree_on_nothing():
    assert measure((0,), mask=[0, 255, 1, 255], prediction=[0, 1, 1, 0]).value == 1
    assert measure((), mask=[255] * 4, prediction=[0, 1, 1, 0]).value == 0


def test_the_least_come_first_and_equal_ones_by_name():
    found = [Agreement("b", 0.5, ""), Agreement("c", 0.1, ""), Agreement("a", 0.5, "")]
    assert [one.image_id for one in least_agreed(found, 2)] == ["c", "a"]
    assert len(least_agreed(found, 9)) == 3
