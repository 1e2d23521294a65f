"""CVAT's own XML ("CVAT for images 1.1").

Writes ``annotations.xml``; reads any XML of that format with polygons and masks.
Source: https://docs.cvat.ai/docs/manual/advanced/formats/format-cvat/; masks are run lengths, row by row, inside
their box.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from stages.annotation.files import parse_xml, read_only_file
from stages.annotation.shapes import (
    BACKGROUND,
    AnnotatedImage,
    Annotations,
    Bitmap,
    Drawn,
    Region,
    Size,
    fill_rings,
    pixels_to_runs,
    runs_to_pixels,
    values_by_name,
)
from stages.contracts import ClassList, ImageRecord
from stages.errors import DataError

_NO_PIXELS = ("tag",)
"""Elements that say something of the whole image."""


def write(images: Iterable[tuple[ImageRecord, list[Region]]], classes: ClassList) -> dict[str, bytes]:
    """The file's bytes by name."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    for name in values_by_name(classes):
        if name != BACKGROUND:
            ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = name
    for number, (record, regions) in enumerate(images):
        height, width = map(str, record.size)
        place = {"id": str(number), "name": record.image, "width": width, "height": height}
        image = ElementTree.SubElement(root, "image", place)
        for order, region in enumerate(regions):
            common = {"label": region.name, "source": "manual", "occluded": "0", "z_order": str(order)}
            if region.ring is not None:
                points = ";".join(f"{x:g},{y:g}" for x, y in region.ring)
                ElementTree.SubElement(image, "polygon", common | {"points": points})
            else:
                ElementTree.SubElement(image, "mask", common | _mask_attributes(region.pixels))
    ElementTree.indent(root)
    return {"annotations.xml": ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"}


def _mask_attributes(pixels: Bitmap) -> dict[str, str]:
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    box = pixels[top : rows[-1] + 1, left : columns[-1] + 1]
    sizes = {"left": left, "top": top, "width": box.shape[1], "height": box.shape[0]}
    return {"rle": ", ".join(map(str, pixels_to_runs(box))), **{name: str(value) for name, value in sizes.items()}}


def read(source: Path, classes: ClassList) -> Annotations:
    """What such a file says; ``z_order`` says what covers what.

    Raises:
        InputError: there is no file.
        DataError: it is damaged, or an element lacks what the format asks for.
    """
    del classes  # the file has names
    name, data = read_only_file(source, ".xml")
    root = parse_xml(name, data)
    if root.tag != "annotations":
        raise DataError(f"{name}: expected CVAT's <annotations>, found <{root.tag}>; export as 'CVAT for images 1.1'")
    labels = tuple((label.findtext("name") or "").strip() for label in root.iterfind("meta//labels/label"))
    try:
        images = [_read_image(image) for image in root.iterfind("image")]
    except (KeyError, ValueError) as error:
        raise DataError(f"{name}: an element lacks or garbles {error}; export from the tool again") from error
    return Annotations(images, labels or None)


def _read_image(image: ElementTree.Element) -> AnnotatedImage:
    shapes = [shape for shape in image if shape.tag not in _NO_PIXELS]
    shapes.sort(key=lambda shape: int(shape.get("z_order", "0")))  # stable: the file's order within a layer
    drawn = [Drawn(shape.attrib["label"], partial(_fill, shape)) for shape in shapes]
    return AnnotatedImage(image.attrib["name"], (int(image.attrib["height"]), int(image.attrib["width"])), drawn)


def _fill(shape: ElementTree.Element, size: Size) -> Bitmap:
    if shape.tag == "polygon":
        pairs = [point.split(",") for point in shape.attrib["points"].split(";")]
        return fill_rings([[(float(x), float(y)) for x, y in pairs]], size)
    if shape.tag != "mask":
        raise ValueError(f"expected polygons and masks, found a {shape.tag}, which is no outline; draw it as one")
    left, top, width, height = (int(shape.attrib[name]) for name in ("left", "top", "width", "height"))
    if min(left, top, width, height) < 0 or left + width > size[1] or top + height > size[0]:
        raise ValueError(f"a mask leaves the image of {size[0]} × {size[1]} pixels; it was drawn at another size")
    pixels = np.zeros(size, dtype=bool)
    lengths = [int(length) for length in shape.attrib["rle"].split(",")]
    pixels[top : top + height, left : left + width] = runs_to_pixels(lengths, (height, width))
    return pixels
