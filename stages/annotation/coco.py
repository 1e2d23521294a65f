"""COCO's instances: one JSON file of images, categories and segmentations.

Writes ``annotations.json``: masks as run lengths (``iscrowd: 1``, as COCO marks them), objects as polygons
(``iscrowd: 0``).  Reads any JSON of that format, polygons and run lengths, also uncompressed ones.
Source: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from stages.annotation.files import FileModel, parse_json, read_only_file
from stages.annotation.shapes import (
    AnnotatedImage,
    Annotations,
    Bitmap,
    Drawn,
    Region,
    Size,
    coco_masks,
    decode_rle,
    encode_rle,
    fill_rings,
    values_by_name,
)
from stages.contracts import BACKGROUND_INDEX, ClassList, ImageRecord
from stages.errors import DataError


class _Image(FileModel):
    id: int | str
    file_name: str
    height: int = Field(gt=0)
    width: int = Field(gt=0)


class _Category(FileModel):
    id: int
    name: str


class _Rle(FileModel):
    size: tuple[int, int]
    counts: str | list[int]


class _Annotation(FileModel):
    image_id: int | str
    category_id: int
    segmentation: list[list[float]] | _Rle


class _File(FileModel):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


def write(images: Iterable[tuple[ImageRecord, list[Region]]], classes: ClassList) -> dict[str, bytes]:
    """The file's bytes by name."""
    masks, values = coco_masks(), values_by_name(classes)
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (record, regions) in enumerate(images, start=1):
        height, width = record.size
        listed.append({"id": number, "file_name": record.image, "height": height, "width": width})
        for region in regions:
            rle = encode_rle(region.pixels)
            ring = None if region.ring is None else [[value for point in region.ring for value in point]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": values[region.name],
                    "segmentation": rle if ring is None else ring,
                    "iscrowd": int(ring is None),
                    "area": int(region.pixels.sum()),
                    "bbox": [float(value) for value in masks.toBbox(rle)],
                }
            )
    categories = [
        {"id": value, "name": name, "supercategory": ""} for name, value in values.items() if value != BACKGROUND_INDEX
    ]
    content = {"images": listed, "categories": categories, "annotations": annotations}
    return {"annotations.json": (json.dumps(content, allow_nan=False) + "\n").encode()}


def read(source: Path, classes: ClassList) -> Annotations:
    """What such a file says.

    Raises:
        InputError: there is no file.
        DataError: it is damaged, or an annotation names no image or category.
    """
    del classes  # the file has names
    name, data = read_only_file(source, ".json")
    content = parse_json(name, data, _File)
    names = {category.id: category.name for category in content.categories}
    drawn: dict[int | str, list[Drawn]] = {image.id: [] for image in content.images}
    if len(drawn) < len(content.images):
        raise DataError(f"{name}: two images have one id; export from the tool again")
    for place, annotation in enumerate(content.annotations):
        if annotation.image_id not in drawn or annotation.category_id not in names:
            raise DataError(
                f"{name}: annotations.{place} names image {annotation.image_id} and category {annotation.category_id}, "
                "of which the file lacks one; export from the tool again"
            )
        fill = partial(_fill, annotation.segmentation)
        drawn[annotation.image_id].append(Drawn(names[annotation.category_id], fill))
    found = [AnnotatedImage(image.file_name, (image.height, image.width), drawn[image.id]) for image in content.images]
    return Annotations(found, tuple(names.values()))


def _fill(segmentation: list[list[float]] | _Rle, size: Size) -> Bitmap:
    if isinstance(segmentation, _Rle):
        return decode_rle(segmentation.model_dump(), size)
    if any(len(flat) % 2 for flat in segmentation):
        raise ValueError("a polygon has an x without a y")
    return fill_rings([list(zip(flat[::2], flat[1::2], strict=True)) for flat in segmentation], size)
