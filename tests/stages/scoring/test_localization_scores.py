"""Localisation metrics by hand on given maps; with a real network: continuing, processes, what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import stages.scoring.localization_scores
from stages.contracts import AttentionRecord, Runtime, SilentProgress, read_json, write_index_mask, write_json
from stages.errors import DamagedFileError
from stages.evaluate import EvaluateConfig, evaluate
from stages.scoring.localization_scores import LocalizationConfig, score_localization
from tests.stages.methods.tiny_data import write_tiny_classifier, write_tiny_data

RUNTIME = Runtime(device="cpu", workers=0, threads=1, processes=1)
ONLY = EvaluateConfig(segmentation=False, localization=LocalizationConfig())

SIZES = [(32, 40)] * 5
LABELS = [(0,), (0,), (1,), (0, 2), (2,)]
VAL = ["image1", "image2", "image3", "image4"]
BOXES = {
    "image1": [[0, [8, 8, 23, 23]]],
    "image2": [[1, [0, 0, 7, 7]], [1, [20, 10, 35, 25]]],
    "image3": [[0, [0, 0, 15, 15]]],
}


class Keeper(SilentProgress):
    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.begun: list[tuple[int, int]] = []
        self.counted, self.stop_after = 0, stop_after

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        if not self.begun:
            self.begun.append((total, done))
            return
        self.counted += 1
        assert (total, done) == (self.begun[0][0], self.begun[0][1] + self.counted)
        if self.counted == self.stop_after:
            raise KeyboardInterrupt

    def info(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def _without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here evaluate scores no labels, which ``test_label_scores`` tests."""
    monkeypatch.setattr("stages.scoring.label_scores.score_classifier", lambda *arguments: {})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One training image and four of val; three of these have boxes, and image3 has one for its first label only."""
    root = write_tiny_data(tmp_path, sizes=SIZES, labels=LABELS, val=4)
    return change_records(root, lambda image: image.update(mask=None, boxes=BOXES.get(image["id"])))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_tiny_classifier(tmp_path / "classifier")


def change_records(root: Path, change: Any) -> Path:
    index = read_json(root / "index.json")
    for image in index["images"]:
        if image["id"] in VAL:
            change(image)
    write_json(root / "index.json", index)
    return root


def run(data: Path, trained: Path, out: Path, config: EvaluateConfig = ONLY, **others: Any) -> dict[str, Any]:
    arguments = {"progress": Keeper(), "runtime": RUNTIME, **others}
    result = evaluate(config, images=data, segmenter=None, classifier=trained, data_root=None, out=out, **arguments)
    return result.metrics


def filled(*boxes: tuple[int, int, int, int], value: int = 255, floor: int = 0) -> np.ndarray:
    attention = np.full(SIZES[0], floor, np.uint8)
    for x0, y0, x1, y1 in boxes:
        attention[y0 : y1 + 1, x0 : x1 + 1] = value
    return attention


def give(monkeypatch: pytest.MonkeyPatch, maps: dict[str, list[np.ndarray]], first: dict[str, int]) -> list[tuple]:
    """Put given maps and first labels in the network's place; returns what was asked for."""
    asked: list[tuple] = []

    def records(self: object, batch: list, inputs: object) -> list[AttentionRecord]:
        asked.extend((record.id, record.labels) for record in batch)
        return [
            AttentionRecord(r.id, r.size, r.labels, np.stack(maps[r.id]), np.ones(len(r.labels), np.float32))
            for r in batch
        ]

    def logits(network: object, images: object, records: list, *others: object) -> np.ndarray:
        return np.stack([np.eye(3, dtype=np.float32)[first[record.id]] for record in records])

    monkeypatch.setattr("stages.masks.extraction.AttentionExtractor.records", records)
    monkeypatch.setattr("stages.scoring.label_scores.predict_logits", logits)
    return asked


MAPS = {
    # right everywhere below its peak; a strong background up to 40 % hides the object there
    "image1": [filled((8, 8, 23, 23), floor=102)],
    # the largest contour lies beside, the small one on the smaller of two true boxes
    "image2": [filled((0, 0, 7, 7), (10, 0, 39, 8))],
    # its box ends a pixel later: 17 x 9 pixels, of which 144 are of the true 256: 144 / 265
    "image3": [filled((0, 0, 15, 7))],
}


