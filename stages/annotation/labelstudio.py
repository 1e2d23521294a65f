"""Label Studio's tasks as JSON: brush masks and polygons.

Writes ``tasks.json`` (the shapes as predictions, which an annotator corrects and submits) and ``labels.xml`` (the
labelling interface that they need).  Reads Label Studio's export "JSON".
Source: https://labelstud.io/guide/task_format; brush masks are thi.ng's rle-pack of the RGBA pixels, of which the last
counts.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from pydantic import Field

from stages.annotation.files import FileModel, parse_json, read_only_file
from stages.annotation.shapes import (
    BACKGROUND,
    AnnotatedImage,
    Annotations,
    Bitmap,
    Drawn,
    Region,
    Size,
    fill_rings,
    values_by_name,
)
from stages.contracts import ClassList, ImageRecord, voc_palette
from stages.errors import DataError

_LOCAL_FILES = "/data/local-files/?d="
"""How Label Studio addresses files below the folder that it serves (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT)."""

_RLE_SIZES = (3, 4, 8, 16)
"""Bits that a run's length may take, as Label Studio's converter writes them."""

_OPAQUE = 128
"""From here on a brush's soft border counts."""


class _Result(FileModel):
    type: str
    value: dict[str, Any]
    original_width: int = Field(gt=0)
    original_height: int = Field(gt=0)
    image_rotation: float = 0


class _Annotation(FileModel):
    was_cancelled: bool = False
    result: list[dict[str, Any]]


class _Task(FileModel):
    data: dict[str, Any]
    annotations: list[_Annotation]


def write(images: Iterable[tuple[ImageRecord, list[Region]]], classes: ClassList) -> dict[str, bytes]:
    """The files' bytes by name."""
    tasks: list[dict[str, Any]] = []
    for record, regions in images:
        results = [_result(region, record.size, f"{number:05d}") for number, region in enumerate(regions)]
        data = {"image": _LOCAL_FILES + urllib.parse.quote(record.image), "file": record.image}
        tasks.append({"data": data, "predictions": [{"model_version": "wsss", "result": results}]})
    interface = ElementTree.Element("View")
    ElementTree.SubElement(interface, "Image", {"name": "image", "value": "$image", "zoom": "true"})
    for tag, name in (("BrushLabels", "brush"), ("PolygonLabels", "polygon")):
        labels = ElementTree.SubElement(interface, tag, {"name": name, "toName": "image"})
        for label, value in values_by_name(classes).items():
            colour = "#" + voc_palette()[value].tobytes().hex()
            if label != BACKGROUND:
                ElementTree.SubElement(labels, "Label", {"value": label, "background": colour})
    ElementTree.indent(interface)
    return {
        "tasks.json": (json.dumps(tasks, allow_nan=False) + "\n").encode(),
        "labels.xml": ElementTree.tostring(interface, encoding="utf-8") + b"\n",
    }


def _result(region: Region, size: Size, number: str) -> dict[str, Any]:
    height, width = size
    common = {"id": number, "to_name": "image", "original_width": width, "original_height": height, "image_rotation": 0}
    if region.ring is None:
        value = {"format": "rle", "rle": encode_brush(region.pixels), "brushlabels": [region.name]}
        return common | {"from_name": "brush", "type": "brushlabels", "value": value}
    points = [[100 * x / width, 100 * y / height] for x, y in region.ring]
    value = {"points": points, "closed": True, "polygonlabels": [region.name]}
    return common | {"from_name": "polygon", "type": "polygonlabels", "value": value}


def read(source: Path, classes: ClassList) -> Annotations:
    """What annotators submitted; predictions that nobody has looked at are not read.

    Raises:
        InputError: there is no file.
        DataError: it is damaged, or has two annotations of one image.
    """
    del classes  # the file has names, and no list of them
    name, data = read_only_file(source, ".json")
    images: list[AnnotatedImage] = []
    num_open = 0
    for place, task in enumerate(parse_json(name, data, list[_Task])):
        submitted = [annotation for annotation in task.annotations if not annotation.was_cancelled]
        if len(submitted) > 1:
            raise DataError(f"{name}: task {place} has {len(submitted)} annotations; keep one in Label Studio")
        num_open += not submitted
        images += [_read_task(f"{name}: task {place}", task, annotation.result) for annotation in submitted]
    return Annotations(images, None, num_open)


