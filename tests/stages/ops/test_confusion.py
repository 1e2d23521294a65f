"""Scores by hand and against torchmetrics; storage and the threshold sweep against brute force."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contracts import AttentionRecord
from stages.errors import DamagedFileError
from stages.masks.label_rules import (
    ConfidentThresholds,
    SeedConfig,
    background_level,
    combine_confident,
    cut_byte,
    initial_mask,
    map_probabilities,
    strongest_map,
    to_class_indices,
    upsample_maps,
)
from stages.ops.metrics.confusion import (
    SparseConfusions,
    ThresholdSweep,
    confusion_matrix,
    iou,
    mean_iou,
    pixel_accuracy,
    read_confusions,
    write_confusions,
)

TRUTH = np.array([[0, 0, 1, 1], [0, 2, 2, 255]], np.uint8)
PREDICTION = np.array([[0, 1, 1, 255], [255, 2, 0, 1]], np.uint8)


def test_matrix_by_hand() -> None:
    """The 255 of the truth is dropped; those of the prediction are background, or dropped too."""
    np.testing.assert_array_equal(confusion_matrix(TRUTH, PREDICTION, 3), [[2, 1, 0], [1, 1, 0], [1, 0, 1]])
    np.testing.assert_array_equal(
        confusion_matrix(TRUTH, PREDICTION, 3, unsure="drop"), [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    )


def test_scores_by_hand() -> None:
    matrix = confusion_matrix(TRUTH, PREDICTION, 3)
    np.testing.assert_allclose(iou(matrix), [2 / 5, 1 / 3, 1 / 2])
    assert mean_iou(matrix) == pytest.approx((2 / 5 + 1 / 3 + 1 / 2) / 3)
    assert pixel_accuracy(matrix) == pytest.approx(4 / 7)


def test_a_class_that_is_nowhere_is_left_out_and_a_predicted_one_counts() -> None:
    matrix = np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]], np.int64)
    np.testing.assert_allclose(iou(matrix), [6 / 8, 0, np.nan])
    assert mean_iou(matrix) == pytest.approx(3 / 8)


def test_nothing_counted_is_nan() -> None:
    nothing = confusion_matrix(np.full((2, 2), 255, np.uint8), np.zeros((2, 2), np.uint8), 3)
    assert np.isnan(mean_iou(nothing))
    assert np.isnan(pixel_accuracy(nothing))


@pytest.mark.parametrize(
    ("truth", "prediction", "text"),
    [
        (np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), "must have one shape"),
        (np.zeros((1, 1), np.uint8), np.full((1, 1), 7, np.uint8), "a class index reaches 7, expected below 3"),
        (np.full((1, 1), 3, np.uint8), np.zeros((1, 1), np.uint8), "a class index reaches 3"),
    ],
)
def test_wrong_masks_are_refused(truth: np.ndarray, prediction: np.ndarray, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        confusion_matrix(truth, prediction, 3)


@pytest.mark.slow  # importing torchmetrics takes seconds
def test_equal_to_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    classification = pytest.importorskip("torchmetrics.functional.classification")
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 3, 255], (40, 50)).astype(np.uint8)
    prediction = np.where(rng.random((40, 50)) < 0.6, truth, rng.integers(0, 4, (40, 50))).astype(np.uint8)
    prediction[prediction == 255] = 0
    matrix = confusion_matrix(truth, prediction, 4)
    pair = torch.from_numpy(prediction).long(), torch.from_numpy(truth).long()
    expected = classification.multiclass_jaccard_index(*pair, num_classes=4, average="none", ignore_index=255)
    np.testing.assert_allclose(iou(matrix), expected.numpy(), rtol=1e-6)
    accuracy = classification.multiclass_accuracy(*pair, num_classes=4, average="micro", ignore_index=255)
    assert pixel_accuracy(matrix) == pytest.approx(float(accuracy), rel=1e-6)


def _torchmetrics_macro(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> float:
    """The class metric, fed two halves, as a validation loop would."""
    torch = pytest.importorskip("torch")
    classification = pytest.importorskip("torchmetrics.classification")
    metric = classification.MulticlassJaccardIndex(num_classes=num_classes, average="macro", ignore_index=255)
    for rows in (slice(None, 20), slice(20, None)):
        metric.update(torch.from_numpy(prediction[rows]).long(), torch.from_numpy(truth[rows]).long())
    return float(metric.compute())


@pytest.mark.slow  # importing torchmetrics takes seconds
def test_mean_equal_to_torchmetrics_macro_with_absent_classes_left_out() -> None:
    """Of six classes, 4 is nowhere: left out by both.  5 is predicted only: IoU 0 in both.  Void counts in neither."""
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 3, 255], (40, 50)).astype(np.uint8)
    prediction = np.where(rng.random((40, 50)) < 0.6, truth, rng.choice([0, 1, 2, 3, 5], (40, 50))).astype(np.uint8)
    prediction[prediction == 255] = 0
    matrix = confusion_matrix(truth, prediction, 6)
    np.testing.assert_array_equal(np.isnan(iou(matrix)), [False, False, False, False, True, False])
    assert iou(matrix)[5] == 0
    assert mean_iou(matrix) == pytest.approx(_torchmetrics_macro(truth, prediction, 6), rel=1e-6)


@pytest.mark.slow  # importing torchmetrics takes seconds
def test_torchmetrics_mean_iou_is_our_score_of_one_image() -> None:
    """``segmentation.MeanIoU`` averages scores of images: the same on one image, no benchmark's mIoU on several."""
    torch = pytest.importorskip("torch")
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, (2, 30, 30)).astype(np.uint8)
    truth[0][truth[0] == 2] = 1
    prediction = np.where(rng.random(truth.shape) < 0.7, truth, 1).astype(np.uint8)
    matrices = [confusion_matrix(*pair, 4) for pair in zip(truth, prediction, strict=True)]

    def theirs(chosen: slice) -> float:
        metric = segmentation.MeanIoU(num_classes=4, input_format="index")
        metric.update(torch.from_numpy(prediction[chosen]).long(), torch.from_numpy(truth[chosen]).long())
        return float(metric.compute())

    assert theirs(slice(0, 1)) == pytest.approx(mean_iou(matrices[0]), rel=1e-6)
    assert theirs(slice(1, 2)) == pytest.approx(mean_iou(matrices[1]), rel=1e-6)
    assert theirs(slice(0, 2)) != pytest.approx(mean_iou(matrices[0] + matrices[1]), rel=1e-3)


