"""Masks as the shapes that annotation tools hold, and shapes as pixels again.

Reads and writes nothing.  Encoding and polygons are pycocotools' (the extra ``annotate``), outlines OpenCV's.
Shapes: H W image pixels.  A polygon's points are (x, y) with pixel corners at whole numbers: a mask of the whole image
runs from (0, 0) to (W, H).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, ClassList
from stages.errors import InputError

Size = tuple[int, int]
Bitmap = NDArray[np.bool_]
Ring = Sequence[tuple[float, float]]
ShapeKind = Literal["masks", "polygons"]
"""masks: one exact mask for each class of an image; polygons: one polygon for each connected object."""

UNSURE = "unsure"
"""What pixels of 255 are called among the classes."""

BACKGROUND = "background"
"""What an annotator may draw to take pixels away from a class."""

LEAST_IOU = 0.97
"""A polygon that covers its object less well is left out: the object is written as a mask, which is exact."""

_MOST_OUTSIDE_PX = 1.0
"""So far outside the image a point may lie (drawn on the border); further out, the image was of another size."""

_TOLERANCE_PX = 0.5
"""A point of a polygon that lies this close to the line between its neighbours is left out."""


@dataclass(frozen=True)
class Region:
    """Pixels of one class in one image, to be written."""

    name: str
    pixels: Bitmap
    """(H, W)."""
    ring: Ring | None
    """The polygon around them; None where they are to be written as a mask."""


@dataclass(frozen=True)
class Drawn:
    """Pixels of one class in one image, as somebody drew them."""

    name: str
    fill: Callable[[Size], Bitmap]
    """Gives them as (H, W) for the image's size; ValueError says what is wrong with the shape."""


@dataclass(frozen=True)
class AnnotatedImage:
    """What one annotation file says of one image."""

    file: str
    """What the file calls the image: a path with forward slashes, or only its end."""
    size: Size | None
    """(height, width) that the shapes were drawn for; None where the shapes have pixels of their own."""
    drawn: Sequence[Drawn]
    """In the order in which they are painted: a later one covers an earlier one."""


@dataclass(frozen=True)
class Annotations:
    """What an annotation file holds."""

    images: Sequence[AnnotatedImage]
    classes: tuple[str, ...] | None
    """Every class that the file declares; None where the format declares none."""
    num_open: int = 0
    """Images that nobody has handed in yet; they are not in ``images``."""


# ---------------------------------------------------------------------------------------------------------------------
# Masks to shapes
# ---------------------------------------------------------------------------------------------------------------------


def names_by_value(classes: ClassList) -> dict[int, str]:
    """The name of every mask value but background's: 1 … K, and 255."""
    names = {ClassList.class_index(index): name for index, name in enumerate(classes.names)}
    return names | {IGNORE_INDEX: UNSURE}


def values_by_name(classes: ClassList) -> dict[str, int]:
    """The mask value of every name that may be drawn."""
    return {name: value for value, name in names_by_value(classes).items()} | {BACKGROUND: BACKGROUND_INDEX}


def find_regions(mask: NDArray[np.uint8], names: Mapping[int, str], kind: ShapeKind) -> list[Region]:
    """The shapes of a mask (H, W) of class indices and 255; painted in this order they give the mask again.

    With ``polygons`` the larger objects come first, so that what lies in a hole of another covers it.
    """
    present = [value for value in np.unique(mask).tolist() if value != BACKGROUND_INDEX]
    if kind == "masks":
        return [Region(names[value], mask == value, None) for value in present]
    found = [Region(names[value], part, _outline(part)) for value in present for part in _components(mask == value)]
    return sorted(found, key=lambda region: -int(region.pixels.sum()))


def _components(pixels: Bitmap) -> Iterator[Bitmap]:
    count, labels = cv2.connectedComponents(pixels.astype(np.uint8), connectivity=4)
    for number in range(1, count):
        yield labels == number