def _read_task(where: str, task: _Task, results: list[dict[str, Any]]) -> AnnotatedImage:
    address = task.data.get("file") or task.data.get("image")
    if not isinstance(address, str):
        raise DataError(f"{where}: expected 'image' or 'file' in its data, found {', '.join(task.data) or 'nothing'}")
    drawn: list[Drawn] = []
    sizes: set[Size] = set()
    for number, content in enumerate(results):
        if "original_width" not in content:
            continue  # a choice or a text of the whole image
        result = parse_json(f"{where}: result {number}", json.dumps(content).encode(), _Result)
        sizes.add((result.original_height, result.original_width))
        names = result.value.get(result.type)
        if not isinstance(names, list) or len(names) != 1:
            raise DataError(f"{where}: result {number}: expected one label, found {names}")
        drawn.append(Drawn(str(names[0]), partial(_fill, result)))
    if len(sizes) > 1:
        raise DataError(f"{where}: its shapes are of images of {len(sizes)} sizes: {sorted(sizes)}")
    return AnnotatedImage(_image_path(address), next(iter(sizes), None), drawn)


def _image_path(address: str) -> str:
    """The image's path in an address: below a served folder, or uploaded, where a number stands before the name."""
    url = urllib.parse.urlsplit(address)
    served = urllib.parse.parse_qs(url.query).get("d")
    path = PurePosixPath(served[0] if served else urllib.parse.unquote(url.path))
    if "upload" in path.parts:
        path = path.with_name(re.sub(r"^[0-9a-f]{8}-", "", path.name))
    return path.as_posix().lstrip("/")


def _fill(result: _Result, size: Size) -> Bitmap:
    if result.image_rotation:
        raise ValueError("the image was turned in Label Studio; turn it back there")
    if result.type == "polygonlabels":
        try:
            points = np.asarray(result.value["points"], dtype=np.float64).reshape(-1, 2)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("its points are damaged") from error
        return fill_rings([(points * (size[1], size[0]) / 100).tolist()], size)
    if result.type == "brushlabels":
        rle = result.value.get("rle")
        if not isinstance(rle, list):
            raise ValueError("a brush has no run lengths (rle)")
        return decode_brush(rle, size)
    raise ValueError(f"expected polygons and brushes, found {result.type}, which is no outline; draw it as one")


# ---------------------------------------------------------------------------------------------------------------------
# Brush masks
# ---------------------------------------------------------------------------------------------------------------------


def encode_brush(pixels: Bitmap) -> list[int]:
    """Label Studio's bytes of a mask (H, W): all four channels 255 where it is set.

    The same bytes as label_studio_converter.brush.encode_rle.
    """
    channels = np.repeat(pixels.ravel(), 4)
    edges = np.flatnonzero(channels[1:] != channels[:-1]) + 1
    bits = [f"{channels.size:032b}{7:05b}", *(f"{size - 1:04b}" for size in _RLE_SIZES)]
    begin = 0
    for end in [*edges.tolist(), channels.size]:
        value = f"{255 * int(channels[begin]):08b}"
        while begin < end:
            length = min(end - begin, 2**16)
            kind = next(kind for kind, size in enumerate(_RLE_SIZES) if length <= 2**size)
            bits.append(f"1{kind:02b}{length - 1:0{_RLE_SIZES[kind]}b}{value}")
            begin += length
    text = "".join(bits)
    text += "0" * (8 - len(text) % 8)  # a whole byte where nothing is missing, as the converter writes it
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def decode_brush(rle: list[Any], size: Size) -> Bitmap:
    """The pixels (H, W) of Label Studio's bytes.

    Raises:
        ValueError: they are not those of an image of ``size``.
    """
    try:
        text = "".join(map("{:08b}".format, bytes(rle)))
    except (TypeError, ValueError) as error:
        raise ValueError("the run lengths of a brush are no bytes") from error
    total, position = 4 * size[0] * size[1], 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        if position > len(text):
            raise ValueError("the run lengths of a brush are cut off")
        return int(text[position - count : position], 2)

    if (found := take(32)) != total:
        raise ValueError(f"expected a brush of {total // 4:,} pixels, found one of {found // 4:,}")
    word = take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    values = np.zeros(total, dtype=np.uint32)
    begin = 0
    while begin < total:
        is_run, kind = take(1), take(2)
        end = begin + 1 + take(sizes[kind])
        if end > total:
            raise ValueError("the run lengths of a brush are of a larger image")
        if is_run:
            values[begin:end] = take(word)
        else:
            values[begin:end] = [take(word) for _ in range(end - begin)]
        begin = end
    return values.reshape(*size, 4)[:, :, 3] >= _OPAQUE
