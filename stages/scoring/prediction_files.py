"""The files of a prediction: masks that tell what they were made of, overlays, areas.

Reads and writes ``<name>.png`` (palette PNG of class indices), ``overlays/<name>.jpg``, ``areas.csv``.  Torch-free.
Shapes: H W image pixels.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import encode_index_mask, voc_palette, write_atomic
from stages.data.pictures import PictureFile
from stages.scoring.image_scores import PredictOptions

FORMAT = 1
"""Raise when an equal image, model and options give another mask."""

AREAS_FILE = "areas.csv"
OVERLAYS = "overlays"

_ORIGIN = "wsss"
"""PNG text that says what a mask was made of."""

_OVERLAY_PX = 1 << 20
"""Pixels of an overlay that are coloured at once."""

_JPEG_QUALITY = 90
_LONGEST_JPEG_PX = 65_500
"""JPEG ends at 65,535 pixels a side."""


def identify(model_digest: str, options: PredictOptions) -> str:
    """Everything but the image that decides a mask."""
    content = {"format": FORMAT, "model": model_digest, "options": options.model_dump(mode="json")}
    return json.dumps(content, sort_keys=True)


def origin_of(identity: str, data: bytes) -> str:
    """What stands in a mask: the digest of the model, the options and the image's bytes."""
    return hashlib.sha256(identity.encode() + hashlib.sha256(data).digest()).hexdigest()


def mask_path(out: Path, picture: PictureFile) -> Path:
    """Where the mask of ``picture`` belongs."""
    return out / f"{picture.name}.png"


def overlay_path(out: Path, picture: PictureFile) -> Path:
    """Where the overlay of ``picture`` belongs."""
    return out / OVERLAYS / f"{picture.name}.jpg"


def read_own_mask(path: Path, picture: PictureFile, identity: str) -> NDArray[np.uint8] | None:
    """The mask at ``path``, where it is whole and of this image, this model and these options."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            if image.info.get(_ORIGIN) == origin_of(identity, picture.path.read_bytes()):
                return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return None


def overlay_mask(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image with 60 % of its class's colour (VOC's palette) over every pixel that is not background.

    Args:
        image: RGB, uint8 (H, W, 3).
        mask: Class indices, uint8 (H, W).

    Returns:
        RGB, uint8 (H, W, 3).
    """
    mixed = image.copy()
    rows = max(1, _OVERLAY_PX // image.shape[1])
    for top in range(0, len(mask), rows):
        part, is_object = mixed[top : top + rows], mask[top : top + rows] > 0
        colours = voc_palette()[mask[top : top + rows][is_object]].astype(np.uint16)
        part[is_object] = (part[is_object].astype(np.uint16) * 2 + colours * 3) // 5
    return mixed


def write_overlay(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write RGB (H, W, 3) as JPEG; a side that no JPEG can have is shrunk."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((_LONGEST_JPEG_PX, _LONGEST_JPEG_PX))
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    write_atomic(path, buffer.getvalue())


def write_mask(path: Path, mask: NDArray[np.uint8], origin: str) -> None:
    """Write class indices (H, W) as ``write_index_mask`` does, with the text that tells what they were made of."""
    write_atomic(path, encode_index_mask(mask, {_ORIGIN: origin}))


def count_classes(mask: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    """Pixels of each class; Pillow counts without widening every pixel to eight bytes."""
    return np.array(Image.fromarray(mask).histogram()[:num_classes], dtype=np.int64)


def write_areas(
    path: Path, names: Sequence[str], areas: Mapping[str, NDArray[np.int64]], classes: Sequence[str]
) -> None:
    """One line for each image and class in it: ``image,class,pixels,ratio``; an image's ratios sum to 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class", "pixels", "ratio"])
    for name in names:
        total = int(areas[name].sum())
        for class_name, pixels in zip(classes, areas[name].tolist(), strict=True):
            if pixels:
                writer.writerow([name, class_name, pixels, f"{pixels / total:.6f}"])
    write_atomic(path, text.getvalue().encode())
