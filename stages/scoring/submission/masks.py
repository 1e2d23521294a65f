"""Check one mask of an archive for PASCAL VOC's test server.

Pure: takes the bytes of a file that is not trusted, and decodes no more pixels than a mask may have.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

from PIL import Image

from stages.contracts import IGNORE_INDEX, MASK_FORMATS, voc_palette
from stages.data.adapters.voc import VOC_CLASSES

MAX_SIDE_PX = 500
"""The longer side of VOC's images is at most this; what is larger was not scaled back to the image's size."""

MAX_DECODED_PX = 1 << 24
"""A mask that says that it has more pixels is not decoded."""

Size = tuple[int, int]
"""(height, width) in pixels."""

_PNG_START = b"\x89PNG\r\n\x1a\n"
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, Image.DecompressionBombError)
"""What Pillow raises at damaged bytes."""


def check_mask(data: bytes, size: Size | None = None) -> Iterator[tuple[str, str]]:
    """Everything that is wrong with one mask, as (kind, what was found).

    Args:
        data: The bytes of the PNG.
        size: (height, width) of its image; None where that is not known.
    """
    found = png_size(data)
    if found is None:
        yield "no PNG", f"starts with {data[:4]!r}"
        return
    yield from _check_size(found, size)
    if found[0] * found[1] > MAX_DECODED_PX:
        if found == size:
            yield "wrong size", f"is {spell_size(found)} as its image, too large to be looked at"
        return
    try:
        with Image.open(io.BytesIO(data), formats=MASK_FORMATS) as image:
            image.load()
            yield from _check_pixels(image)
    except _UNREADABLE as error:
        yield "damaged PNG", f"({error})"


def png_size(data: bytes) -> Size | None:
    """What the PNG's header says; None where there is none.  Pillow sees nothing before its size is known."""
    if not data.startswith(_PNG_START) or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    return height, width


def _check_size(found: Size, size: Size | None) -> Iterator[tuple[str, str]]:
    if size is not None and found != size:
        yield "wrong size", f"is {spell_size(found)}, its image {spell_size(size)}"
    if size is None and max(found) > MAX_SIDE_PX:
        yield "wrong size", f"is {spell_size(found)}, VOC's images have at most {MAX_SIDE_PX} a side"


def spell_size(size: Size) -> str:
    """Width and height for people."""
    return f"{size[1]} × {size[0]} (width × height)"


def _check_pixels(image: Image.Image) -> Iterator[tuple[str, str]]:
    if image.mode != "P":
        yield "wrong mode", f"has mode {image.mode}"
        return
    values = [value for value, count in enumerate(image.histogram()) if count]
    wrong = [value for value in values if value > len(VOC_CLASSES)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        void = " (void)" if IGNORE_INDEX in wrong[:3] else ""
        yield "wrong value", f"has {', '.join(map(str, wrong[:3]))}{more}{void}"
    colours = bytes(image.getpalette("RGB") or ())
    for value, name in enumerate(("background", *VOC_CLASSES)):
        found, right = colours[3 * value : 3 * value + 3], voc_palette()[value].tobytes()
        if found != right and (found or value in values):  # a palette may end before a class that does not occur
            yield "wrong palette", f"shows {name} ({value}) as {tuple(found) or 'nothing'}, VOC's is {tuple(right)}"
            return