@settings(max_examples=60)
@given(st.integers(0, 9999), st.integers(0, 12), st.integers(0, 12), st.sampled_from([1, 3, 40]))
def test_runs_and_noise_are_counted_alike(seed: int, height: int, width: int, run: int) -> None:
    """Long runs of one value are counted as runs, noise by pixels: both as one pixel after the other."""
    rng = np.random.default_rng(seed)
    truth, prediction = (
        rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), height * width // run + 1).repeat(run)[: height * width]
        for _ in range(2)
    )
    expected = {"background": np.zeros((4, 4), np.int64), "drop": np.zeros((4, 4), np.int64)}
    for true, found in zip(truth.tolist(), prediction.tolist(), strict=True):
        if true != 255:
            expected["background"][true, 0 if found == 255 else found] += 1
            if found != 255:
                expected["drop"][true, found] += 1
    for unsure, matrix in expected.items():
        counts = confusion_matrix(truth.reshape(height, width), prediction.reshape(height, width), 4, unsure=unsure)
        assert counts.dtype == np.int64
        np.testing.assert_array_equal(counts, matrix)


def _sparse(num_images: int = 3) -> tuple[SparseConfusions, list[np.ndarray]]:
    rng = np.random.default_rng(1)
    matrices = [rng.integers(0, 2, (4, 4)) * rng.integers(0, 99, (4, 4)) for _ in range(num_images)]
    return SparseConfusions.from_matrices(4, [(f"im {n} ü", m) for n, m in enumerate(matrices)]), matrices


