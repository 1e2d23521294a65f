"""An image however a caller has it: a file, an array, a PIL image."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import UPRIGHT, orientation_of, read_image, read_rgb
from stages.errors import InputError

_TIFF_MODES = ("F", "CMYK", "YCbCr", "LAB", "RGBX", "PA", "La", "RGBa", "HSV")
"""What PNG does not hold."""

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]"
"""A path; a PIL image; or RGB as uint8 (H, W, 3), or grey (H, W)."""


def read_picture(image: Picture) -> NDArray[np.uint8]:
    """RGB, uint8 (H, W, 3), turned upright by EXIF.

    Raises:
        InputError: an array of another shape or type, something else, or an image without a pixel.
        DataError: a file that is not there or no image.
    """
    if isinstance(image, Image.Image | np.ndarray) and 0 in (
        image.size if isinstance(image, Image.Image) else image.shape
    ):
        raise InputError("expected an image with pixels, found one of no height or no width")
    if isinstance(image, Image.Image):
        turn = UPRIGHT.get(orientation_of(image))
        image = image if turn is None else image.transpose(turn)
        content = io.BytesIO()  # as a file of it would be read: 16 bits are scaled, floats refused
        image.save(content, "TIFF" if image.mode in _TIFF_MODES else "PNG")
        return read_image(Path("the image"), content.getvalue())[0]
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise InputError(
                f"expected an RGB image as uint8 (H, W, 3), or grey as (H, W), found {image.dtype} {image.shape}; of "
                "floats in 0 … 1: (image * 255).round().astype('uint8'); of channels first: image.transpose(1, 2, 0)"
            )
        return np.ascontiguousarray(np.broadcast_to(image[..., None], (*image.shape, 3)) if image.ndim == 2 else image)
    if not isinstance(image, str | os.PathLike) or not os.fspath(image):
        found = "an empty path" if isinstance(image, str | os.PathLike) else type(image).__name__
        raise InputError(f"expected a path, a PIL image or RGB as a numpy array, uint8 (H, W, 3), found {found}")
    return read_rgb(Path(image))
