"""Scores by hand on flat-coloured rectangles; continuing, subsets of masks, scales, CRF, errors."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

import stages.scoring.network_pass
import stages.scoring.prediction
from stages.contracts import (
    ClassList,
    ImageIndex,
    ImageRecord,
    ImageSet,
    Runtime,
    SilentProgress,
    open_image_set,
    read_index_mask,
    read_json,
    write_index_mask,
    write_json,
)
from stages.data.transforms import IMAGE_MEAN, IMAGE_STD
from stages.errors import DamagedFileError, DataError, EnvironmentFailure
from stages.evaluate import EvaluateConfig, PseudoMasks, evaluate
from stages.make_masks import MakeMasksConfig, make_masks
from stages.nets.backbones.config import BackboneConfig
from stages.nets.segmenters.build import build_segmenter
from stages.nets.segmenters.config import LargeFovConfig
from stages.nets.segmenters.files import save_segmenter
from stages.ops.crf.dense_crf import CrfConfig
from stages.ops.metrics.boundaries import boundary_iou, count_boundaries
from stages.ops.metrics.confusion import confusion_matrix, mean_iou, read_confusions
from stages.ops.multi_scale import in_fitting_batches, multi_scale_probabilities, network_size, predict_logits
from stages.scoring.network_pass import refine_prediction
from tests.stages.tiny_masks import CLASSES, COLOURS, TRAIN, VAL, size_of, truth_of, write_world

ONE = Runtime(processes=1, device="cpu", workers=0)
SINGLE = EvaluateConfig(multi_scale=False)
SMALL_CRF = CrfConfig(bilateral_sxy_px=20, bilateral_srgb=10, iterations=3)


@pytest.fixture
def see_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a network see the tiny images at their own sizes."""
    monkeypatch.setattr("stages.ops.multi_scale.LEAST_INPUT_PX", 8)


