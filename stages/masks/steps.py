"""The masks between the steps that lead to a pseudo-mask, kept of every image: which have true masks may change.

Writes and reads ``steps/<number>-<name>/<id>.png`` beside ``masks/``: step 0 is the threshold rule on the maps as they
are, then each refinement in order; the last step is the pseudo-mask itself and stands in ``masks/`` alone.
Shapes: H W image pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.contracts import read_index_mask, write_index_mask

THRESHOLD = "threshold"
"""The first step's name; the others have those of the refinements."""

_FOLDER = "steps"


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
