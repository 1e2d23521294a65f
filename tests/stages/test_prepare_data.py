"""Stage 1: the index, bad images failed or skipped, the hold-out, and no look at a training mask's pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.contracts import SilentProgress, open_image_set, read_index_mask, write_index_mask
from stages.data.adapters.custom import CustomConfig
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.synthetic_images import generate_synthetic
from stages.errors import DataError
from stages.prepare_data import PrepareDataConfig, prepare_data

TINY = SyntheticConfig(num_train=6, num_val=3, size_px=64, num_classes=3)


def prepare(data: CustomConfig | SyntheticConfig, out: Path, *, holdout_ratio: float = 0.3) -> SilentProgress:
    progress = SilentProgress()
    prepare_data(PrepareDataConfig(holdout_ratio=holdout_ratio), data=data, out=out, progress=progress)
    return progress


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generate_synthetic(TINY, tmp_path / "set")
    return tmp_path / "set"


def custom(folder: Path, **changes: object) -> CustomConfig:
    lists = folder / "ImageSets/Segmentation"
    values = {"root": folder, "classes": TINY.class_names, "images": "JPEGImages", "masks": "SegmentationClass"}
    lists_of = {"train_list": lists / "train.txt", "val_list": lists / "val.txt"}
    return CustomConfig.model_validate({**values, **lists_of, **changes})


def test_a_synthetic_set_is_generated_and_indexed(tmp_path: Path) -> None:
    result = prepare_data(PrepareDataConfig(), data=TINY, out=tmp_path, progress=SilentProgress())
    assert result.metrics == {"data.num_train": 6, "data.num_val": 3}
    assert result.mask_supervision == ()
    images = open_image_set(tmp_path, None)
    record = images.index.split("train")[2]
    assert record.size == (64, 64)
    assert images.read_image(record).shape == (64, 64, 3)
    labels = tuple(np.unique(images.read_mask(record))[1:] - 1)
    assert record.labels == labels
    assert images.index.splits["train_score"] == images.index.splits["train"]
    assert images.index.splits["holdout"] == ()  # val has labels


def test_a_second_call_ends_with_the_same_bytes(tmp_path: Path) -> None:
    prepare(TINY, tmp_path)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    first = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (tmp_path / "index.json").unlink()
    (tmp_path / "data/JPEGImages/train_00003.jpg").write_bytes(b"half")
    prepare(TINY, tmp_path)
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == first


def test_sizes_are_height_first(folder: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 64, 3), dtype=np.uint8)).save(folder / "JPEGImages/train_00001.jpg")
    write_index_mask(folder / "SegmentationClass/train_00001.png", np.zeros((40, 64), dtype=np.uint8))
    prepare(custom(folder), tmp_path / "out")
    images = open_image_set(tmp_path / "out", folder)
    assert images.index.record("train_00001").size == (40, 64)
    assert images.read_mask(images.index.record("train_00001")).shape == (40, 64)


def test_damaged_images_fail_with_all_names_and_write_nothing(folder: Path, tmp_path: Path) -> None:
    for name in ("train_00001", "val_00002"):
        path = folder / f"JPEGImages/{name}.jpg"
        path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError) as caught:
        prepare(custom(folder), tmp_path / "out")
    assert [
        str(folder / f"JPEGImages/{name}.jpg") in text
        for name, text in zip(("train_00001", "val_00002"), caught.value.problems, strict=True)
    ] == [True, True]
    assert not (tmp_path / "out/index.json").exists()


def test_skip_leaves_damaged_images_out_and_says_so(folder: Path, tmp_path: Path) -> None:
    (folder / "JPEGImages/train_00001.jpg").write_bytes(b"no image")
    write_index_mask(folder / "SegmentationClass/val_00000.png", np.full((64, 64), 9, dtype=np.uint8))
    write_index_mask(folder / "SegmentationClass/train_00002.png", np.zeros((3, 3), dtype=np.uint8))
    progress = SilentProgress()
    result = prepare_data(
        PrepareDataConfig(), data=custom(folder, on_bad_image="skip"), out=tmp_path / "out", progress=progress
    )
    assert result.metrics == {"data.num_train": 5, "data.num_val": 2, "data.num_skipped": 2}
    index = open_image_set(tmp_path / "out", folder).index
    assert "train_00001" not in {record.id for record in index.images}
    assert index.splits["val"] == ("val_00001", "val_00002")
    assert "train_00002" in index.splits["train"]  # a wrong mask takes no image out of a weakly supervised training
    assert index.record("train_00002").mask is None
    assert "train_00002" not in index.splits["train_score"]
    assert "left out 2 images (data.on_bad_image=skip): 'train_00001', 'val_00000'" in progress.warnings
    assert any("train_00001.jpg: not a readable image" in text for text in progress.warnings)


def test_skip_does_not_leave_an_empty_split(folder: Path, tmp_path: Path) -> None:
    for index in range(3):
        (folder / f"JPEGImages/val_0000{index}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="no readable image is left in val"):
        prepare(custom(folder, on_bad_image="skip"), tmp_path / "out")


def test_no_pixel_of_a_training_mask_decides_anything(folder: Path, tmp_path: Path) -> None:
    prepare(custom(folder), tmp_path / "with")
    for path in (folder / "SegmentationClass").glob("train_*.png"):
        write_index_mask(path, np.full_like(read_index_mask(path), 200))
    prepare(custom(folder), tmp_path / "spoilt")
    assert (tmp_path / "with/index.json").read_bytes() == (tmp_path / "spoilt/index.json").read_bytes()
    for path in (folder / "SegmentationClass").glob("train_*.png"):
        path.unlink()
    prepare(custom(folder), tmp_path / "without")
    index = open_image_set(tmp_path / "without", folder).index
    assert (len(index.splits["train"]), index.splits["train_score"]) == (6, ())


def test_wrong_val_masks_fail(folder: Path, tmp_path: Path) -> None:
    write_index_mask(folder / "SegmentationClass/val_00001.png", np.full((64, 64), 9, dtype=np.uint8))
    with pytest.raises(DataError, match="values 9 are no class"):
        prepare(custom(folder), tmp_path / "out")


def test_the_holdout_stands_in_for_a_val_without_labels(folder: Path, tmp_path: Path) -> None:
    prepare(custom(folder), tmp_path / "labelled")
    assert open_image_set(tmp_path / "labelled", folder).index.splits["holdout"] == ()
    labels = folder / "labels.csv"
    kept = [line for line in labels.read_text(encoding="utf-8").splitlines() if not line.startswith("val_")]
    labels.write_text("\n".join(kept), encoding="utf-8")
    prepare(custom(folder), tmp_path / "out", holdout_ratio=0.05)
    index = open_image_set(tmp_path / "out", folder).index
    assert len(index.splits["holdout"]) == 1
    assert set(index.splits["holdout"]) < set(index.splits["train"])
    assert all(record.labels is None for record in index.split("val"))
    prepare(custom(folder), tmp_path / "none", holdout_ratio=0.0)
    assert open_image_set(tmp_path / "none", folder).index.splits["holdout"] == ()


def test_without_any_masks_the_index_says_so(folder: Path, tmp_path: Path) -> None:
    progress = prepare(custom(folder, masks=None), tmp_path / "out")
    index = open_image_set(tmp_path / "out", folder).index
    assert all(record.mask is None for record in index.images)
    assert any("scores on val will be absent" in text for text in progress.warnings)


def test_problems_of_the_lists_come_before_any_decoding(folder: Path, tmp_path: Path) -> None:
    (folder / "JPEGImages/train_00000.jpg").unlink()
    with pytest.raises(DataError, match="image 'train_00000' has no file"):
        prepare(custom(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_val_masks_without_an_object_are_refused_before_any_training(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "SegmentationClass").glob("val_*.png"):
        write_index_mask(path, np.where(read_index_mask(path) > 0, 255, 0).astype(np.uint8))
    with pytest.raises(DataError, match=r"none of the \d masks has a pixel of a class"):
        prepare(custom(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
