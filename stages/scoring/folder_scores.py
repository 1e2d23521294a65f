"""Score a folder of predicted masks against a folder of true ones: anybody's masks, without a config or a run.

Reads PNG masks of class indices; writes nothing.
Shapes: C classes with background, H W image pixels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.contracts import IGNORE_INDEX, Progress, SilentProgress, read_index_mask
from stages.errors import DataError, InputError
from stages.ops.metrics.confusion import SparseConfusions, confusion_matrix, iou, mean_iou, pixel_accuracy

SHOWN = 20
"""Problems that an error names; it says how many there are."""


@dataclass(frozen=True)
class FolderScores:
    """What was counted, and the scores that follow."""

    confusions: SparseConfusions
    """Counts of each image."""
    classes: tuple[str, ...]
    """C names, background first; numbers where no names were given."""
    not_scored: tuple[str, ...]
    """Predictions without a true mask, by file name."""

    @property
    def num_images(self) -> int:
        """Images that count."""
        return len(self.confusions.ids)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur in either folder, of the counts of all images; in [0, 1]."""
        return mean_iou(self.confusions.total())

    @property
    def pixel_accuracy(self) -> float:
        """Share of counted pixels with the right class, in [0, 1]."""
        return pixel_accuracy(self.confusions.total())

    @property
    def iou(self) -> dict[str, float]:
        """IoU by class name, NaN for a class that occurs in neither folder."""
        return dict(zip(self.classes, iou(self.confusions.total()).tolist(), strict=True))

    @property
    def miou_by_image(self) -> dict[str, float]:
        """Mean IoU of each image alone: to find the worst, never to be averaged into a score."""
        return self.confusions.mean_iou_by_image()


def score_folders(
    truth: Path,
    predictions: Path,
    *,
    classes: Sequence[str] | None = None,
    unsure: Literal["background", "drop"] = "background",
    progress: Progress | None = None,
) -> FolderScores:
    """Compare the masks of two folders, file by file.

    Args:
        truth: PNG masks of class indices (palette or grey): 0 background, 255 not counted.  Every one of them counts.
        predictions: PNG masks of the same names; 255 means unsure.  Others are left out and named in the result.
        classes: Names of the foreground classes in order; None numbers those that occur.
        unsure: Whether a predicted 255 counts as background or not at all.
        progress: Hears of every image.

    Raises:
        InputError: a folder has no masks.
        DataError: with every problem: a true mask without a prediction, sizes that differ, a value above the last
            class, a file that is no mask of indices.
    """
    progress = progress or SilentProgress()
    if classes is not None and len({"background", *classes}) <= len(classes):
        raise InputError(f"classes: expected different names without background, found {', '.join(classes)}")
    wanted, found = _masks(truth), _masks(predictions)
    missing = [path for image_id, path in wanted.items() if image_id not in found]
    problems = [f"{path}: no prediction for it in {predictions}" for path in missing]
    highest = IGNORE_INDEX - 1 if classes is None else len(classes)
    matrices: list[tuple[str, NDArray[np.int64]]] = []
    pairs = [image_id for image_id in wanted if image_id in found]
    for done, image_id in enumerate(pairs, start=1):
        try:
            matrices.append((image_id, _count(wanted[image_id], found[image_id], highest, unsure)))
        except DataError as error:
            problems.append(error.message)
        progress.step("score", done, len(pairs))
    if problems:
        shown = problems[:SHOWN] + ([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])
        raise DataError(f"{len(problems)} of {len(wanted)} masks of {truth} cannot be scored", shown)
    if not any(matrix.any() for _, matrix in matrices):
        raise DataError(f"{truth}: every pixel is {IGNORE_INDEX}, which is not counted; nothing can be scored")
    if classes is None:
        highest = max((int(np.flatnonzero(matrix.sum(0) + matrix.sum(1)).max(initial=0)) for _, matrix in matrices))
        names = tuple(str(value) for value in range(highest + 1))
    else:
        names = ("background", *classes)
    cut = ((image_id, matrix[: len(names), : len(names)]) for image_id, matrix in matrices)
    left = tuple(path.name for image_id, path in found.items() if image_id not in wanted)
    return FolderScores(SparseConfusions.from_matrices(len(names), cut), names, left)


def _masks(folder: Path) -> dict[str, Path]:
    """The masks of a folder by file name without its ending, sorted."""
    try:
        files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".png"]
    except OSError as error:
        raise InputError(f"{folder}: expected a folder of masks ({error.strerror})") from error
    if not files:
        raise InputError(f"{folder}: expected masks of class indices as <image>.png, found none")
    found = {unicodedata.normalize("NFC", path.stem): path for path in files}
    # two spellings of one name are two images
    return found if len(found) == len(files) else {path.stem: path for path in files}


def _count(truth: Path, prediction: Path, highest: int, unsure: Literal["background", "drop"]) -> NDArray[np.int64]:
    """Confusion counts of one image, (highest + 1, highest + 1)."""
    masks = [read_index_mask(path) for path in (truth, prediction)]
    if masks[0].shape != masks[1].shape:
        sizes = [" × ".join(map(str, mask.shape)) for mask in masks]
        raise DataError(f"{prediction}: expected {sizes[0]} pixels as {truth}, found {sizes[1]}")
    for path, mask in zip((truth, prediction), masks, strict=True):
        top = int(mask.max(initial=0, where=mask != IGNORE_INDEX))
        if top > highest:
            raise DataError(f"{path}: expected class indices up to {highest} and {IGNORE_INDEX}, found {top}")
    return confusion_matrix(masks[0], masks[1], highest + 1, unsure=unsure)
