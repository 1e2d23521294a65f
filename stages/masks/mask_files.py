"""What ``make_masks`` keeps beside ``masks/``: how sure each pixel is, and the masks between the steps.

Writes and reads ``confidence/<id>.png`` (grey PNG at the image's size, 255 = sure, 0 where the mask is 255) and
``steps/<number>-<name>/<id>.png``: step 0 is the threshold rule on the maps as they are, then each refinement in order;
the last step is the pseudo-mask itself and stands in ``masks/`` alone.  Every image has its steps, since which images
have true masks may change.
Shapes: n labels of one image, L = n + 1 labels with background, H W image pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    ClassList,
    read_index_mask,
    write_atomic,
    write_index_mask,
)
from stages.errors import DamagedFileError, DataError

THRESHOLD = "threshold"
"""The first step's name; the others have those of the refinements."""

_FOLDER = "steps"

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


def confidence_path(made: Path, image_id: str) -> Path:
    """Where the confidence of an image is, under the output folder of ``make_masks``."""
    return made / "confidence" / f"{image_id}.png"


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


def step_names(chain: Sequence[str]) -> tuple[str, ...]:
    """The steps of a chain of refinements in order: ``threshold``, then every refinement."""
    return (THRESHOLD, *chain)


def write_steps(made: Path, image_id: str, chain: Sequence[str], masks: Sequence[NDArray[np.uint8]]) -> None:
    """Keep the masks of one image after every step but the last, each written atomically.

    Args:
        made: Output folder of ``make_masks``.
        image_id: The image.
        chain: The refinements.
        masks: Class indices and 255, (H, W), after each step but the last: as many as there are refinements.
    """
    for number, (name, mask) in enumerate(zip(step_names(chain)[:-1], masks, strict=True)):
        write_index_mask(step_path(made, number, name, image_id), mask)


def step_path(made: Path, number: int, name: str, image_id: str) -> Path:
    """Where the mask of an image after step ``number`` is, under the output folder of ``make_masks``."""
    return made / _FOLDER / f"{number}-{name}" / f"{image_id}.png"


def read_steps(made: Path, image_id: str) -> dict[str, NDArray[np.uint8]]:
    """The masks of one image that were kept, by step in order; none without refinement.

    Raises:
        DataError: a file does not read.
    """
    folders = sorted((made / _FOLDER).glob("*-*/"), key=lambda folder: int(folder.name.partition("-")[0]))
    paths = {folder.name.partition("-")[2]: folder / f"{image_id}.png" for folder in folders}
    return {name: read_index_mask(path) for name, path in paths.items() if path.is_file()}
