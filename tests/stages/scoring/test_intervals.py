"""Which counts are a score of what, and which numbers a stage reports of them."""

import numpy as np
import pytest

from stages.ops.metrics.confusion import SparseConfusions
from stages.scoring.intervals import Score, boundary_metrics, interval_metrics, is_boundary, score_of


@pytest.mark.parametrize(
    ("thing", "metric"),
    [
        ("attention", "attention.miou"),
        ("masks_before_crf", "masks.miou_before_crf"),
        ("segmenter", "segmenter.miou"),
        ("segmenter_ms_crf", "segmenter.miou_ms_crf"),
        ("segmenter_ms_boundary", "segmenter.boundary_iou_ms"),
        ("segmenter_trimap_10px", "segmenter.trimap_miou_10px"),
        ("segmenter_test", "segmenter_test.miou"),
        ("segmenter_test_ms_crf_boundary", "segmenter_test.boundary_iou_ms_crf"),
        ("segmenter_test_trimap_2px", "segmenter_test.trimap_miou_2px"),
    ],
)
def test_counts_are_named_after_their_score(thing: str, metric: str) -> None:
    score = score_of(thing)
    assert score is not None
    assert score.metric == metric
    assert score.has_inside == ("boundary" in thing)
    assert is_boundary(thing) == ("boundary" in thing or "trimap" in thing)


def test_counts_of_no_metric_have_no_score() -> None:
    assert score_of("masks_after_random_walk") is None
    assert score_of("segmenters") is None


def test_what_lies_off_the_boundary_is_no_class() -> None:
    matrix = np.array([[6, 0, 2], [0, 3, 1], [0, 2, 0]], np.int64)
    score = Score("segmenter.boundary_iou", has_inside=True)
    np.testing.assert_allclose(score.class_iou(matrix), [6 / 8, 3 / 6])
    assert score.value(matrix) == pytest.approx((6 / 8 + 3 / 6) / 2)
    counts = SparseConfusions.from_matrices(3, [("a", matrix), ("b", matrix)])
    assert score.num_classes(counts) == 2
    metrics = boundary_metrics({"segmenter_boundary": counts, "segmenter": counts})
    assert metrics == {"segmenter.boundary_iou": pytest.approx(0.625)}
    limits = interval_metrics({"segmenter_boundary": counts})
    assert limits == {"segmenter.boundary_iou_low": 0.625, "segmenter.boundary_iou_high": 0.625}


def test_nothing_counted_is_no_number() -> None:
    nothing = SparseConfusions.from_matrices(3, [("a", np.zeros((3, 3), np.int64))])
    assert boundary_metrics({"segmenter_boundary": nothing}) == {}
    assert interval_metrics({"segmenter_boundary": nothing, "masks": nothing, "masks_after_crf": nothing}) == {}
