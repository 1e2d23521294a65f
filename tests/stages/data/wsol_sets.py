"""Small data sets in the layouts of CUB-200-2011 and ImageNet, with a bright square as the object of each image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ((250, 40, 40), (40, 60, 250))


def save_square(path: Path, label: int, box: tuple[int, int, int, int], size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(60, 100, (*size, 3), dtype=np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0 : y1 + 1, x0 : x1 + 1] = COLOURS[label]
    Image.fromarray(pixels).save(path)


def square_of(number: int) -> tuple[int, int, int, int]:
    left, top = 4 + number % 5, 2 + number % 3
    return left, top, left + 24, top + 19


def write_cub(root: Path, *, num_train: int = 4, num_test: int = 4, masks: bool = True) -> Path:
    """CUB's layout with two classes in turn; images of 48 × 64 (height × width), masks with votes of 0 … 5 people."""
    size = (48, 64)
    names = ("001.Red_Auk", "002.Blue_Bee")
    lines: dict[str, list[str]] = {
        name: [] for name in ("images", "classes", "image_class_labels", "train_test_split", "bounding_boxes")
    }
    lines["classes"] = [f"{place} {name}" for place, name in enumerate(names, start=1)]
    for number in range(num_train + num_test):
        label, key = number % 2, number + 1
        path = f"{names[label]}/{names[label][4:]}_{key:04d}.png"
        x0, y0, x1, y1 = square_of(number)
        save_square(root / "images" / path, label, (x0, y0, x1, y1), size, number)
        lines["images"].append(f"{key} {path}")
        lines["image_class_labels"].append(f"{key} {label + 1}")
        lines["train_test_split"].append(f"{key} {int(number < num_train)}")
        lines["bounding_boxes"].append(f"{key} {x0:.1f} {y0:.1f} {x1 - x0:.1f} {y1 - y0:.1f}")
        if masks:
            mask = np.zeros(size, dtype=np.uint8)
            mask[y0 - 1 : y1 + 2, x0 - 1 : x1 + 2] = 102  # two of five: not the bird
            mask[y0 : y1 + 1, x0 : x1 + 1] = 153
            mask[y0 + 2 : y1, x0 + 2 : x1] = 255
            (root / "segmentations" / path).parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(mask)
            if number % 3 == 2:  # some of CUB's masks have a channel for transparency
                picture = picture.convert("LA")
            picture.save(root / "segmentations" / path)
    for name, content in lines.items():
        (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
    return root


def write_imagenet(root: Path, *, num_train: int = 4, num_val: int = 4) -> Path:
    """ImageNet's layout with two classes; val flat, with val_labels.txt and localization.txt."""
    names = ("n01", "n02")
    for number in range(num_train):
        path = root / "train" / names[number % 2] / f"{names[number % 2]}_{number}.JPEG"
        save_square(path, number % 2, square_of(number), (40, 50), number)
    labels, boxes = [], []
    for number in range(num_val):
        name = f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        box = square_of(number)
        save_square(root / "val" / name, number % 2, box, (40, 50), 100 + number)
        labels.append(f"val/{name},{names[number % 2]}")
        boxes.append(f"val/{name},{','.join(map(str, box))}")
    (root / "val_labels.txt").write_text("".join(f"{line}\n" for line in labels), encoding="utf-8")
    (root / "localization.txt").write_text("".join(f"{line}\n" for line in boxes), encoding="utf-8")
    return root


ANNOTATION = """<annotation><filename>x</filename><size><width>50</width></size>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
</object>"""


def annotation(*objects: tuple[str, tuple[int, int, int, int]]) -> str:
    return ANNOTATION.format(objects="".join(OBJECT.format(*box, name=name) for name, box in objects))
