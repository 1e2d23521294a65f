"""A data set of flat-coloured rectangles with its attention maps, small enough to score by hand."""

from pathlib import Path

import numpy as np
from PIL import Image

from stages.contracts import (
    AttentionRecord,
    ClassList,
    ImageIndex,
    ImageRecord,
    write_attention_shard,
    write_index_mask,
    write_json,
)

CLASSES = ("cat", "dog", "bird")
COLOURS = np.array([[90, 90, 90], [220, 30, 30], [30, 200, 40], [40, 60, 230]], np.uint8)
"""Colour of background and of each class."""

TRAIN = {"t0": (0,), "t1": (1,), "t2": (0, 2), "t3": (), "t4": (2,)}
VAL = {"v0": (0,), "v1": (1, 2), "v2": (2,)}


def truth_of(labels: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """One rectangle of full height but for 4 rows for each label, side by side."""
    height, width = size
    mask = np.zeros(size, np.uint8)
    for place, label in enumerate(labels):
        left = 4 + place * width // 2
        mask[4 : height - 4, left : left + width // 4] = label + 1
    return mask


def size_of(image_id: str) -> tuple[int, int]:
    """Two sizes, neither square."""
    return (24, 32) if image_id in {"t0", "t2", "v0", "v2"} else (32, 24)


def attention_of(image_id: str, labels: tuple[int, ...], shrink: int = 0) -> AttentionRecord:
    """Full-size maps: 255 on the object's inner part, 100 on the ``shrink`` columns at its right, 10 elsewhere."""
    truth = truth_of(labels, size_of(image_id))
    maps = np.full((len(labels), *truth.shape), 10, np.uint8)
    for target, label in zip(maps, labels, strict=True):
        target[truth == label + 1] = 255
        columns = np.flatnonzero((truth == label + 1).any(0))
        edge = columns[len(columns) - shrink :]
        target[:, edge] = np.where(truth[:, edge] == label + 1, 100, target[:, edge])
    return AttentionRecord(image_id, truth.shape, labels, maps, np.ones(len(labels), np.float32))


def write_world(root: Path, *, masks: bool = True, shards: int = 2) -> tuple[Path, Path, Path]:
    """Write images, masks, index and attention.

    Returns:
        Output folder of prepare_data, data root, output folder of make_attention.
    """
    data, prepared, attention = root / "data", root / "prepared", root / "attention"
    (data / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for image_id, labels in {**TRAIN, **VAL}.items():
        truth = truth_of(labels, size_of(image_id))
        pixels = np.clip(COLOURS[truth] + rng.integers(-4, 5, (*truth.shape, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(data / "images" / f"{image_id}.png")
        if masks:
            write_index_mask(data / "masks" / f"{image_id}.png", truth)
        mask = f"masks/{image_id}.png" if masks else None
        records.append(
            ImageRecord(id=image_id, image=f"images/{image_id}.png", size=truth.shape, labels=labels, mask=mask)
        )
    index = ImageIndex(
        classes=ClassList(names=CLASSES),
        images=tuple(records),
        splits={"train": tuple(TRAIN), "train_score": tuple(TRAIN) if masks else (), "val": tuple(VAL)},
        mask_values={**{value: value for value in range(4)}, 255: 255},
    )
    write_json(prepared / "index.json", index.model_dump(mode="json"))
    maps = [attention_of(image_id, labels, shrink=2) for image_id, labels in TRAIN.items()]
    step = -(-len(maps) // shards)
    for number, start in enumerate(range(0, len(maps), step)):
        write_attention_shard(attention / "shards" / f"attention-{number:05d}.npz", maps[start : start + step])
    return prepared, data, attention
