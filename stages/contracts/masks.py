"""Masks of class indices: palette PNGs in VOC's colours, never interpreted by colour."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from stages.contracts.decoding import open_quietly, orientation_of
from stages.contracts.files import write_atomic
from stages.errors import DataError

IGNORE_INDEX = 255
"""Mask value of pixels that count neither in a loss nor in a score (VOC's void)."""

BACKGROUND_INDEX = 0
"""Mask value of background."""

MAX_MASK_CLASSES = 254
"""The most foreground classes that a mask of bytes can tell apart, beside background and 255."""

MASK_FORMATS = ("PNG",)
"""What a mask file may hold."""

MASK_SUFFIXES = (".png",)
"""Names of mask files in folders of the user's, whatever their case."""

MASK_MODES = ("P", "L")
"""Pixel modes of a mask of class indices."""

OBJECT_MASK_MODES = ("P", "L", "LA")
"""Pixel modes of a mask that only says object or not; transparency is left aside."""


@cache
def voc_palette() -> NDArray[np.uint8]:
    """VOC's 256 colours, uint8 (256, 3), read-only: bit k of the index goes, by threes, to the high bits of R, G, B.

    Source: VOCdevkit, VOCcode/VOClabelcolormap.m.
    """
    palette = np.zeros((256, 3), dtype=np.uint8)
    for index in range(256):
        rest = index
        for shift in range(7, -1, -1):
            for channel in range(3):
                palette[index, channel] |= ((rest >> channel) & 1) << shift
            rest >>= 3
    palette.flags.writeable = False
    return palette


def write_index_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write class indices (H, W) as a palette PNG (mode P, VOC's colours), atomically."""
    write_atomic(path, encode_index_mask(mask))


def encode_index_mask(mask: NDArray[np.uint8], texts: Mapping[str, str] | None = None) -> bytes:
    """The palette PNG (mode P, VOC's colours) of class indices (H, W); ``texts`` are kept in it by their keywords."""
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"a mask must be uint8 of shape (H, W), got {mask.dtype} {mask.shape}")
    image, info = Image.fromarray(mask), PngImagePlugin.PngInfo()
    image.putpalette(voc_palette().tobytes())
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_index_mask(path: Path, *, modes: Sequence[str] = MASK_MODES) -> NDArray[np.uint8]:
    """Read the raw indices of a palette (P) or grey (L) PNG, uint8 (H, W); colours are never interpreted.

    Args:
        path: The file.
        modes: Pixel modes that are taken.

    Raises:
        DataError: missing, damaged, or of another mode (an RGB mask).
    """
    try:
        with open_quietly(path, MASK_FORMATS) as image:
            problem = mask_mode_problem(path, image, modes)
            pixels = None
            if problem is None:
                pixels = np.array(image.getchannel(0) if image.mode == "LA" else image)
            turned = turned_mask_problem(path, image)
    except MemoryError:
        raise
    except Exception as error:  # a decoder answers damaged bytes with whatever it trips over
        raise DataError(f"{path}: not a readable mask ({error})") from error
    if pixels is None:
        raise DataError(problem or "")
    if turned is not None:
        raise DataError(turned)
    return pixels.astype(np.uint8, copy=False)


def mask_mode_problem(path: Path | str, mask: Image.Image, modes: Sequence[str] = MASK_MODES) -> str | None:
    """Why an opened mask, whose pixels are not loaded yet, is refused for its mode or its bits; None where it is not.

    A grey PNG of 1, 2 or 4 bits says that its largest value is white, so Pillow reads its values 0, 1, 2 … as grey
    levels 0, 17, 34 …: nobody knows whether class indices or grey levels were meant.  A palette has no such levels.
    """
    expected = f"{path}: expected a mask of class indices (PNG mode P or L, 8 bits a pixel), found"
    remedy = "save the class index of each pixel, with VOC's palette if it shall look like VOC"
    bits = _BITS.get(mask.mode)
    packed = getattr(mask, "tile", None)  # which an image has that was opened, until it is loaded
    if mask.mode == "L" and "LA" not in modes and packed:
        bits = _BITS.get(str(packed[0].args))
    if bits is not None and bits < 8:
        noun = "bit" if bits == 1 else "bits"
        return f"{expected} a grey one of {bits} {noun} a pixel, whose values stand for levels of grey; {remedy}"
    if mask.mode in modes:
        return None
    found = f"mode {mask.mode}"
    if bits is not None:
        found += f" ({bits} bits a pixel)"
    elif mask.mode.startswith("RGB"):
        found += " (colours instead of indices)"
    return f"{expected} {found}; {remedy}"


_BITS = {"1": 1, "L;2": 2, "L;4": 4, "I;16": 16, "I;16B": 16, "I": 32}
"""Mode, or how Pillow unpacks the mode L, to the bits of a pixel."""


def turned_mask_problem(path: Path, mask: Image.Image) -> str | None:
    """Why a mask with an EXIF tag that turns it is refused; None where it has none, as far as was read of it."""
    if "exif" not in mask.info or orientation_of(mask) == 1:
        return None
    return (
        f"{path}: its EXIF tag turns it, and a mask is read pixel by pixel; turn its pixels and save it without the tag"
    )