def test_sparse_counts_keep_everything(tmp_path: Path) -> None:
    sparse, matrices = _sparse()
    empty = SparseConfusions.from_matrices(4, [])
    write_confusions(tmp_path / "c.npz", {"segmenter": sparse, "masks": empty})
    read = read_confusions(tmp_path / "c.npz")
    assert read["segmenter"].ids == sparse.ids
    assert read["masks"].ids == ()
    assert not read["masks"].total().any()
    for position, matrix in enumerate(matrices):
        np.testing.assert_array_equal(read["segmenter"].matrix(position), matrix)
    np.testing.assert_array_equal(read["segmenter"].total(), sum(matrices))
    np.testing.assert_array_equal(read["segmenter"].total({"im 0 ü", "im 2 ü"}), matrices[0] + matrices[2])
    assert read["segmenter"].mean_iou_by_image()["im 1 ü"] == mean_iou(matrices[1])


def test_images_are_selected_in_the_order_asked_for() -> None:
    sparse, matrices = _sparse()
    chosen = sparse.select(["im 2 ü", "im 0 ü"])
    assert chosen.ids == ("im 2 ü", "im 0 ü")
    np.testing.assert_array_equal(chosen.matrix(0), matrices[2])
    np.testing.assert_array_equal(chosen.matrix(1), matrices[0])
    with pytest.raises(KeyError):
        sparse.select(["im 9 ü"])


def test_true_pixels_are_the_sums_of_the_rows() -> None:
    sparse, matrices = _sparse()
    np.testing.assert_array_equal(sparse.true_pixels(), np.stack(matrices).sum(axis=2))
    assert SparseConfusions.from_matrices(4, []).true_pixels().shape == (0, 4)


def test_equal_counts_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        write_confusions(tmp_path / name, {"x": _sparse()[0]})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_damaged_counts_are_named(tmp_path: Path) -> None:
    write_confusions(tmp_path / "c.npz", {"x": _sparse()[0]})
    (tmp_path / "c.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:-40])
    with pytest.raises(DamagedFileError, match=r"c\.npz does not hold readable confusion counts"):
        read_confusions(tmp_path / "c.npz")


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), max_size=6), st.integers(0, 6))
def test_merge_is_a_single_pass(rows: list[list[int]], cut: int) -> None:
    pairs = [(str(number), np.array(row, np.int64).reshape(2, 2)) for number, row in enumerate(rows)]
    whole = SparseConfusions.from_matrices(2, pairs)
    parts = [SparseConfusions.from_matrices(2, part) for part in (pairs[:cut], pairs[cut:])]
    merged = SparseConfusions.merge(parts)
    assert merged.ids == whole.ids
    for name in ("image", "cell", "count"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))
        assert getattr(merged, name).dtype == getattr(whole, name).dtype


# ---------------------------------------------------------------------------------------------------------------------
# The threshold rule and the sweep
# ---------------------------------------------------------------------------------------------------------------------


def _record(seed: int, labels: tuple[int, ...], size: tuple[int, int] = (13, 18)) -> AttentionRecord:
    rng = np.random.default_rng(seed)
    maps = rng.integers(0, 256, (len(labels), 4, 5)).astype(np.uint8)
    return AttentionRecord("x", size, labels, maps, np.ones(len(labels), np.float32))


def test_sweep_equals_brute_force_at_every_threshold() -> None:
    rng = np.random.default_rng(0)
    records = [_record(1, (0, 2)), _record(2, (1,)), _record(3, ())]
    truths = [rng.choice([0, 1, 2, 3, 255], record.size).astype(np.uint8) for record in records]
    sweep = ThresholdSweep(4)
    for record, truth in zip(records, truths, strict=True):
        winner, value = strongest_map(upsample_maps(record))
        sweep.add(truth, to_class_indices(winner + (1 if record.labels else 0), record.labels), value)
    matrices = sweep.matrices()
    for threshold in [step / 100 for step in range(100)] + [k / 255 for k in range(255)]:
        config = SeedConfig(threshold=threshold)
        expected = sum(
            confusion_matrix(truth, initial_mask(record, config), 4)
            for record, truth in zip(records, truths, strict=True)
        )
        np.testing.assert_array_equal(matrices[cut_byte(threshold)], expected)


