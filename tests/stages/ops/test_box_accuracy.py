"""Box accuracy and pixel precision by hand and on the maps and results of wsolevaluation."""

from pathlib import Path

import numpy as np
import pytest

from stages.contracts import read_json
from stages.masks.label_rules import cut_byte
from stages.ops.metrics.box_accuracy import BoxAccuracy, CutOverlaps, PixelPrecision, cut_overlaps
from stages.ops.metrics.boxes import box_ious, find_contours

REFERENCE = Path(__file__).parents[4] / "shared" / "reference" / "wsol"

UNIMODAL = np.array(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.4, 0.4, 0.4, 0.6],
        [0.0, 0.4, 1.0, 0.8, 0.6],
        [0.0, 0.4, 0.4, 0.4, 0.6],
    ]
)
MULTIMODAL = np.array(
    [
        [0.4, 0.0, 0.2, 0.2, 0.2],
        [0.4, 0.4, 0.0, 0.4, 0.0],
        [0.0, 0.0, 0.0, 0.4, 0.0],
        [1.0, 0.6, 0.8, 0.2, 0.2],
    ]
)
THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.8)


def to_bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values * 255).astype(np.uint8)


def accuracy(**changes: object) -> BoxAccuracy:
    values = {"iou": 0.5, "iou_thresholds": (0.3, 0.5, 0.7), "cut": cut_byte(0.2), **changes}
    return BoxAccuracy.empty(**values)


# The boxes of wsolevaluation's own test.  At 0.2 the second map has the bottom row and, over a corner, the 0.4s above
# its right end: five pixels on a line, whose outline holds nothing; the three at the top left hold half a pixel.
@pytest.mark.parametrize(
    ("values", "boxes"),
    [
        (UNIMODAL, [[1, 1, 4, 3], [1, 1, 4, 3], [2, 1, 4, 3], [2, 2, 4, 3], [2, 2, 3, 3]]),
        (MULTIMODAL, [[0, 0, 4, 3], [0, 0, 2, 2], [0, 3, 3, 3], [2, 3, 3, 3], [0, 3, 1, 3]]),
    ],
)
def test_largest_box_at_each_threshold(values: np.ndarray, boxes: list[list[int]]) -> None:
    attention = to_bytes(values)
    for threshold, box in zip(THRESHOLDS, boxes, strict=True):
        overlaps = cut_overlaps(attention, np.array([box]))
        assert overlaps.largest[cut_byte(threshold)] == 1.0, threshold


def test_every_cut_is_what_cutting_the_map_there_gives() -> None:
    rng = np.random.default_rng(0)
    smooth = np.add.outer(rng.integers(0, 128, 11), rng.integers(0, 120, 13)).astype(np.uint8)
    for attention in (smooth, rng.choice([0, 3, 90, 200, 255], (9, 8)).astype(np.uint8)):
        boxes = np.array([[1, 2, 5, 6], [3, 0, 7, 4]])
        overlaps = cut_overlaps(attention, boxes)
        for cut in range(256):
            found = find_contours(attention > cut)
            fits = box_ious(found.boxes, boxes).max(axis=1) if len(found.areas) else np.zeros(1)
            assert overlaps.best[cut] == fits.max()
            assert overlaps.largest[cut] == (fits[found.largest] if len(found.areas) else 0)


def test_a_zero_map_has_no_box_and_a_constant_one_the_whole_image() -> None:
    whole = np.array([[0, 0, 3, 2]])
    nothing = cut_overlaps(np.zeros((3, 4), np.uint8), whole)
    assert not nothing.largest.any()
    assert not nothing.best.any()
    everything = cut_overlaps(np.full((3, 4), 255, np.uint8), whole)
    np.testing.assert_array_equal(everything.largest, [1.0] * 255 + [0.0])


def test_the_box_of_a_hole_counts_for_the_best_alone() -> None:
    attention = np.zeros((12, 12), np.uint8)
    attention[1:11, 1:11] = 255
    attention[4:8, 4:8] = 100
    overlaps = cut_overlaps(attention, np.array([[3, 3, 9, 9]]))  # columns and rows 3 ... 8 hold the hole's contour
    assert (overlaps.best[100], overlaps.largest[100]) == (1.0, 49 / 121)
    assert overlaps.best[99] == overlaps.largest[99] == 49 / 121


@pytest.mark.real
@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"wsolevaluation's results are not beside the project: {REFERENCE}")
def test_results_of_wsolevaluation_to_the_digit() -> None:
    stored = np.load(REFERENCE / "maps.npz")
    given = read_json(REFERENCE / "expected.json")
    expected, levels = given["expected"], (0.3, 0.5, 0.7)
    by_largest = [accuracy(iou=level, iou_thresholds=levels) for level in levels]
    pixels = PixelPrecision.empty()
    for attention, truth, boxes in zip(stored["maps"], stored["truths"], given["boxes_x0y0x1y1"], strict=True):
        overlaps = cut_overlaps(attention, np.array(boxes))
        for counts in by_largest:
            counts.accumulate(overlaps, is_top1=False)
        pixels.accumulate(attention, truth, 1)
    rows = {
        "largest_contour": [counts.largest for counts in by_largest],
        "all_contours": list(by_largest[0].best),
    }
    for rule, found in rows.items():
        best = [100 * row.max() / len(stored["maps"]) for row in found]
        assert best == pytest.approx(expected[rule]["max_box_acc"], abs=1e-9), rule
        for level, row in zip(("30", "50", "70"), found, strict=True):
            assert int(row.argmax()) == cut_byte(expected[rule]["thresholds_at_max"][level]), (rule, level)
            for threshold, right in expected[rule]["correct_at"][level].items():
                assert row[cut_byte(float(threshold))] == right, (rule, level, threshold)
    v2 = by_largest[0].compute()["max_box_acc_v2"]
    assert 100 * v2 == pytest.approx(np.mean(expected["all_contours"]["max_box_acc"]), abs=1e-9)
    area = pixels.compute()
    assert area is not None
    assert 100 * area == pytest.approx(expected["pxap"], abs=1e-9)


