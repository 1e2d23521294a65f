"""Confusion counts of index masks: scores, compact storage per image, and every threshold in one pass.

``write_confusions`` and ``read_confusions`` keep the counts of each image as npz without pickles, so that a later
comparison on any subset of the images needs no rerun; all else is pure.
Shapes: C classes with background, H W image pixels; matrices are int64 (C, C) with the truth in rows.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, write_atomic
from stages.errors import DamagedFileError

_NUM_BYTES = 256

_LEAST_RUN_PX = 4
"""Mean length of a run of equal pairs below which counting pixels is faster than counting runs."""


def confusion_matrix(
    truth: NDArray[np.uint8],
    prediction: NDArray[np.uint8],
    num_classes: int,
    *,
    unsure: Literal["background", "drop"] = "background",
) -> NDArray[np.int64]:
    """Count pixels by true and predicted class; pixels whose truth is 255 do not count.

    Args:
        truth: Class indices 0 … C-1 and 255, (H, W).
        prediction: Class indices 0 … C-1 and 255 for unsure, (H, W).
        num_classes: C.
        unsure: Whether a predicted 255 counts as background (irn) or not at all (ToCo).

    Returns:
        int64 (C, C).
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth and prediction must have one shape, got {truth.shape} and {prediction.shape}")
    rows, columns, pixels = _count_pairs(truth, prediction)
    kept = rows != IGNORE_INDEX
    if unsure == "drop":
        kept &= columns != IGNORE_INDEX
    rows, columns, pixels = rows[kept], columns[kept], pixels[kept]
    columns[columns == IGNORE_INDEX] = BACKGROUND_INDEX
    if rows.size and max(rows.max(), columns.max()) >= num_classes:
        raise ValueError(f"a class index reaches {max(rows.max(), columns.max())}, expected below {num_classes} or 255")
    counts = np.bincount(rows * num_classes + columns, weights=pixels, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def _count_pairs(
    truth: NDArray[np.uint8], prediction: NDArray[np.uint8]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Pairs (true byte, predicted byte) with their numbers of pixels; a pair may come more than once.

    Masks are made of long runs of one value: comparing neighbours and counting the runs costs a quarter of counting
    the pixels, whose increments of one and the same counter wait for each other.  Noise is counted by pixels.
    """
    pairs = truth.astype(np.uint16).ravel()
    pairs <<= 8
    pairs |= prediction.ravel()
    ends = np.flatnonzero(pairs[1:] != pairs[:-1])
    if ends.size * _LEAST_RUN_PX < pairs.size:
        last = np.append(ends, pairs.size - 1)
        found, pixels = pairs[last].astype(np.intp), np.diff(last, prepend=-1)
    else:
        counts = np.bincount(pairs)
        found = np.flatnonzero(counts)
        pixels = counts[found]
    return found >> 8, found & 255, pixels


def iou(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of each class (C,); NaN for a class that is neither in the truth nor predicted."""
    hit = np.diagonal(matrix).astype(np.float64)
    union = matrix.sum(0) + matrix.sum(1) - np.diagonal(matrix)
    return np.divide(hit, union, out=np.full(len(matrix), np.nan), where=union > 0)


def mean_iou(matrix: NDArray[np.int64]) -> float:
    """Mean of ``iou`` over the classes that are in the truth or predicted; NaN where nothing was counted.

    On VOC's lists all 21 classes occur, so this is the benchmark's mIoU; on a subset an absent class is left out.
    """
    values = iou(matrix)
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


def pixel_accuracy(matrix: NDArray[np.int64]) -> float:
    """Share of counted pixels with the right class; NaN where nothing was counted."""
    total = int(matrix.sum())
    return float(np.trace(matrix) / total) if total else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Per image
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseConfusions:
    """The non-zero cells of one confusion matrix per image; a typical image has four to ten."""

    num_classes: int
    ids: tuple[str, ...]
    image: NDArray[np.int32]
    """Position in ``ids`` of each cell's image, (nnz,), ascending."""
    cell: NDArray[np.int32]
    """truth · C + prediction, (nnz,)."""
    count: NDArray[np.int64]
    """Pixels, (nnz,)."""

    @classmethod
    def from_matrices(cls, num_classes: int, matrices: Iterable[tuple[str, NDArray[np.int64]]]) -> Self:
        """Keep the non-zero cells of (image id, matrix) pairs."""
        ids: list[str] = []
        parts: list[tuple[NDArray[np.intp], NDArray[np.int64]]] = []
        for image_id, matrix in matrices:
            ids.append(image_id)
            cells = np.flatnonzero(matrix)
            parts.append((cells, matrix.ravel()[cells]))
        lengths = [len(cells) for cells, _ in parts]
        return cls(
            num_classes=num_classes,
            ids=tuple(ids),
            image=np.repeat(np.arange(len(ids), dtype=np.int32), lengths),
            cell=np.concatenate([cells for cells, _ in parts] or [np.empty(0)]).astype(np.int32),
            count=np.concatenate([counts for _, counts in parts] or [np.empty(0)]).astype(np.int64),
        )

    @classmethod
    def merge(cls, parts: Sequence[SparseConfusions]) -> Self:
        """Join the images of ``parts``, at least one, in order."""
        starts = np.cumsum([0, *(len(part.ids) for part in parts)])
        return cls(
            num_classes=parts[0].num_classes,
            ids=tuple(image_id for part in parts for image_id in part.ids),
            image=np.concatenate([part.image + start for part, start in zip(parts, starts, strict=False)]).astype(
                np.int32
            ),
            cell=np.concatenate([part.cell for part in parts]),
            count=np.concatenate([part.count for part in parts]),
        )

    def total(self, only: Collection[str] | None = None) -> NDArray[np.int64]:
        """The sum (C, C) over all images, or over those in ``only``."""
        chosen = np.ones(len(self.ids), bool) if only is None else np.array([i in only for i in self.ids], bool)
        kept = chosen[self.image] if len(self.ids) else np.empty(0, bool)
        flat = np.zeros(self.num_classes**2, dtype=np.int64)
        np.add.at(flat, self.cell[kept], self.count[kept])
        return flat.reshape(self.num_classes, self.num_classes)

    def matrix(self, position: int) -> NDArray[np.int64]:
        """The matrix (C, C) of the image ``ids[position]``."""
        flat = np.zeros(self.num_classes**2, dtype=np.int64)
        start, stop = np.searchsorted(self.image, [position, position + 1])
        flat[self.cell[start:stop]] = self.count[start:stop]
        return flat.reshape(self.num_classes, self.num_classes)

    def select(self, ids: Iterable[str]) -> Self:
        """The counts of the images ``ids``, in that order; all must be there."""
        position = {image_id: number for number, image_id in enumerate(self.ids)}
        return type(self).from_matrices(self.num_classes, ((i, self.matrix(position[i])) for i in ids))

    def true_pixels(self) -> NDArray[np.int64]:
        """Counted pixels of each image and true class (N, C)."""
        cells = self.image.astype(np.int64) * self.num_classes + self.cell // self.num_classes
        counts = np.bincount(cells, self.count, minlength=len(self.ids) * self.num_classes)
        return counts.astype(np.int64).reshape(len(self.ids), self.num_classes)

    def mean_iou_by_image(self) -> dict[str, float]:
        """``mean_iou`` of each image alone: to find the best and the worst, never to be averaged into a score."""
        return {image_id: mean_iou(self.matrix(position)) for position, image_id in enumerate(self.ids)}


def write_confusions(path: Path, confusions: Mapping[str, SparseConfusions]) -> None:
    """Write one npz with the counts of each scored thing, atomically; equal counts give equal bytes."""
    arrays: dict[str, NDArray[Any]] = {}
    for thing, value in sorted(confusions.items()):
        arrays[f"{thing}.num_classes"] = np.array(value.num_classes, dtype=np.int64)
        arrays[f"{thing}.ids"] = np.frombuffer(json.dumps(value.ids).encode(), dtype=np.uint8)
        arrays[f"{thing}.image"] = value.image
        arrays[f"{thing}.cell"] = value.cell
        arrays[f"{thing}.count"] = value.count
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType] - takes them for allow_pickle too
    write_atomic(path, buffer.getvalue())


def read_confusions(path: Path) -> dict[str, SparseConfusions]:
    """Read what ``write_confusions`` wrote.

    Raises:
        DamagedFileError: the file does not read back.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            things = [name.removesuffix(".ids") for name in archive.files if name.endswith(".ids")]
            return {
                thing: SparseConfusions(
                    num_classes=int(archive[f"{thing}.num_classes"]),
                    ids=tuple(json.loads(archive[f"{thing}.ids"].tobytes())),
                    image=archive[f"{thing}.image"],
                    cell=archive[f"{thing}.cell"],
                    count=archive[f"{thing}.count"],
                )
                for thing in things
            }
    except (OSError, ValueError, KeyError, EOFError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFileError(f"{path} does not hold readable confusion counts ({error}); rebuild evaluate") from error


# ---------------------------------------------------------------------------------------------------------------------
# Every threshold in one pass
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ThresholdSweep:
    """Counts pixels by (truth, strongest class, its byte); every threshold's confusion matrix follows from these.

    Exact, since maps are bytes: at a cut, a pixel is its strongest class if its byte is above, else background.
    """

    num_classes: int
    histogram: NDArray[np.int64] = field(init=False)
    """(C, C, 256): truth, strongest class, byte."""

    def __post_init__(self) -> None:
        self.histogram = np.zeros((self.num_classes, self.num_classes, _NUM_BYTES), dtype=np.int64)

    def add(self, truth: NDArray[np.uint8], strongest: NDArray[np.uint8], value: NDArray[np.uint8]) -> None:
        """Count one image.

        Args:
            truth: Class indices and 255, (H, W).
            strongest: Class index of the strongest map, (H, W).
            value: Its byte, (H, W).
        """
        counted = truth != IGNORE_INDEX
        pairs = truth[counted].astype(np.intp) * self.num_classes + strongest[counted]
        counts = np.bincount(pairs * _NUM_BYTES + value[counted], minlength=self.histogram.size)
        self.histogram += counts.reshape(self.histogram.shape)

    def matrices(self) -> NDArray[np.int64]:
        """The confusion matrix at each cut, int64 (256, C, C): at cut k only bytes above k are foreground."""
        by_value = np.moveaxis(self.histogram, 2, 0)
        above = by_value[::-1].cumsum(axis=0)[::-1] - by_value
        matrices = above.copy()
        matrices[:, :, BACKGROUND_INDEX] += (by_value.sum(axis=0)[None] - above).sum(axis=2)
        return matrices