def test_initial_mask_by_hand() -> None:
    """At the image's own size nothing is interpolated: 102 / 255 = 0.4 is not above 0.4, and the stronger map wins."""
    maps = np.array([[[255, 102, 103]], [[0, 0, 200]]], np.uint8)
    record = AttentionRecord("x", (1, 3), (1, 4), maps, np.ones(2, np.float32))
    np.testing.assert_array_equal(initial_mask(record, SeedConfig(threshold=0.4)), [[2, 0, 5]])


def test_maps_grow_smoothly_to_the_image() -> None:
    record = AttentionRecord("x", (2, 8), (0,), np.array([[[0, 200]]], np.uint8), np.ones(1, np.float32))
    np.testing.assert_array_equal(upsample_maps(record)[0, 0], [0, 0, 25, 75, 125, 175, 200, 200])


def test_an_image_without_evidence_is_background() -> None:
    record = AttentionRecord("x", (4, 6), (3,), np.zeros((1, 2, 2), np.uint8), np.zeros(1, np.float32))
    assert not initial_mask(record, SeedConfig(threshold=0)).any()
    assert not initial_mask(_record(0, ()), SeedConfig()).any()


def test_confident_rule_by_hand() -> None:
    maps = np.array([[[10, 13, 76, 77]]], np.uint8)
    record = AttentionRecord("x", (1, 4), (0,), maps, np.ones(1, np.float32))
    config = SeedConfig(confident=ConfidentThresholds(foreground_threshold=0.3, background_threshold=0.05))
    np.testing.assert_array_equal(initial_mask(record, config), [[0, 255, 255, 1]])


def test_confident_labels_may_disagree() -> None:
    """After two CRF runs the strict one may see what the loose one does not: foreground stays."""
    strict, loose = np.array([[0, 0, 2, 2]], np.uint8), np.array([[0, 1, 0, 1]], np.uint8)
    np.testing.assert_array_equal(combine_confident(strict, loose), [[0, 255, 2, 2]])


def test_confident_thresholds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"background_threshold \(0.4\) must not exceed foreground_threshold \(0.3\)"):
        ConfidentThresholds(foreground_threshold=0.3, background_threshold=0.4)


@pytest.mark.parametrize("power", [1.0, 4.0, 16.0])
def test_power_background_is_a_threshold(power: float) -> None:
    config = SeedConfig(background="power", background_power=power)
    value = np.arange(256, dtype=np.uint8)[None]
    record = AttentionRecord("x", (1, 256), (0,), value[None], np.ones(1, np.float32))
    foreground = value / 255 > (1 - value / 255) ** power
    np.testing.assert_array_equal(initial_mask(record, config) == 1, foreground)
    level = background_level(config)
    assert level == pytest.approx((1 - level) ** power)


@settings(max_examples=40)
@given(st.floats(0, 0.99), st.sampled_from(["constant", "power"]), st.integers(0, 99))
def test_probabilities_of_maps_agree_with_the_threshold_rule(threshold: float, background: str, seed: int) -> None:
    config = SeedConfig(threshold=threshold, background=background)
    record = _record(seed, (0, 1))
    maps = upsample_maps(record)
    probabilities = map_probabilities(maps, config)
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(
        to_class_indices(probabilities.argmax(0), record.labels), initial_mask(record, config, maps=maps)
    )


def test_counts_whose_packed_bytes_are_damaged_are_named(tmp_path: Path) -> None:
    write_confusions(tmp_path / "c.npz", {"x": _sparse()[0]})
    data = bytearray((tmp_path / "c.npz").read_bytes())
    for position in range(50, 120):
        data[position] = 255
    (tmp_path / "c.npz").write_bytes(bytes(data))
    with pytest.raises(DamagedFileError, match=r"c\.npz does not hold readable confusion counts"):
        read_confusions(tmp_path / "c.npz")
