"""Small data sets of format custom, drawn: one block on a grey ground in each image, and its mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from stages.contracts import write_index_mask


def draw_set(
    root: Path,
    labels: Sequence[str],
    *,
    values: Sequence[int] | None = None,
    stem: Callable[[int], str] = lambda number: f"p{number:02d}",
    mask_name: Callable[[str], str] = lambda stem: f"{stem}.png",
    size: tuple[int, int] = (24, 32),
) -> Path:
    """Write images, masks and labels.csv.

    Args:
        root: Where to.
        labels: The cell with the labels of each image.
        values: What the object of each mask is; without it there are no masks.
        stem: Number of an image to its name.
        mask_name: Name of an image to that of its mask.
        size: (height, width) in pixels.
    """
    (root / "images").mkdir(parents=True)
    rows = ["image,labels"]
    for number, cell in enumerate(labels):
        pixels = np.full((*size, 3), 120, dtype=np.uint8)
        pixels[8:16, 8:20] = (200, 30 + number, 40)
        Image.fromarray(pixels).save(root / f"images/{stem(number)}.jpg")
        quoted_cell = cell.replace('"', '""')
        rows.append(f'{stem(number)},"{quoted_cell}"')
        if values is not None:
            mask = np.zeros(size, dtype=np.uint8)
            mask[8:16, 8:20] = values[number]
            (root / "masks").mkdir(exist_ok=True)
            write_index_mask(root / "masks" / mask_name(stem(number)), mask)
    (root / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root
