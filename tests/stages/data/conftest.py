"""A small synthetic set on disk, and an example of somebody's own data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.contracts import write_index_mask
from stages.data.adapters.custom import CustomConfig
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.synthetic_images import generate_synthetic

TINY = SyntheticConfig(num_train=6, num_val=3, size_px=64, num_classes=3)


@pytest.fixture(scope="session")
def synthetic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    generate_synthetic(TINY, folder)
    return folder


@pytest.fixture
def broken(synthetic_folder: Path, tmp_path: Path) -> Path:
    """A copy of the synthetic set, for a test to break."""
    return Path(shutil.copytree(synthetic_folder, tmp_path / "copy"))


@pytest.fixture
def as_custom() -> Callable[..., CustomConfig]:
    """How a user points at a synthetic set on disk: as at any data of one's own."""

    def build(folder: Path, **changes: object) -> CustomConfig:
        lists = folder / "ImageSets/Segmentation"
        values = {
            "root": folder,
            "classes": TINY.class_names,
            "images": "JPEGImages",
            "masks": "SegmentationClass",
            "train_list": lists / "train.txt",
            "val_list": lists / "val.txt",
            **changes,
        }
        return CustomConfig.model_validate(values)

    return build


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """An example custom data set: photos of street signs, two of which have a mask."""
    root = tmp_path / "signs"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png", "c 1.jpg", "d.JPEG", "e.jpg"):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(root / "images" / name)
    (root / "labels.csv").write_text(
        "image,labels\na.jpg,stop sign;traffic light\nb,traffic light\nc 1.jpg,stop sign;\nd,\n", encoding="utf-8"
    )
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[5:9, 4:20] = 1
    mask[12:15] = 2
    mask[0] = 255
    for name in ("a", "b"):
        write_index_mask(root / "masks" / f"{name}.png", mask)
    return root


@pytest.fixture
def tiny_voc(tmp_path: Path) -> Path:
    """VOC's layout with four images: train a, b; val c; test d."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    objects = {"a": ("horse", "person"), "b": ("cat",), "c": ("cat", "cat"), "d": ()}
    for name, classes in objects.items():
        Image.fromarray(np.full((12, 10, 3), 90, dtype=np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        parts = "".join(f"<object><name>{c}</name><part><name>head</name></part></object>" for c in classes)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{parts}</annotation>", encoding="utf-8")
    mask = np.zeros((12, 10), dtype=np.uint8)
    mask[2:5] = 13
    mask[6:8] = 15
    mask[8] = 8
    mask[11] = 255
    for name in ("a", "b", "c"):
        write_index_mask(root / "SegmentationClass" / f"{name}.png", mask)
    for name, ids in {"train": "a\nb\n", "val": "c\n", "test": "d\n"}.items():
        (root / "ImageSets/Segmentation" / f"{name}.txt").write_text(ids, encoding="utf-8")
    return root
