"""How sure a score is: resample the images of a data set and score each resample.

Pure functions; nothing is read or written.  Draws are seeded, counts are integers and their sums exact: equal counts
give equal intervals, whatever the number of threads.
Shapes: N images, C classes with background, S resamples.
Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3 (percentile interval).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.ops.metrics.confusion import SparseConfusions

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
_SEED = 2012
_BLOCK = 1 << 20
"""Drawn images that are held at once."""


@dataclass(frozen=True)
class Interval:
    """The middle 95 % of the resamples' scores, fractions."""

    low: float
    high: float


def interval(scores: NDArray[np.float64]) -> Interval | None:
    """The percentile interval of resampled ``scores`` (S,); None where none of them is a number."""
    known = scores[~np.isnan(scores)]
    if not known.size:
        return None
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(known, [tail, 100 - tail])
    return Interval(float(low), float(high))


def resample_iou(
    counts: Sequence[SparseConfusions], *, num_classes: int | None = None, num_resamples: int = NUM_RESAMPLES
) -> NDArray[np.float64]:
    """IoU of each class and of each of several things, on the same resamples of their common images.

    An image enters a resample as often as it is drawn, with replacement.

    Args:
        counts: Counts of the things, each of the same images in the same order: scores of one resample are pairs.
        num_classes: C, the first classes that are scored; by default all (boundary counts have one that is none).
        num_resamples: S.

    Returns:
        IoU (number of things, S, C); NaN for a class that a resample has neither in the truth nor predicted.

    Raises:
        ValueError: the things have different images.
    """
    ids = counts[0].ids
    if any(other.ids != ids for other in counts):
        raise ValueError("counts must be of the same images in the same order")
    classes = num_classes or counts[0].num_classes
    if not ids:
        return np.full((len(counts), num_resamples, classes), np.nan)
    tables = [_marginals(thing, classes) for thing in counts]
    blocks = [
        np.stack([_iou((weights @ table.reshape(len(ids), -1)).reshape(-1, *table.shape[1:])) for table in tables])
        for weights in _draw(len(ids), num_resamples)
    ]
    return np.concatenate(blocks, axis=1)


def mean_over_classes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of ``values`` (…, C) over the classes that are no NaN, as ``mean_iou`` has it; NaN where all are."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    total = np.where(known, values, 0).sum(axis=-1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _marginals(counts: SparseConfusions, num_classes: int) -> NDArray[np.float64]:
    """Hits, true and predicted pixels of each image and class (N, 3, C): all that IoU needs of a matrix."""
    rows, columns = np.divmod(counts.cell, counts.num_classes)
    table = np.empty((len(counts.ids), 3, counts.num_classes))
    for place, (labels, chosen) in enumerate(((rows, rows == columns), (rows, ...), (columns, ...))):
        cells = counts.image.astype(np.int64) * counts.num_classes + labels
        pixels = np.bincount(cells[chosen], counts.count[chosen], minlength=table[:, place].size)
        table[:, place] = pixels.reshape(-1, counts.num_classes)
    return table[:, :, :num_classes]


def _draw(num_images: int, num_resamples: int) -> Iterator[NDArray[np.float64]]:
    """How often each image is in each resample, (block, N) at a time."""
    rng = np.random.default_rng(_SEED)
    step = max(1, _BLOCK // num_images)
    for start in range(0, num_resamples, step):
        block = min(step, num_resamples - start)
        drawn = rng.integers(0, num_images, (block, num_images))
        drawn += np.arange(block)[:, None] * num_images
        yield np.bincount(drawn.ravel(), minlength=block * num_images).reshape(block, num_images).astype(np.float64)


def _iou(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU (S, C) of hits, true and predicted pixels (S, 3, C)."""
    hits, union = sums[:, 0], sums[:, 1] + sums[:, 2] - sums[:, 0]
    return np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)