class ColourNet(nn.Module):
    """Knows each class by its colour; takes birds (3) for dogs (2) where it is told to."""

    def __init__(self, *, confuse: bool) -> None:
        super().__init__()
        mean, std = np.array(IMAGE_MEAN), np.array(IMAGE_STD)
        colours = torch.from_numpy((COLOURS / 255 - mean) / std).float()
        self.register_buffer("colours", colours.view(1, 4, 3, 1, 1))
        self.confuse = confuse
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        logits = -10 * (images[:, None] - self.colours).square().sum(2)
        if self.confuse:
            logits[:, 2] = torch.maximum(logits[:, 2], logits[:, 3])
            logits[:, 3] = -1000
        return logits


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved, untrained, real segmenter."""
    folder = tmp_path_factory.mktemp("segmenter")
    config = LargeFovConfig(backbone=BackboneConfig(name="small", output_stride=4), channels=8)
    torch.manual_seed(0)
    save_segmenter(folder, config, build_segmenter(config, 4, init="random", weights={}), CLASSES)
    return folder


@pytest.fixture
def use_colours(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ColourNet]:
    """Put a ColourNet in the place of the trained net."""

    def use(*, confuse: bool = False) -> ColourNet:
        net = ColourNet(confuse=confuse)
        monkeypatch.setattr(stages.scoring.prediction, "load_segmenter", lambda folder, device: net)
        return net

    return use


class World:
    """The tiny data set with pseudo-masks cut at one threshold."""

    def __init__(self, root: Path, segmenter: Path, *, threshold: float = 0.3, masks: bool = True) -> None:
        self.images, self.data, self.attention = write_world(root, masks=masks)
        self.masks, self.segmenter, self.out = root / "made", segmenter, root / "out"
        self.progress = SilentProgress()
        self.made = MakeMasksConfig(threshold=threshold, refine="none")
        make_masks(
            self.made, images=self.images, attention=self.attention, data_root=self.data, out=self.masks,
            progress=self.progress, runtime=ONE,
        )  # fmt: skip

    def evaluate(
        self,
        config: EvaluateConfig = SINGLE,
        *,
        weak: bool = True,
        made: MakeMasksConfig | None = None,
        exclude: frozenset[str] = frozenset(),
        runtime: Runtime = ONE,
    ) -> dict[str, Any]:
        pseudo_masks = PseudoMasks(self.attention, self.masks, made or self.made, exclude)
        return evaluate(
            config, images=self.images, data_root=self.data, segmenter=self.segmenter,
            pseudo_masks=pseudo_masks if weak else None, out=self.out, progress=self.progress, runtime=runtime,
        ).metrics  # fmt: skip

    def truth(self, image_id: str) -> np.ndarray:
        images = open_image_set(self.images, self.data)
        return images.read_mask(images.index.record(image_id))

    def rewrite_index(self, change: Callable[[dict], None]) -> None:
        index = read_json(self.images / "index.json")
        change(index)
        write_json(self.images / "index.json", index)


HALF = (3168 / (3168 + 192) + 192 / 256 + 96 / 144 + 192 / 272) / 4
"""mIoU where every object of the training images lacks two columns: background, cat, dog, bird."""


def _is_about_outlines_or_doubt(metric: str) -> bool:
    return metric.endswith(("_low", "_high")) or "boundary" in metric or "trimap" in metric


def test_outlines_are_scored_and_every_mean_has_its_interval(
    tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet], see_small: None
) -> None:
    use_colours(confuse=True)
    world = World(tmp_path, segmenter, threshold=0.5)
    metrics = world.evaluate(EvaluateConfig(scales=(0.5, 1.0)))
    means = ["segmenter.miou", "segmenter.miou_ms", "segmenter.boundary_iou", "segmenter.boundary_iou_ms"]
    means += [f"segmenter.trimap_miou_{width}px" for width in (2, 5, 10, 20)]
    means += ["attention.miou", "masks.miou", "masks.miou_before_crf", "masks.miou_labelled"]
    for mean in means:
        assert 0 <= metrics[f"{mean}_low"] <= metrics[mean] <= metrics[f"{mean}_high"] <= 1, mean
    limits = {name for name in metrics if name.endswith(("_low", "_high"))}
    assert limits == {f"{mean}_{end}" for mean in means for end in ("low", "high")}
    assert metrics["segmenter.miou_low"] < metrics["segmenter.miou_high"], "the images differ"

    outlines = read_confusions(world.out / "boundaries.npz")
    assert {thing.removeprefix("segmenter") for thing in outlines} == {
        "_boundary", "_ms_boundary", "_trimap_2px", "_trimap_5px", "_trimap_10px", "_trimap_20px"
    }  # fmt: skip
    expected = sum(count_boundaries(truth_of(VAL[i], size_of(i)), _mistake(i), 4)["_boundary"] for i in VAL)
    np.testing.assert_array_equal(outlines["segmenter_boundary"].total(), expected)
    assert metrics["segmenter.boundary_iou"] == pytest.approx(np.nanmean(boundary_iou(expected)))
    assert not set(outlines) & set(read_confusions(world.out / "confusions.npz"))


def _mistake(image_id: str) -> np.ndarray:
    """What a net that takes birds for dogs makes of an image of val."""
    truth = truth_of(VAL[image_id], size_of(image_id))
    return np.where(truth == 3, np.uint8(2), truth)


def test_segmenter_scores_by_hand(tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet]) -> None:
    use_colours(confuse=True)
    world = World(tmp_path, segmenter)
    metrics = world.evaluate(weak=False)
    iou = {"background": 1.0, "cat": 1.0, "dog": 144 / (144 + 144 + 128), "bird": 0.0}
    assert {name: value for name, value in metrics.items() if not _is_about_outlines_or_doubt(name)} == {
        "segmenter.miou": pytest.approx(sum(iou.values()) / 4),
        "segmenter.iou": pytest.approx(iou),
        "segmenter.pixel_accuracy": pytest.approx(1 - (144 + 128) / (3 * 768)),
    }
    assert read_json(world.out / "metrics.json") == metrics
    prediction = read_index_mask(world.out / "predictions" / "v1.png")
    truth = truth_of((1, 2), size_of("v1"))
    np.testing.assert_array_equal(prediction, np.where(truth == 3, 2, truth))
    with Image.open(world.out / "predictions" / "v1.png") as image:
        assert image.mode == "P"
    stored = read_confusions(world.out / "confusions.npz")["segmenter"]
    assert stored.ids == tuple(VAL), "in the order of the list, whatever the batches were"
    assert mean_iou(stored.total()) == metrics["segmenter.miou"]
    assert mean_iou(stored.total({"v0"})) == 1
    assert not (world.out / "partial").exists()


def test_training_scores_by_hand(tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet]) -> None:
    use_colours()
    world = World(tmp_path, segmenter, threshold=0.5)
    metrics = world.evaluate()
    assert metrics["attention.miou"] == pytest.approx(HALF)
    assert metrics["masks.miou"] == metrics["masks.miou_labelled"] == metrics["masks.miou_before_crf"]
    assert metrics["masks.miou"] == pytest.approx(HALF)
    assert metrics["masks.coverage"] == 1
    assert metrics["attention.miou_oracle"] == 1
    assert metrics["attention.threshold_oracle"] == 10 / 255, "the lowest cut that drops the background's 10"
    sweep = read_json(world.out / "sweep.json")
    assert (sweep["configured"], sweep["oracle"], sweep["split"], sweep["images"]) == (0.5, 10 / 255, "train_score", 5)
    assert sweep["thresholds"][::50] == [0, 0.5, 1]
    assert sweep["miou"][39] == 1
    assert sweep["miou"][40] == pytest.approx(HALF)
    assert sweep["miou"][100] == pytest.approx(3168 / 3840 / 4)
    assert set(read_confusions(world.out / "confusions.npz")) == {
        "attention", "masks", "masks_before_crf", "masks_labelled", "segmenter"
    }  # fmt: skip
    assert world.progress.warnings == []


def test_worse_masks_are_reported(tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet]) -> None:
    use_colours()
    world = World(tmp_path, segmenter, threshold=0.5)
    metrics = world.evaluate(made=MakeMasksConfig(threshold=0.3, refine="none"))
    assert metrics["masks.miou_before_crf"] == 1
    assert f"100.0% mIoU before, {HALF:.1%} after" in world.progress.warnings[0]


def test_unsure_pixels_are_background_in_one_score_and_absent_in_the_other(
    tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet]
) -> None:
    use_colours()
    world = World(tmp_path, segmenter)
    for image_id, labels in TRAIN.items():
        mask = truth_of(labels, size_of(image_id))
        mask[:, : mask.shape[1] // 2][mask[:, : mask.shape[1] // 2] == 1] = 255
        from stages.contracts import write_index_mask

        write_index_mask(world.masks / "masks" / f"{image_id}.png", mask)
    metrics = world.evaluate()
    assert metrics["masks.miou_labelled"] == pytest.approx((1 + 1 + 1) / 3), "no cat is left to count"
    assert metrics["masks.miou"] == pytest.approx((3168 / (3168 + 256) + 0 + 1 + 1) / 4)
    assert metrics["masks.coverage"] == pytest.approx(1 - 256 / 3840)


def test_images_whose_masks_were_trained_on_do_not_count(
    tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet]
) -> None:
    use_colours()
    world = World(tmp_path, segmenter, threshold=0.5)
    metrics = world.evaluate(exclude=frozenset({"t0", "t2", "t3", "t4"}))
    stored = read_confusions(world.out / "confusions.npz")
    assert stored["masks"].ids == stored["attention"].ids == ("t1",)
    assert metrics["masks.miou"] == pytest.approx((624 / (624 + 48) + 96 / 144) / 2)


def test_no_training_mask_means_no_training_score(
    tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet]
) -> None:
    use_colours()
    world = World(tmp_path, segmenter, masks=False)
    assert world.evaluate() == {}
    assert sorted(path.stem for path in (world.out / "predictions").iterdir()) == sorted(VAL)
    assert not (world.out / "sweep.json").exists()


def test_val_may_have_masks_for_some_images_and_test_for_none(
    tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet], see_small: None
) -> None:
    net = use_colours(confuse=True)
    world = World(tmp_path, segmenter)

    def change(index: dict) -> None:
        index["splits"] |= {"val": ["v0", "v1"], "test": ["v2"]}
        for record in index["images"]:
            record["mask"] = None if record["id"] in ("v1", "v2") else record["mask"]

    world.rewrite_index(change)
    said: list[str] = []
    world.progress.info = said.append
    metrics = world.evaluate(EvaluateConfig(splits=("val", "test")), weak=False)
    assert metrics["segmenter.iou"] == {"background": 1.0, "cat": 1.0}
    assert sorted(path.stem for path in (world.out / "predictions").iterdir()) == sorted(VAL)
    assert said == [
        "val: 1 of 2 images are predicted without a score (no true mask)",
        "test: 1 of 1 images are predicted without a score (no true mask)",
    ]
    assert {shape[-2:] for shape in net.seen if shape[-1] == 24 and shape[-2] == 32} == {(32, 24)}
    assert sum(shape[0] for shape in net.seen if shape[-2:] == (32, 24)) == 1, "an unscored image needs one scale"


def test_test_images_with_masks_are_scored_apart_from_val(
    tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet], see_small: None
) -> None:
    use_colours(confuse=True)
    world = World(tmp_path, segmenter)
    before = world.evaluate(EvaluateConfig(scales=(1.0,)), weak=False)
    val = read_confusions(world.out / "confusions.npz")
    assert not [name for name in before if name.startswith("segmenter_test")]
    shutil.rmtree(world.out)

    world.rewrite_index(lambda index: index["splits"].update(val=["v0"], test=["v1", "v2"]))
    metrics = world.evaluate(EvaluateConfig(scales=(1.0,), splits=("val", "test")), weak=False)
    assert metrics["segmenter.iou"] == {"background": 1.0, "cat": 1.0}
    assert metrics["segmenter_test.iou"] == {
        "background": 1.0,
        "dog": pytest.approx(144 / (144 + 144 + 128)),
        "bird": 0.0,
    }
    assert metrics["segmenter_test.miou"] == pytest.approx((1 + 144 / 416 + 0) / 3)
    assert metrics["segmenter_test.miou_ms"] == metrics["segmenter_test.miou"], "one scale of 1 and its mirror image"
    assert metrics["segmenter_test.pixel_accuracy"] == pytest.approx(1 - (144 + 128) / (2 * 768))
    found = read_confusions(world.out / "confusions.npz")
    assert (found["segmenter"].ids, found["segmenter_test"].ids) == (("v0",), ("v1", "v2"))
    np.testing.assert_array_equal(found["segmenter_test"].total(), val["segmenter"].total({"v1", "v2"}))
    shutil.rmtree(world.out)

    alone = world.evaluate(EvaluateConfig(scales=(1.0,), splits=("test",)), weak=False)
    assert alone == {name: value for name, value in metrics.items() if name.startswith("segmenter_test.")}


def test_multi_scale_and_crf_are_scored(
    tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet], see_small: None
) -> None:
    net = use_colours()
    world = World(tmp_path, segmenter)
    config = EvaluateConfig(scales=(0.5, 1.0), crf=True, crf_config=SMALL_CRF)
    metrics = world.evaluate(config, weak=False)
    assert metrics["segmenter.miou"] == 1
    assert 0.6 < metrics["segmenter.miou_ms"] <= 1
    assert metrics["segmenter.miou_ms_crf"] > 0.9
    assert sorted({shape[-2:] for shape in net.seen}) == [(12, 16), (16, 12), (24, 32), (32, 24)]
    shutil.rmtree(world.out)
    assert world.evaluate(config, weak=False, runtime=Runtime(processes=2, device="cpu")) == metrics
    shutil.rmtree(world.out)
    torch_crf = config.model_copy(update={"crf_config": SMALL_CRF.model_copy(update={"backend": "torch"})})
    assert world.evaluate(torch_crf, weak=False)["segmenter.miou_ms_crf"] == metrics["segmenter.miou_ms_crf"]


@pytest.mark.parametrize("kind", ["single", "multi_scale", "multi_scale_crf"])
def test_the_masks_asked_for_are_written_and_change_no_score(
    tmp_path: Path, segmenter: Path, see_small: None, kind: str
) -> None:
    world = World(tmp_path, segmenter)  # an untrained net: each kind of mask differs from the others
    single = EvaluateConfig(scales=(0.5, 1.0), crf=True, crf_config=SMALL_CRF)
    plain = world.evaluate(single, weak=False)
    counts = read_confusions(world.out / "confusions.npz")
    shutil.rmtree(world.out)
    config = EvaluateConfig.model_validate({**single.model_dump(), "predictions": kind})
    assert world.evaluate(config, weak=False) == plain
    alike: set[str] = set(counts)
    for place, image_id in enumerate(counts["segmenter"].ids):
        written = read_index_mask(world.out / "predictions" / f"{image_id}.png")
        found = {
            thing: np.array_equal(confusion_matrix(world.truth(image_id), written, 4), counts[thing].matrix(place))
            for thing in counts
        }
        alike &= {thing for thing, is_same in found.items() if is_same}
    assert alike == {config.written_score}, "the written masks have these counts, and no other masks do"
    files = {path.name: path.read_bytes() for path in (world.out / "predictions").iterdir()}
    shutil.rmtree(world.out)

    def hide_truth(index: dict) -> None:
        index["splits"] |= {"val": ["v0", "v1"], "test": ["v2"]}
        for record in index["images"]:
            record["mask"] = None if record["id"] in ("v1", "v2") else record["mask"]

    world.rewrite_index(hide_truth)
    world.evaluate(config.model_copy(update={"splits": ("val", "test")}), weak=False)
    unscored = {path.name: path.read_bytes() for path in (world.out / "predictions").iterdir()}
    assert unscored == files, "images without a true mask, and those of test, get the same kind"


@pytest.mark.parametrize(
    "config",
    [
        EvaluateConfig(scales=(0.5, 1.0)),
        EvaluateConfig(scales=(0.5, 1.0), crf=True, crf_config=SMALL_CRF, predictions="multi_scale_crf"),
    ],
    ids=lambda config: config.predictions,
)
def test_a_stopped_evaluation_continues_with_the_same_bytes(
    tmp_path: Path,
    segmenter: Path,
    use_colours: Callable[..., ColourNet],
    monkeypatch: pytest.MonkeyPatch,
    config: EvaluateConfig,
) -> None:
    net = use_colours(confuse=True)
    world = World(tmp_path, segmenter, threshold=0.5)
    whole = world.evaluate(config)
    files = {path: path.read_bytes() for path in world.out.rglob("*.*")}
    shutil.rmtree(world.out)

    def stop_after_the_first_batch(task: str, done: int, total: int, **_: object) -> None:
        if (task, done) == ("segmenter", 3):
            raise KeyboardInterrupt

    step, world.progress.step = world.progress.step, stop_after_the_first_batch
    with pytest.raises(KeyboardInterrupt):
        world.evaluate(config)
    kept = sorted(path.name for path in (world.out / "partial").iterdir())
    assert kept == [
        "segmenter-00000.npz", "training-00000.npz", "training-00000.sweep.json", "training-00001.npz",
        "training-00001.sweep.json",
    ]  # fmt: skip
    world.progress.step = step
    net.seen.clear()
    monkeypatch.setattr(
        "stages.scoring.mask_scores.upsample_maps", lambda _: pytest.fail("a finished shard is scored again")
    )
    assert world.evaluate(config) == whole
    assert {path: path.read_bytes() for path in world.out.rglob("*.*")} == files
    assert {shape[0] for shape in net.seen} == {1}, "only the batch that was not finished"


@pytest.mark.parametrize("name", ["segmenter-00000.npz", "training-00000.npz", "training-00001.sweep.json"])
def test_damaged_counts_are_counted_again(
    tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    use_colours(confuse=True)
    world = World(tmp_path, segmenter, threshold=0.5)
    with monkeypatch.context() as patch:
        patch.setattr("stages.evaluate.shutil.rmtree", lambda *_, **__: None)
        whole = world.evaluate()
    files = {path: path.read_bytes() for path in world.out.rglob("*.*") if path.parent.name != "partial"}
    damaged = world.out / "partial" / name
    damaged.write_bytes(damaged.read_bytes()[:30])
    assert world.evaluate() == whole
    assert {path: path.read_bytes() for path in world.out.rglob("*.*")} == files
    assert any(str(damaged) in text for text in world.progress.warnings) == name.startswith("segmenter")


def test_processes_do_not_change_the_training_scores(
    tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet]
) -> None:
    use_colours()
    world = World(tmp_path, segmenter, threshold=0.5)
    one = world.evaluate()
    first = (world.out / "confusions.npz").read_bytes()
    shutil.rmtree(world.out)
    assert world.evaluate(runtime=Runtime(processes=2, device="cpu")) == one
    assert (world.out / "confusions.npz").read_bytes() == first


def test_a_real_segmenter_is_loaded_and_predicts(tmp_path: Path, segmenter: Path) -> None:
    world = World(tmp_path, segmenter)
    metrics = world.evaluate(EvaluateConfig(scales=(0.5, 1.0), short_side_px=40), weak=False)
    assert 0 <= metrics["segmenter.miou"] <= 1
    assert read_index_mask(world.out / "predictions" / "v0.png").shape == size_of("v0")


def test_an_image_that_the_device_does_not_hold_is_named_with_what_helps(
    tmp_path: Path, segmenter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr("stages.ops.multi_scale.predict_logits", refuse)
    with pytest.raises(EnvironmentFailure, match=r"cpu does not hold one image of \d+ × \d+ pixels; .*short_side_px"):
        World(tmp_path, segmenter).evaluate(weak=False)


def test_other_classes_are_refused(tmp_path: Path, segmenter: Path) -> None:
    world = World(tmp_path, segmenter)
    world.rewrite_index(lambda index: index["classes"].update(names=["cat", "dog", "cow"]))
    with pytest.raises(DamagedFileError, match="trained on the classes cat, dog, bird; the data has cat, dog, cow"):
        world.evaluate()


def test_a_wrong_true_mask_is_named(tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet]) -> None:
    use_colours()
    world = World(tmp_path, segmenter)
    Image.new("RGB", (32, 24)).save(world.data / "masks" / "v0.png")
    with pytest.raises(DataError, match=r"v0\.png: expected a mask of class indices"):
        world.evaluate()


def test_a_changed_image_is_named(tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet]) -> None:
    use_colours()
    world = World(tmp_path, segmenter)
    Image.new("RGB", (9, 8)).save(world.data / "images" / "v2.png")
    with pytest.raises(DataError, match=r"v2\.png: .*\(24, 32\) pixels .* found \(8, 9\).*run that stage again"):
        world.evaluate()


def test_missing_attention_is_named(tmp_path: Path, segmenter: Path) -> None:
    world = World(tmp_path, segmenter)
    (world.attention / "shards" / "attention-00001.npz").unlink()
    with pytest.raises(DamagedFileError, match="has attention for 3 of 5 scored images"):
        world.evaluate()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"crf": True, "multi_scale": False}, "needs multi_scale: true"),
        ({"scales": (0.5, 0.09)}, r"scales must lie in 0\.1 … 4"),
        (
            {"predictions": "multi_scale", "multi_scale": False},
            "not made with multi_scale: false; set multi_scale: true",
        ),
        ({"predictions": "multi_scale_crf"}, r"not made with crf: false; set crf: true .* or predictions: single"),
        ({"splits": ("val", "val")}, "splits must differ"),
        ({"splits": ("train",)}, "'val' or 'test'"),
    ],
)
def test_wrong_config_is_refused(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        EvaluateConfig.model_validate(wrong)


def test_the_words_for_the_masks() -> None:
    assert EvaluateConfig().describe_predictions() == "one scale, no CRF (scored as segmenter.miou)"
    scales = EvaluateConfig(predictions="multi_scale", scales=(0.5, 1.0))
    text = "mean of scales 0.5, 1, each with its mirror image; no CRF (scored as segmenter.miou_ms)"
    assert scales.describe_predictions() == text
    refined = EvaluateConfig(predictions="multi_scale_crf", crf=True, scales=(1.0,), flip=False)
    text = "mean of scales 1; CRF deeplab_v2_resnet101 (scored as segmenter.miou_ms_crf)"
    assert refined.describe_predictions() == text


def test_no_torch_is_imported() -> None:
    code = "import sys, stages.evaluate as e; e.EvaluateConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# The network's view
# ---------------------------------------------------------------------------------------------------------------------


def test_network_size() -> None:
    assert network_size((375, 500), None) == (375, 500)
    assert network_size((375, 500), None, 0.5) == (188, 250)
    assert network_size((375, 500), 288) == (288, 384)
    assert network_size((500, 375), 100, 1.5) == (200, 150)
    assert network_size((40, 400), None, 0.1) == (32, 40)


class _LeftRight(nn.Module):
    """Scores class 1 by the column: not symmetric, so a forgotten flip shows; quarter resolution."""

    def forward(self, images: Tensor) -> Tensor:
        cells = images[:, :1, ::4, ::4]
        ramp = torch.linspace(-2, 2, cells.shape[-1]).expand_as(cells)
        return torch.cat([torch.zeros_like(ramp), ramp + cells], 1)


def test_multi_scale_is_the_mean_of_softmax_over_scales_and_flips() -> None:
    model, images = _LeftRight(), torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, 2, 16, 24)
    for scale in (0.5, 1.0):
        expected += torch.softmax(predict_logits(model, images, scale=scale), 1) / 4
        expected += torch.softmax(predict_logits(model, images.flip(-1), scale=scale).flip(-1), 1) / 4
    single = predict_logits(model, images)
    for known in (None, single):
        result = multi_scale_probabilities(model, images, scales=(0.5, 1.0), flip=True, single_scale=known)
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(result.sum(1), torch.ones(2, 16, 24))
    with pytest.raises(ValueError, match="at least one scale"):
        multi_scale_probabilities(model, images, scales=(), flip=True)


def test_a_batch_that_does_not_fit_is_halved() -> None:
    sizes: list[int] = []

    def hungry(batch: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return batch * 2, batch + 1

    doubled, raised = in_fitting_batches(hungry, torch.arange(5))
    assert (doubled.tolist(), raised.tolist()) == ([0, 2, 4, 6, 8], [1, 2, 3, 4, 5])
    assert sizes == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        in_fitting_batches(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError), torch.arange(2))


@pytest.mark.parametrize("mask", [None, np.zeros((4, 4), np.uint8)], ids=["unreadable", "size"])
def test_a_damaged_pseudo_mask_is_named(tmp_path: Path, segmenter: Path, mask: np.ndarray | None) -> None:
    world = World(tmp_path, segmenter)
    path = world.masks / "masks" / f"{next(iter(TRAIN))}.png"
    if mask is None:
        path.write_bytes(b"no mask")
    else:
        write_index_mask(path, mask)
    with pytest.raises(DamagedFileError, match=rf"{path.name}: .*; rebuild make_masks"):
        world.evaluate()


def test_large_images_go_through_the_network_alone(
    tmp_path: Path, segmenter: Path, use_colours: Callable[..., ColourNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = use_colours(confuse=True)
    world = World(tmp_path, segmenter)
    together = world.evaluate(weak=False)
    counts = (world.out / "confusions.npz").read_bytes()
    assert max(shape[0] for shape in net.seen) > 1
    shutil.rmtree(world.out)
    net.seen.clear()
    monkeypatch.setattr(stages.scoring.network_pass, "_BATCH_PX", 10)
    assert world.evaluate(weak=False) == together
    assert (world.out / "confusions.npz").read_bytes() == counts
    assert {shape[0] for shape in net.seen} == {1}


def test_the_crf_gets_the_winner_of_every_pixel_of_many_classes() -> None:
    probabilities = np.full((200, 4, 4), 1 / 200, np.float32)
    refined = refine_prediction(np.zeros((4, 4, 3), np.uint8), probabilities, CrfConfig(backend="torch", iterations=1))
    assert refined.shape == (4, 4)


def test_the_last_of_254_classes_has_masks_too(tmp_path: Path) -> None:
    write_index_mask(tmp_path / "mask.png", np.array([[0, 254, 255]], np.uint8))
    record = ImageRecord(id="a", image="a.png", size=(1, 3), mask="mask.png")
    classes = ClassList(names=tuple(f"class {number}" for number in range(254)))
    index = ImageIndex(classes=classes, images=(record,), splits={}, mask_values={v: v for v in range(256)})
    np.testing.assert_array_equal(ImageSet(index, tmp_path).read_mask(record), [[0, 254, 255]])
