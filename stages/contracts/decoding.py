"""Pillow as every reader of the user's pictures takes it: without its warnings, and with EXIF's orientation."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import ExifTags, Image

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it."""


@contextlib.contextmanager
def open_quietly(source: Path | io.BytesIO, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """The opened image; what Pillow warns of until the end of ``with`` is not shown.

    It warns of damaged metadata, of which we need the orientation alone, and of images half as large as those that it
    refuses.  Whatever spoils pixels is an error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(source, formats=formats) as image:
            yield image


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 … 8 (EXIF 2.32, tag 0x0112); 1, upright, where that is absent or unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever a damaged tag does to Pillow's parser, the pixels are there
        return 1
    return found if isinstance(found, int) and found in UPRIGHT else 1
