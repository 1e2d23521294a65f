"""Work is counted from configs and image lists; every number here was computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pipeline.engine.workload import DataFacts, Work, count_work, facts_of_index, facts_of_listing

from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.plan import plan_run
from stages.contracts import ClassList, ImageIndex, ImageRecord, write_json
from stages.data.records import DataListing, ListedImage

DATA = DataFacts(
    num_train=1000,
    num_holdout=50,
    num_full_masks=300,
    num_val=200,
    num_scored=160,
    num_test=40,
    num_labels=1500,
    mean_px=500 * 400.0,
    side_ratio=1.25,
)


def count(stage: str, tmp_path: Path, *overrides: str, data: DataFacts = DATA) -> Work:
    run = load_model(RunConfig, find_config("demo"), ["data.num_train=4", "data.num_val=2", *overrides])
    plan = plan_run(run, tmp_path / "digests.json")
    work = count_work(plan.contents[stage], plan.contents, data)
    assert work is not None
    return work


def test_trainings_are_steps_times_batch_times_crop_area(tmp_path: Path) -> None:
    classifier = count("train_classifier", tmp_path)
    # 950 images in batches of 16 are 59 whole batches; 16 epochs of them
    assert (classifier.count, classifier.unit, classifier.cost) == (944, "steps", 944 * 16 * 96 * 96)
    assert classifier.path == ("small", 4, "gap", "cam", "fp32")
    segmenter = count("train_segmenter", tmp_path)
    assert (segmenter.count, segmenter.path) == (12 * 62, ("largefov", "small", 4, "fp32"))
    full = count("train_segmenter", tmp_path, "train_segmenter.supervision=full")
    assert full.count == 12 * 18, "300 images have a true mask"
    deeplab = "train_segmenter.net={name: deeplabv3, encoder: resnet50, pretrained: false}"
    other = count("train_segmenter", tmp_path, deeplab, "train_segmenter.init=random")
    assert other.path == ("deeplabv3", "resnet50", 16, "fp32")


def test_rounds_are_trainings_and_labellings(tmp_path: Path) -> None:
    first = count("train_segmenter", tmp_path)
    two = ("train_segmenter.rounds=2", "train_segmenter.retraining={scales: [0.5, 1], flip: true}")
    found = count("train_segmenter", tmp_path, *two)
    assert (found.count, found.path) == (3 * first.count, first.path)
    # 1000 images of 200,000 px at 0.25 + 1 of their area, mirrored too, by forward passes: a third of a step
    assert found.cost == pytest.approx(3 * first.cost + 2 * 1000 * 2.5 * 200_000 / 3)
    assert found.disk_bytes - first.disk_bytes > 2 * 1000 * (10_000 + 4096), "the masks of both, and weights"
    squashed = count(
        "train_segmenter", tmp_path, *two, "train_segmenter.augment={crop_px: 96, scale: [1, 1], resize: squash}"
    )
    # shorter side 96, longer 120
    assert squashed.cost == pytest.approx(3 * first.cost + 2 * 1000 * 2.5 * 96 * 120 / 3)
    refined = count("train_segmenter", tmp_path, *two, "train_segmenter.retraining.crf={backend: torch}")
    assert refined.path == (*first.path, "torch")
    assert count("train_segmenter", tmp_path, *two, data=replace(DATA, mean_px=None)).cost is None


def test_attention_is_images_times_pixels_of_their_views(tmp_path: Path) -> None:
    work = count("make_attention", tmp_path)
    # scales 0.5, 1, 1.5: 0.25 + 1 + 2.25 = 3.5, each mirrored too
    assert (work.count, work.unit, work.cost) == (1000, "images", 1000 * 7 * 200_000)
    # a byte for each of 200,000 / 16 cells of 1500 maps, and 1 KiB of headers for each image
    assert work.disk_bytes == 1500 * 12_500 + 1000 * 1024
    # a shorter side of 100 px makes the images 100 x 125 on the average
    resized = count("make_attention", tmp_path, "make_attention.short_side_px=100", "make_attention.flip=false")
    assert resized.cost == 1000 * 3.5 * 12_500
    assert resized.disk_bytes == work.disk_bytes


def test_masks_are_images_times_pixels(tmp_path: Path) -> None:
    work = count("make_masks", tmp_path)
    # 0.05 bytes per pixel, a block of 4 KiB for each file, 512 bytes of statistics
    assert (work.count, work.cost, work.disk_bytes) == (1000, 2e8, 1000 * (2 * (10_000 + 4096) + 512)), "with a step"
    assert work.path[0] == "crf"
    soft = count("make_masks", tmp_path, "make_masks.soft=true", "make_masks.refine=none")
    assert soft.disk_bytes == 1000 * (10_000 + 30_000 + 2 * 4096 + 512)
    assert count("make_masks", tmp_path, "make_masks.refine=none").path == ("none", None, "labels", False)


@pytest.mark.parametrize(("refine", "num_masks"), [("none", 1), ("crf", 2), ("[par, crf]", 3)])
def test_masks_between_the_steps_are_kept(tmp_path: Path, refine: str, num_masks: int) -> None:
    found = count("make_masks", tmp_path, f"make_masks.refine={refine}")
    assert found.disk_bytes == 1000 * (num_masks * (10_000 + 4096) + 512)


def test_evaluate_sees_only_scored_images_at_several_scales(tmp_path: Path) -> None:
    # scales 0.75, 1, 1.25: 0.5625 + 1 + 1.5625 = 3.125, mirrored 6.25; 40 of 200 have no mask
    work = count("evaluate", tmp_path)
    assert (work.count, work.cost) == (200, (40 + 160 * 6.25) * 200_000)
    single = count("evaluate", tmp_path, "evaluate.multi_scale=false")
    assert single.cost == 200 * 200_000
    weak, full = work.path[-1], count("evaluate", tmp_path, "train_segmenter.supervision=full").path[-1]
    assert (weak, full) == (True, False), "with full supervision no training image is scored"


def test_without_sizes_only_what_they_decide_is_unknown(tmp_path: Path) -> None:
    facts = DataFacts(9, 0, 0, 3, 3, 0, 9, mean_px=None)
    assert count("make_attention", tmp_path, data=facts).cost is None
    assert count("make_attention", tmp_path, data=facts).disk_bytes is None
    assert count("make_masks", tmp_path, data=facts).cost is None
    assert count("train_classifier", tmp_path, data=facts).cost is not None
    # 30 x 40 pixels: a photograph's shape is assumed
    resized = count("make_attention", tmp_path, "make_attention.short_side_px=30", data=facts)
    assert resized.cost == pytest.approx(9 * 7 * 1200)


def test_facts_of_an_index(tmp_path: Path) -> None:
    images = (
        ImageRecord(id="a", image="a.jpg", size=(10, 20), labels=(0, 1), full_mask="a.png"),
        ImageRecord(id="b", image="b.jpg", size=(40, 30), labels=(1,)),
        ImageRecord(id="c", image="c.jpg", size=(10, 10), mask="c.png"),
        ImageRecord(id="d", image="d.jpg", size=(10, 10)),
    )
    index = ImageIndex(
        classes=ClassList(names=("auk", "bee")),
        images=images,
        splits={"train": ("a", "b"), "train_score": (), "holdout": ("b",), "val": ("c",), "test": ("d",)},
        mask_values={},
    )
    write_json(tmp_path / "index.json", index.model_dump(mode="json"))
    assert facts_of_index(tmp_path) == DataFacts(
        num_train=2,
        num_holdout=1,
        num_full_masks=1,
        num_val=1,
        num_scored=1,
        num_test=1,
        num_labels=3,
        mean_px=(200 + 1200 + 100 + 100) / 4,
        side_ratio=(2 + 4 / 3 + 1 + 1) / 4,
    )


def test_facts_of_a_listing_keep_the_hold_out_only_where_val_has_no_labels(tmp_path: Path) -> None:
    def facts(val_labels: tuple[int, ...] | None, data: dict[str, Any]) -> DataFacts:
        train = [ListedImage(f"t{number}", "x.jpg", (0,)) for number in range(4)]
        splits = {"train": tuple(image.id for image in train), "train_score": (), "val": ("v",)}
        images = (*train, ListedImage("v", "v.jpg", val_labels))
        listing = DataListing(tmp_path, ClassList(names=("auk",)), images, splits, {})
        return facts_of_listing(listing, {"config": {"holdout_ratio": 0.05}, "data": data})

    assert facts((0,), {"format": "voc"}) == DataFacts(4, 0, 0, 1, 0, 0, 4, None)
    assert facts(None, {"format": "voc"}).num_holdout == 1, "at least one is kept"
    assert facts((0,), {"format": "synthetic", "size_px": 64}).mean_px == 64 * 64


def test_facts_of_a_listing_open_some_images_for_their_size(tmp_path: Path) -> None:
    sizes = [(40, 20)] * 32 + [(20, 20)] * 32  # width, height
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"t{number}.jpg")
    (tmp_path / "t0.jpg").write_bytes(b"no image")
    train = tuple(ListedImage(f"t{number}", f"t{number}.jpg", (0,)) for number in range(len(sizes)))
    splits = {"train": tuple(image.id for image in train), "train_score": (), "val": ()}
    listing = DataListing(tmp_path, ClassList(names=("auk",)), train, splits, {})
    facts = facts_of_listing(listing, {"config": {"holdout_ratio": 0.0}, "data": {"format": "custom"}})
    assert facts.mean_px == (15 * 800 + 16 * 400) / 31, "every second one, but the first is no image"


def test_maps_that_are_not_kept_take_no_room(tmp_path: Path) -> None:
    assert count("make_attention", tmp_path, "make_attention.keep_maps=false").disk_bytes == 4096


def test_another_head_is_another_path(tmp_path: Path) -> None:
    fc = [
        "train_classifier.backbone={name: vgg16, pretrained: false}",
        "train_classifier.head=fc",
        "train_classifier.method={name: gradcam}",
        "train_segmenter.init=random",
    ]
    assert count("train_classifier", tmp_path, *fc).path == ("vgg16", 8, "fc", "gradcam", "fp32")
    assert count("make_attention", tmp_path, *fc).path == ("vgg16", 8, "fc", "gradcam")
    assert count("make_attention", tmp_path).path == ("small", 4, "gap", "cam")
