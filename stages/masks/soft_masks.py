"""How sure each pixel of a pseudo-mask is: from the probabilities that made it, to a PNG beside it and back.

Reads and writes ``confidence/<id>.png`` (grey PNG at the image's size, 255 = sure, 0 where the mask is 255).
Shapes: n labels of one image, L = n + 1 labels with background, H W image pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, ClassList, read_index_mask, write_atomic
from stages.errors import DamagedFileError, DataError

_TOP = 255


def label_confidence(
    mask: NDArray[np.uint8], labels: tuple[int, ...], states: Sequence[NDArray[np.float32]]
) -> NDArray[np.uint8]:
    """The probability of each pixel's label, in 255ths.

    Args:
        mask: Class indices of the image's labels, 0 and 255, (H, W).
        labels: The n label indices of the image; an image without any is surely background.
        states: Probabilities (L, H, W) behind the mask; two of them with ``confident``: the strict and the loose, which
            an object has from the strict one and background, which both must say, from the less sure of the two.

    Returns:
        uint8 (H, W); 0 where the mask is 255.
    """
    if not labels:
        return np.full(mask.shape, _TOP, dtype=np.uint8)
    positions = np.zeros(256, dtype=np.intp)
    positions[[ClassList.class_index(label) for label in labels]] = np.arange(1, len(labels) + 1)
    picked = [np.take_along_axis(state, positions[mask][None], axis=0)[0] for state in states]
    sure = np.where(mask == BACKGROUND_INDEX, np.minimum.reduce(picked), picked[0])
    sure[mask == IGNORE_INDEX] = 0
    return np.rint(np.clip(sure, 0, 1) * _TOP).astype(np.uint8)


def write_confidence(path: Path, confidence: NDArray[np.uint8]) -> None:
    """Write confidence (H, W) as a grey PNG, atomically."""
    buffer = io.BytesIO()
    Image.fromarray(confidence).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def read_confidence(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Read what ``write_confidence`` wrote for an image of ``size``.

    Raises:
        DamagedFileError: missing, damaged or of another size.
    """
    try:
        confidence = read_index_mask(path, modes=("L",))
    except DataError as error:
        raise DamagedFileError(f"{error.message}; rebuild make_masks with soft: true") from error
    if confidence.shape != size:
        raise DamagedFileError(f"{path}: expected {size} pixels, found {confidence.shape}; rebuild make_masks")
    return confidence
