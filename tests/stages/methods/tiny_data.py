"""A handful of labelled images on disk as prepare_data leaves them; their true masks are named but do not exist."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stages.contracts import ClassList, ImageIndex, ImageRecord, write_json
from stages.methods.cam import CamConfig
from stages.methods.classifier_files import ClassifierDescription, build_classifier, save_classifier
from stages.nets.backbones.config import BackboneConfig

CLASSES = ClassList(names=("red", "green", "blue"))
SIZES = [(24, 40), (40, 24), (33, 47), (24, 40), (40, 40), (24, 40)]
LABELS = [(0,), (1, 2), (0, 1), (2,), (1,), (0, 2)]


def write_tiny_data(
    folder: Path,
    *,
    sizes=SIZES,
    labels=LABELS,
    val=0,
    val_labels=True,
    holdout=0,
) -> Path:
    """Write images with one bright rectangle per label and their index; the last ``val`` images are split val."""
    root = folder / "prepared"
    (root / "data").mkdir(parents=True)
    generator = np.random.default_rng(0)
    records = []
    for number, (size, present) in enumerate(zip(sizes, labels, strict=True)):
        pixels = generator.integers(60, 100, size=(*size, 3), dtype=np.uint8)
        for label in present or ():
            top, left = generator.integers(0, size[0] // 2), generator.integers(0, size[1] // 2)
            pixels[top : top + size[0] // 3, left : left + size[1] // 3, label] = 250
        name = f"image{number}.png"
        Image.fromarray(pixels).save(root / "data" / name)
        known = present if number < len(sizes) - val or val_labels else None
        records.append(
            ImageRecord(
                id=f"image{number}",
                image=name,
                size=size,
                labels=known,
                mask=f"no-such-mask{number}.png",
                full_mask=f"no-such-mask{number}.png",
            )
        )
    ids = [record.id for record in records]
    train, val_ids = ids[: len(ids) - val], ids[len(ids) - val :]
    splits = {"train": train, "train_score": train, "holdout": train[:holdout], "val": val_ids}
    mask_values = {0: 0, 1: 1, 2: 2, 3: 3, 255: 255}
    index = ImageIndex(classes=CLASSES, images=tuple(records), splits=splits, mask_values=mask_values)
    write_json(root / "index.json", index.model_dump(mode="json"))
    return root


def write_tiny_classifier(folder: Path, *, dead_class: int | None = None, change=None) -> Path:
    """Save an untrained small classifier; ``dead_class`` never scores above 0, the others do; ``change`` edits it."""
    torch.manual_seed(1)
    description = ClassifierDescription(backbone=BackboneConfig(name="small"), method=CamConfig(), classes=CLASSES)
    classifier, _ = build_classifier(description, {})
    with torch.no_grad():
        classifier.head.weight.normal_(std=1.0)
        if dead_class is not None:
            classifier.head.weight.abs_()
            classifier.head.weight[dead_class].neg_()
        if change is not None:
            change(classifier)
    save_classifier(folder, description, classifier)
    return folder
