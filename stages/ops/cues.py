"""SEC's localisation cues: a few cells of a coarse grid that are surely a class or surely background.

Pure functions without torch.  No stage uses them yet: they are for SEC's seeding loss, which comes with its segmenter;
pseudo-masks at the image's size are made by the threshold rule (``stages.ops.seeds``).
Shapes: n labels of one image, H W cells of the source maps, h w cells of the cues.
Source: Kolesnikov and Lampert, "Seed, Expand and Constrain", ECCV 2016, §3.1 and its public code (20 % of the maximum
for foreground, the lowest 10 % of a gradient saliency of Simonyan et al. for background, 41 × 41 cells).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, ClassList

CUE_SIZE = (41, 41)
"""Cells (height, width) of SEC's network output for its 321 × 321 input."""

FOREGROUND_RATIO = 0.2
"""Above this share of its maximum a class's map is a cue."""

BACKGROUND_RATIO = 0.1
"""Share of the cells, those of the lowest saliency, that is a cue for background."""


def foreground_cues(
    maps: NDArray[np.floating], *, size: tuple[int, int] = CUE_SIZE, ratio: float = FOREGROUND_RATIO
) -> NDArray[np.bool_]:
    """The cells where each class's map exceeds ``ratio`` of its own maximum.

    Args:
        maps: Attention (n, H, W) of the image's labels, any scale; what is negative says nothing.
        size: (h, w) cells of the cues; maps of another size are resampled bilinearly first.
        ratio: Share of the maximum over the cells.

    Returns:
        bool (n, h, w); a map without a positive value has no cue.
    """
    cells = np.maximum(np.stack([_resample(each, size) for each in maps]) if len(maps) else np.empty((0, *size)), 0)
    peaks = cells.max(axis=(1, 2), initial=0.0)[:, None, None]
    return (cells > ratio * peaks) & (peaks > 0)


def background_cues(
    saliency: NDArray[np.floating], *, size: tuple[int, int] = CUE_SIZE, ratio: float = BACKGROUND_RATIO
) -> NDArray[np.bool_]:
    """The ``ratio`` of the cells with the lowest saliency after a 3 × 3 median.

    Args:
        saliency: (H, W), how much the class scores depend on each place: the largest absolute gradient over channels.
        size: (h, w) cells of the cues.
        ratio: Share of the cells; the number is rounded down.  Of cells of equal saliency the first in reading order
            are taken, so that the number is exact.

    Returns:
        bool (h, w).
    """
    cells = _median_3x3(_resample(saliency, size))
    chosen = np.zeros(cells.size, dtype=bool)
    chosen[np.argsort(cells, axis=None, kind="stable")[: int(ratio * cells.size + 1e-9)]] = True
    return chosen.reshape(size)


def combine_cues(
    foreground: NDArray[np.bool_], background: NDArray[np.bool_], labels: tuple[int, ...]
) -> NDArray[np.uint8]:
    """One label for each cell: foreground before background, and of several classes the one with the smallest area.

    Args:
        foreground: Cues (n, h, w) of each label; a class's area is the number of its cells before any conflict.
        background: Cues (h, w).
        labels: The n label indices.

    Returns:
        Class indices (h, w), 0 background, 255 where there is no cue; of equal areas the first label wins.

    Source:
        yutaroyamanaka/torch-seed-expand-constrain for the smallest area; SEC's released cues have no conflict left.
    """
    cues = np.full(background.shape, IGNORE_INDEX, dtype=np.uint8)
    cues[background] = BACKGROUND_INDEX
    areas = foreground.sum(axis=(1, 2))
    for position in sorted(range(len(labels)), key=lambda each: (-areas[each], -each)):  # the last one written wins
        cues[foreground[position]] = ClassList.class_index(labels[position])
    return cues


def _resample(values: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float32]:
    """(H, W) to (h, w), bilinearly and averaging where it shrinks; as it is where the size is right."""
    height, width = size
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)


def _median_3x3(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The median of each cell's 3 × 3 neighbourhood; beyond the border its values are repeated."""
    height, width = values.shape
    padded = np.pad(values, 1, mode="edge")
    shifts = [padded[row : row + height, column : column + width] for row in range(3) for column in range(3)]
    return np.median(np.stack(shifts), axis=0).astype(np.float32)
