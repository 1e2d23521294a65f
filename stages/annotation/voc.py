"""PASCAL VOC's folder of class masks, which CVAT calls "Segmentation mask 1.1".

Writes ``SegmentationClass/<id>.png`` (class indices in VOC's colours), ``labelmap.txt`` (name and colour of each class
in order) and ``ImageSets/Segmentation/default.txt``.  Reads such a folder, and one of PNGs alone: grey values are
indices; colours are looked up in labelmap.txt, or are VOC's.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.annotation.files import read_files
from stages.annotation.shapes import (
    BACKGROUND,
    UNSURE,
    AnnotatedImage,
    Annotations,
    Bitmap,
    Drawn,
    Region,
    Size,
    values_by_name,
)
from stages.contracts import (
    MASK_FORMATS,
    ClassList,
    ImageRecord,
    encode_index_mask,
    mask_mode_problem,
    open_quietly,
    voc_palette,
)
from stages.errors import DataError

_FOLDER = "SegmentationClass"
_LABELS = "labelmap.txt"

Colour = tuple[int, int, int]


def write(images: Iterable[tuple[ImageRecord, list[Region]]], classes: ClassList) -> dict[str, bytes]:
    """The files' bytes by name."""
    values = values_by_name(classes)
    files: dict[str, bytes] = {}
    for record, regions in images:
        mask = np.zeros(record.size, dtype=np.uint8)
        for region in regions:
            mask[region.pixels] = values[region.name]
        files[f"{_FOLDER}/{record.id}.png"] = encode_index_mask(mask)
    ids = [name.removeprefix(f"{_FOLDER}/").removesuffix(".png") for name in files]
    lines = [
        f"{name}:{','.join(map(str, voc_palette()[value].tolist()))}::"
        for name, value in sorted(values.items(), key=lambda pair: pair[1])
    ]
    files["ImageSets/Segmentation/default.txt"] = "".join(f"{image_id}\n" for image_id in ids).encode()
    return files | {_LABELS: "".join(f"{line}\n" for line in ["# label:color_rgb:parts:actions", *lines]).encode()}


def read(source: Path, classes: ClassList) -> Annotations:
    """What such a folder says.

    Raises:
        InputError: there is no mask.
        DataError: labelmap.txt is damaged.
    """
    found = read_files(source, [".png", _LABELS])
    maps = {name: data for name, data in found.items() if PurePosixPath(name).name == _LABELS}
    masks = {name: data for name, data in found.items() if name not in maps}
    inside = {name: data for name, data in masks.items() if _FOLDER in PurePosixPath(name).parts[:-1]}
    if maps:
        colours = _read_labels(f"{source}: {next(iter(maps))}", next(iter(maps.values())))
        order = tuple(name for name in colours.values() if name not in (BACKGROUND, UNSURE))
    else:
        order = None
        colours = {_colour(voc_palette()[value]): name for name, value in values_by_name(classes).items()}
    names = dict(enumerate((BACKGROUND, *(classes.names if order is None else order)))) | {255: UNSURE}
    images = [_read_mask(name, data, names, colours) for name, data in (inside or masks).items()]
    return Annotations(images, order)


def _read_labels(where: str, data: bytes) -> dict[Colour, str]:
    """Colour to name, in the file's order."""
    found: dict[Colour, str] = {}
    try:
        lines = [line for line in data.decode("utf-8-sig").splitlines() if line.strip() and not line.startswith("#")]
        for line in lines:
            name, text, *_ = line.rsplit(":", 3) if line.count(":") >= 3 else line.rsplit(":", 1)
            found[_colour([int(value) for value in text.split(",")])] = name
    except ValueError as error:
        raise DataError(f"{where}: expected lines 'name:r,g,b::' ({error}); export from the tool again") from error
    if len(found) < len(lines):
        raise DataError(f"{where}: two classes have one colour; give each its own")
    return found


def _colour(values: Iterable[int]) -> Colour:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def _read_mask(name: str, data: bytes, names: Mapping[int, str], colours: Mapping[Colour, str]) -> AnnotatedImage:
    path = PurePosixPath(name)
    if _FOLDER in path.parts[:-1]:
        path = PurePosixPath(*path.parts[path.parts.index(_FOLDER) + 1 :])
    try:
        with open_quietly(io.BytesIO(data), MASK_FORMATS) as image:
            keys, labels = _label_pixels(image, names, colours)
            drawn = [Drawn(label, partial(_fill, keys, key)) for key, label in labels.items()]
            return AnnotatedImage(path.as_posix(), (image.height, image.width), drawn)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: not a readable mask ({error}); export from the tool again") from error


def _fill(keys: NDArray[np.uint32], key: int, size: Size) -> Bitmap:
    del size
    return keys == key


def _label_pixels(
    image: Image.Image, names: Mapping[int, str], colours: Mapping[Colour, str]
) -> tuple[NDArray[np.uint32], dict[int, str]]:
    """A number for each pixel (H, W), and the name of every number that occurs.

    The colours of a palette come first: an editor may have sorted the palette anew, and the person saw the colours.
    Where they are others than ours, the indices count.
    """
    if image.mode in ("RGB", "RGBA", "P"):
        rgb = np.asarray(image.convert("RGB"), dtype=np.uint32)
        keys = (rgb << np.array([16, 8, 0], dtype=np.uint32)).sum(axis=2, dtype=np.uint32)
        found = {key: (key >> 16, key >> 8 & 255, key & 255) for key in np.unique(keys).tolist()}
        unknown = [colour for colour in found.values() if colour not in colours]
        if not unknown:
            return keys, {key: colours[colour] for key, colour in found.items()}
        if image.mode != "P":
            raise ValueError(f"colours {unknown[:3]} are of no class; draw without soft edges, and save as PNG")
    elif image.mode == "L" and mask_mode_problem("", image) is not None:
        raise ValueError(
            "a grey PNG of 2 or 4 bits a pixel stands for levels of grey, not indices; save it with 8 bits"
        )
    elif image.mode != "L":
        raise ValueError(f"expected indices or colours (PNG mode P, L or RGB), found mode {image.mode}")
    indices = np.asarray(image, dtype=np.uint32)
    values = np.unique(indices).tolist()
    strange = [value for value in values if value not in names]
    if strange:
        raise ValueError(f"values {strange[:5]} are of no class; expected 0 … {len(names) - 2} and 255")
    return indices, {value: names[value] for value in values}
