"""Four tiny images with pseudo-masks, and a segmenter's training on them in well under a second."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from stages.contracts import (
    ClassList,
    ImageIndex,
    ImageRecord,
    Runtime,
    SilentProgress,
    write_index_mask,
    write_json,
)
from stages.data.transforms import AugmentConfig
from stages.train_segmenter import TrainSegmenterConfig, train_segmenter
from stages.training.config import TrainingConfig

SIZE = (40, 48)
NAMES = ("red", "green")


def paint(label: int, number: int):
    """A square of the class's colour on grey noise, and its mask."""
    random = np.random.default_rng(number)
    image = random.integers(90, 120, (*SIZE, 3), dtype=np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    top, left = random.integers(0, 16, 2)
    mask[top : top + 22, left : left + 22] = label + 1
    image[mask > 0, label] = 250
    return image, mask


def write_folders(tmp_path):
    """prepare_data's and make_masks' output for four training images."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    records = []
    for number in range(4):
        label = number % 2
        image, mask = paint(label, number)
        name = f"img{number}"
        (images / "data").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(images / "data" / f"{name}.png")
        write_index_mask(images / "data" / f"{name}-mask.png", mask)
        unsure = mask.copy()
        unsure[:2] = 255
        write_index_mask(masks / "masks" / f"{name}.png", unsure)
        records.append(
            ImageRecord(id=name, image=f"{name}.png", size=SIZE, labels=(label,), full_mask=f"{name}-mask.png")
        )
    index = ImageIndex(
        classes=ClassList(names=NAMES),
        images=tuple(records),
        splits={"train": tuple(r.id for r in records)},
        mask_values={0: 0, 1: 1, 2: 2, 255: 255},
    )
    write_json(images / "index.json", index.model_dump(mode="json"))
    return images, masks


def make_config(steps=3, **changes) -> TrainSegmenterConfig:
    values = {
        "init": "random",
        "net": {"name": "largefov", "backbone": {"name": "small", "output_stride": 4}, "channels": 16},
        "augment": AugmentConfig(crop_px=32, scale=(0.8, 1.2)),
        "training": TrainingConfig(steps=steps, batch_size=2, learning_rate=0.01),
    }
    return TrainSegmenterConfig.model_validate({**values, **changes})


def run(folders, out, config=None, *, progress=None, workers=0, **changes):
    images, masks = folders
    arguments = {
        "images": images,
        "masks": masks,
        "classifier": None,
        "data_root": None,
        "weights": {},
        "seed": 1,
        "out": out,
        "progress": progress or SilentProgress(),
        "runtime": Runtime(device="cpu", threads=1, workers=workers, checkpoint_every_s=0),
    }
    return train_segmenter(config or make_config(), **{**arguments, **changes})


def digests(folder):
    """sha256 of every file below, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
