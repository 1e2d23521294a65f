"""Resampled scores against summing the drawn matrices one by one; what an interval promises."""

import numpy as np
import pytest

from stages.ops.metrics import bootstrap
from stages.ops.metrics.bootstrap import Interval, interval, mean_over_classes, resample_iou
from stages.ops.metrics.confusion import SparseConfusions, iou, mean_iou


def make_counts(seed: int, num_images: int = 7, num_classes: int = 4) -> SparseConfusions:
    rng = np.random.default_rng(seed)
    matrices = rng.integers(0, 2, (num_images, num_classes, num_classes)) * rng.integers(1, 1000, (num_images, 1, 1))
    matrices[1:, -1] = matrices[1:, :, -1] = 0  # the last class is in the first image alone
    return SparseConfusions.from_matrices(num_classes, [(f"i{n}", matrix) for n, matrix in enumerate(matrices)])


def draws(num_images: int, num_resamples: int) -> np.ndarray:
    return np.concatenate(list(bootstrap._draw(num_images, num_resamples)))


def test_every_resample_is_the_score_of_its_images() -> None:
    one, two = make_counts(0), make_counts(1)
    found = resample_iou([one, two], num_resamples=50)
    weights = draws(7, 50)
    assert found.shape == (2, 50, 4)
    np.testing.assert_array_equal(weights.sum(axis=1), 7)
    for thing, counts in enumerate((one, two)):
        for number, times in enumerate(weights):
            total = sum(int(n) * counts.matrix(place) for place, n in enumerate(times))
            np.testing.assert_array_equal(found[thing, number], iou(total))
            assert mean_over_classes(found)[thing, number] == pytest.approx(mean_iou(total))
    assert np.isnan(found[0, :, 3]).any(), "some resample lacks the first image"
    assert not np.isnan(found[0, :, 3]).all()


def test_blocks_and_calls_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resample_iou([make_counts(0)], num_resamples=100)
    monkeypatch.setattr(bootstrap, "_BLOCK", 30)
    np.testing.assert_array_equal(resample_iou([make_counts(0)], num_resamples=100), whole)


def test_a_class_beyond_those_scored_changes_nothing() -> None:
    """The last class of boundary counts is what lies off the boundary."""
    counts = make_counts(2)
    np.testing.assert_array_equal(resample_iou([counts], num_classes=3), resample_iou([counts])[:, :, :3])


def test_other_images_are_refused() -> None:
    one = make_counts(0)
    with pytest.raises(ValueError, match="same images in the same order"):
        resample_iou([one, one.select(one.ids[::-1])])


def test_no_images_are_no_interval() -> None:
    empty = SparseConfusions.from_matrices(3, [])
    assert interval(mean_over_classes(resample_iou([empty]))[0]) is None


def test_equal_images_leave_no_doubt() -> None:
    matrix = np.array([[30, 10], [20, 40]], np.int64)
    counts = SparseConfusions.from_matrices(2, [(str(n), matrix) for n in range(5)])
    value = mean_iou(matrix)
    assert interval(mean_over_classes(resample_iou([counts]))[0]) == Interval(value, value)


def test_the_interval_holds_the_middle_of_the_scores() -> None:
    assert interval(np.linspace(0, 1, 1001)) == Interval(pytest.approx(0.025), pytest.approx(0.975))
    assert interval(np.array([np.nan, 0.5, 0.5])) == Interval(0.5, 0.5)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Samples of 60 images of a population whose mIoU is known: 95 % promised, percentiles give a bit less."""
    rng = np.random.default_rng(0)
    right = rng.beta(4, 2, 4000)
    whole = np.array([[[900 + 0 * p, 100], [1000 - 1000 * p, 1000 * p]] for p in right]).astype(np.int64)
    truth = mean_iou(whole.sum(axis=0))
    covered = 0
    for _ in range(100):
        chosen = rng.integers(0, len(whole), 60)
        counts = SparseConfusions.from_matrices(2, [(str(n), whole[i]) for n, i in enumerate(chosen)])
        found = interval(mean_over_classes(resample_iou([counts], num_resamples=400))[0])
        assert found is not None
        covered += found.low <= truth <= found.high
    assert 88 <= covered <= 99