def test_metrics_by_hand(data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = give(monkeypatch, MAPS, {"image1": 0, "image2": 1, "image3": 2})
    progress = Keeper()
    metrics = run(data, trained, tmp_path / "out", progress=progress)
    assert asked == [("image1", (0,)), ("image2", (1,)), ("image3", (0,))], "image3's second label has no box"
    # at 20 % image1 is one box of the whole image (256 / 1280); image2's largest box is beside; image3 is right
    # from 40 % on image1 is right too; image2's small contour is right at every overlap
    assert metrics == {
        "localization.gt_known_loc": pytest.approx(1 / 3),
        "localization.top1_loc": 0.0,  # image3's first label is another
        "localization.top1_clas": pytest.approx(2 / 3),
        "localization.max_box_acc": pytest.approx(2 / 3),
        "localization.max_box_acc_threshold": 102 / 255,
        "localization.max_box_acc_v2": pytest.approx((1 + 1 + 2 / 3) / 3),
    }
    assert progress.lines == ["localization: 1 of 4 images of val have no true box of a label"]
    assert (progress.begun, progress.counted) == ([(4, 0)], 4)
    assert read_json(tmp_path / "out" / "metrics.json") == metrics
    curves = read_json(tmp_path / "out" / "localization.json")
    assert (curves["images"], curves["cases"], curves["precision"]) == (3, 3, [])
    assert curves["box_acc"] == pytest.approx([1 / 3] * 102 + [2 / 3] * 153 + [0])
    assert curves["box_acc_v2"]["0.7"] == pytest.approx([1 / 3] * 102 + [2 / 3] * 153 + [0])
    assert not (tmp_path / "out" / "partial").exists()
    assert not (tmp_path / "out" / "predictions").exists()


def with_masks(data: Path, *, labels: dict[str, list[int] | None]) -> None:
    """True masks in the boxes' place: image1 class 1, image3 class 1 left and class 3 right, void between."""
    masks = {name: np.zeros(SIZES[0], np.uint8) for name in VAL}
    masks["image1"][8:24, 8:24] = 1
    masks["image3"][:16, :16], masks["image3"][:, 16:20], masks["image3"][:, 20:] = 1, 255, 3
    for name, mask in masks.items():
        write_index_mask(data / "data" / f"{name}.png.mask", mask)
    change_records(
        data,
        lambda image: image.update(mask=f"{image['id']}.png.mask", boxes=None, labels=labels.get(image["id"])),
    )


def test_boxes_and_labels_come_from_masks_where_there_are_no_lists(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_masks(data, labels={"image4": [2]})
    asked = give(
        monkeypatch,
        {"image1": [filled((8, 8, 23, 23))], "image3": [filled((0, 0, 15, 27)), filled((0, 0, 15, 15))]},
        {"image1": 0, "image3": 2},
    )
    metrics = run(data, trained, tmp_path / "out")
    assert asked == [("image1", (0,)), ("image3", (0, 2))], "image2 and image4 have no object in their mask"
    assert metrics["localization.gt_known_loc"] == pytest.approx(2 / 3)
    assert metrics["localization.top1_clas"] == pytest.approx(2 / 3), "image3's first label is one of its two cases"
    assert metrics["localization.top1_loc"] == pytest.approx(1 / 3)
    # at 255: 256 of image1, 256 of 448 of image3's class 1, 0 of 256 of class 3 (640 pixels; void left out)
    at_top = (256 + 256) / (256 + 448 + 256)
    objects = 256 + 256 + 640
    seen = 1280 + 2 * (1280 - 128)
    expected = at_top * 512 / objects + objects / seen * (objects - 512) / objects
    assert metrics["localization.pxap"] == pytest.approx(expected)


def test_a_real_network_gives_fractions_and_the_same_bytes_again(data: Path, trained: Path, tmp_path: Path) -> None:
    metrics = run(data, trained, tmp_path / "a")
    assert all(0 <= value <= 1 for value in metrics.values())
    with_flips = EvaluateConfig(segmentation=False, localization=LocalizationConfig(scales=(0.5, 1.0), flip=True))
    run(data, trained, tmp_path / "b", with_flips)
    run(data, trained, tmp_path / "c")
    curves = {name: (tmp_path / name / "localization.json").read_bytes() for name in "abc"}
    assert curves["a"] == curves["c"] != curves["b"]


def test_a_map_without_evidence_has_boxes_with_minmax_alone(data: Path, tmp_path: Path) -> None:
    """A class whose scores are all negative: where they are least so, its object is."""
    trained = write_tiny_classifier(tmp_path / "classifier", dead_class=0)
    whole = [[0, [0, 0, SIZES[0][1] - 1, SIZES[0][0] - 1]]]
    change_records(data, lambda image: image.update(boxes=whole if image["id"] == "image1" else None))
    run(data, trained, tmp_path / "minmax")
    config = EvaluateConfig(segmentation=False, localization=LocalizationConfig(normalisation="max"))
    run(data, trained, tmp_path / "max", config)
    best = {name: read_json(tmp_path / name / "localization.json")["box_acc_v2"]["0.3"] for name in ("minmax", "max")}
    assert any(best["minmax"])
    assert not any(best["max"])


def test_a_stopped_run_continues_and_damaged_counts_are_made_again(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.scoring.localization_scores, "_CHUNK", 1)
    run(data, trained, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(data, trained, out, progress=Keeper(stop_after=3))
    kept = sorted(path.name for path in (out / "partial").iterdir())
    assert kept == ["localization-00000.json", "localization-00001.json"]
    (out / "partial" / kept[0]).write_text("{}")
    progress = Keeper()
    run(data, trained, out, progress=progress)
    assert progress.begun == [(4, 1)]
    assert len(progress.warnings) == 1
    assert "counting these images again" in progress.warnings[0]
    for name in ("metrics.json", "localization.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_processes_change_nothing(data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(data, trained, tmp_path / "one")
    monkeypatch.setattr(stages.scoring.localization_scores, "_IMAGES_PER_PROCESS", 1)
    run(data, trained, tmp_path / "two", runtime=Runtime(device="cpu", workers=2, threads=1, processes=2))
    for name in ("metrics.json", "localization.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_without_a_case_there_is_no_metric(data: Path, trained: Path, tmp_path: Path) -> None:
    change_records(data, lambda image: image.update(boxes=None))
    assert run(data, trained, tmp_path / "out") == {}
    assert not (tmp_path / "out" / "localization.json").exists()


def test_a_classifier_of_other_classes_is_refused(data: Path, trained: Path, tmp_path: Path) -> None:
    index = read_json(data / "index.json")
    index["classes"]["names"] = ["red", "green", "violet"]
    write_json(data / "index.json", index)
    with pytest.raises(DamagedFileError, match="rebuild train_classifier"):
        run(data, trained, tmp_path / "out")


def test_configs_that_measure_nothing_or_the_impossible() -> None:
    with pytest.raises(ValidationError, match="leaves nothing to measure"):
        EvaluateConfig(segmentation=False)
    for wrong in ({"threshold": 1.0}, {"normalisation": "sum"}, {"iou": 0}, {"iou_thresholds": ()}, {"scales": (9.0,)}):
        with pytest.raises(ValidationError):
            LocalizationConfig.model_validate(wrong)


def test_inputs_that_do_not_belong_to_the_config_are_refused(data: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the classifier"):
        evaluate(ONLY, images=data, segmenter=None, data_root=None, out=tmp_path, progress=Keeper(), runtime=RUNTIME)
    with pytest.raises(ValueError, match="segmentation is true"):
        evaluate(
            EvaluateConfig(), images=data, segmenter=None, data_root=None, out=tmp_path, progress=Keeper(),
        )  # fmt: skip


def test_the_function_is_the_one_that_evaluate_calls(data: Path, trained: Path, tmp_path: Path) -> None:
    from stages.contracts import open_image_set

    image_set = open_image_set(data, None)
    metrics = score_localization(
        LocalizationConfig(), image_set, classifier=trained, out=tmp_path, progress=Keeper(), runtime=RUNTIME
    )
    assert set(metrics) == {f"localization.{name}" for name in (
        "top1_loc", "gt_known_loc", "top1_clas", "max_box_acc", "max_box_acc_threshold", "max_box_acc_v2"
    )}  # fmt: skip