def _outline(part: Bitmap) -> Ring | None:
    """The polygon around a connected part; None where no polygon covers it well (holes, specks)."""
    # at twice the size the outline through the middle of the border pixels is a quarter of a pixel inside the object
    doubled = part.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    for tolerance in (2 * _TOLERANCE_PX, 0.0):
        points = cv2.approxPolyDP(contours[0], tolerance, True)[:, 0].astype(float) / 2 + 0.25
        ring = [(x, y) for x, y in points.tolist()]
        if len(ring) >= 3:
            filled = fill_rings([ring], part.shape)
            if np.sum(filled & part) >= LEAST_IOU * np.sum(filled | part):
                return ring
    return None


# ---------------------------------------------------------------------------------------------------------------------
# COCO's run lengths and polygons
# ---------------------------------------------------------------------------------------------------------------------


def coco_masks() -> Any:  # noqa: ANN401 - pycocotools has no types
    """The module ``pycocotools.mask``.

    Raises:
        InputError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise InputError(
            "this format needs pycocotools, which is not installed: pip install 'wsss-pipeline[annotate]' "
            "(--format voc needs nothing)"
        ) from error
    return mask


def encode_rle(pixels: Bitmap) -> dict[str, Any]:
    """COCO's compressed run lengths of (H, W): ``size`` and ``counts``, ready for JSON."""
    found = coco_masks().encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {"size": list(pixels.shape), "counts": found["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any], size: Size) -> Bitmap:
    """The pixels (H, W) of COCO's run lengths, compressed (text) or not (a list).

    pycocotools' own ``decode`` gives memory that nobody wrote where run lengths end early, and warns with numpy 2.

    Raises:
        ValueError: the run lengths are not those of an image of ``size``.
    """
    if tuple(rle["size"]) != size:
        raise ValueError(f"expected a mask of {_text(size)} pixels, found one of {_text(tuple(rle['size']))}")
    counts = rle["counts"]
    lengths = _read_counts(counts) if isinstance(counts, str) else list(counts)
    return runs_to_pixels(lengths, (size[1], size[0])).T


def runs_to_pixels(lengths: Sequence[int], size: Size) -> Bitmap:
    """Pixels row by row from run lengths, which begin with those that are not set.

    Raises:
        ValueError: a length is negative, or all together are not the pixels of ``size``.
    """
    total = size[0] * size[1]
    if min(lengths, default=0) < 0 or sum(lengths) != total:
        raise ValueError(f"expected run lengths of {total:,} pixels together, found {sum(lengths):,}")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(size)


def pixels_to_runs(pixels: Bitmap) -> list[int]:
    """The run lengths that ``runs_to_pixels`` reads."""
    flat = pixels.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff([0, *edges.tolist(), flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def _read_counts(text: str) -> list[int]:
    """Run lengths out of COCO's text: six bits a character, and from the fourth on the difference to the last but one.

    Source: pycocotools, maskApi.c, rleFrString.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            raise ValueError("the text of its run lengths is damaged")
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            value -= (1 << shift) if code & 0x10 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the text of its run lengths is cut off")
    return counts


def fill_rings(rings: Sequence[Ring], size: Size) -> Bitmap:
    """The pixels (H, W) inside any of some polygons.

    Raises:
        ValueError: a polygon has fewer than three points, or a point outside the image.
    """
    height, width = size
    flat: list[list[float]] = []
    for ring in rings:
        points = np.asarray(ring, dtype=np.float64).reshape(-1, 2)
        if len(points) < 3:
            raise ValueError(f"expected at least 3 points in a polygon, found {len(points)}")
        low, high = points.min(axis=0), points.max(axis=0) - (width, height)
        if not (np.isfinite(points).all() and low.min() >= -_MOST_OUTSIDE_PX and high.max() <= _MOST_OUTSIDE_PX):
            raise ValueError(f"a polygon leaves the image of {_text(size)} pixels; it was drawn at another size")
        flat.append(np.clip(points, 0, (width, height)).ravel().tolist())
    if not flat:
        raise ValueError("it has no pixels: neither a polygon nor a mask")
    masks = coco_masks()
    filled = masks.merge(masks.frPyObjects(flat, height, width))
    return decode_rle({"size": size, "counts": filled["counts"].decode("ascii")}, size)


def _text(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size))