def test_float_maps_are_refused_since_they_may_hold_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        cut_overlaps(np.full((3, 3), np.nan), np.array([[0, 0, 1, 1]]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"shape \(H, W\)"):
        PixelPrecision.empty().accumulate(np.zeros((1, 3, 3), np.uint8), np.zeros((3, 3), np.uint8), 1)
    with pytest.raises(ValueError, match="at least one true box"):
        cut_overlaps(np.zeros((3, 3), np.uint8), np.zeros((0, 4), np.int64))


def overlaps_of(largest: dict[range, float], best: dict[range, float]) -> CutOverlaps:
    arrays = []
    for parts in (largest, best):
        values = np.zeros(256)
        for cuts, value in parts.items():
            values[list(cuts)] = value
        arrays.append(values)
    return CutOverlaps(*arrays)


def test_accuracies_of_three_cases() -> None:
    counts = accuracy()
    low, high = range(60), range(100, 150)  # cut 51 is 20 %
    counts.accumulate(overlaps_of({low: 0.5}, {low: 0.8}), is_top1=True)
    counts.accumulate(overlaps_of({high: 0.6}, {high: 0.6}), is_top1=True)
    counts.accumulate(overlaps_of({high: 0.49}, {low: 0.3, high: 0.49}), is_top1=False)
    # best boxes: at IoU .3 case 1 and 3 (low) or 2 and 3 (high); at .5 one of three; at .7 only case 1
    assert counts.compute() == {
        "top1_loc": pytest.approx(1 / 3),
        "gt_known_loc": pytest.approx(1 / 3),
        "top1_clas": pytest.approx(2 / 3),
        "max_box_acc": pytest.approx(1 / 3),
        "max_box_acc_threshold": 0.0,
        "max_box_acc_v2": pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3),
    }


def test_the_threshold_is_one_for_the_whole_data_set() -> None:
    counts = accuracy()
    counts.accumulate(overlaps_of({range(0, 60): 1.0}, {range(0, 60): 1.0}), is_top1=False)
    counts.accumulate(overlaps_of({range(50, 90): 1.0}, {range(50, 90): 1.0}), is_top1=True)
    found = counts.compute()
    assert (found["max_box_acc"], found["max_box_acc_threshold"]) == (1.0, 50 / 255)
    assert (found["gt_known_loc"], found["top1_loc"], found["top1_clas"]) == (1.0, 0.5, 0.5)


def test_merging_is_counting_together_and_nothing_has_no_accuracy() -> None:
    first, second, together = accuracy(), accuracy(), accuracy()
    one = overlaps_of({range(0, 60): 0.7}, {range(0, 60): 0.7})
    other = overlaps_of({range(0, 9): 0.4}, {range(0, 80): 0.9})
    first.accumulate(one, is_top1=True)
    second.accumulate(other, is_top1=False)
    together.accumulate(one, is_top1=True)
    together.accumulate(other, is_top1=False)
    first.merge(second)
    assert first.compute() == together.compute()
    assert accuracy().compute() == {}


# -- pixels -----------------------------------------------------------------------------------------------------------


def pixel_precision(attention: np.ndarray, truth: np.ndarray, class_index: int = 1) -> float | None:
    counts = PixelPrecision.empty()
    counts.accumulate(attention, truth, class_index)
    return counts.compute()


def test_a_perfect_map_has_an_area_of_one_whatever_void_says() -> None:
    truth = np.array([[1, 0, 255], [1, 1, 0]], np.uint8)
    for value in (0, 255):
        attention = np.where(truth == 1, 255, 0).astype(np.uint8)
        attention[truth == 255] = value
        assert pixel_precision(attention, truth) == 1.0


@pytest.mark.parametrize("value", [0, 127, 255])
def test_a_constant_map_has_the_share_of_the_object(value: int) -> None:
    truth = np.array([[1, 0, 2, 255], [1, 0, 0, 0]], np.uint8)
    assert pixel_precision(np.full((2, 4), value, np.uint8), truth) == pytest.approx(2 / 7)


def test_area_by_hand_and_pooled_over_maps() -> None:
    counts = PixelPrecision.empty()
    counts.accumulate(np.array([[255, 200]], np.uint8), np.array([[1, 0]], np.uint8), 1)
    counts.accumulate(np.array([[200, 100, 50]], np.uint8), np.array([[2, 2, 0]], np.uint8), 2)
    # ≥255: 1 of 1, recall 1/3; ≥200: 2 of 3, recall 2/3; ≥100: 3 of 4, recall 1
    assert counts.compute() == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    precision, recall = counts.curve()
    assert (precision[0], recall[0], recall[-1]) == (1.0, pytest.approx(1 / 3), 1.0)


def test_without_a_pixel_of_an_object_there_is_no_area() -> None:
    assert pixel_precision(np.full((2, 2), 9, np.uint8), np.zeros((2, 2), np.uint8)) is None
