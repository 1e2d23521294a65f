"""A large image seen through overlapping windows: their scores are blended, and memory stays that of one strip.

Pure torch and numpy; reads and writes no file.
Shapes: B windows, C classes with background, N a window's side, H W image pixels, h w pixels of the network's image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

OVERLAP_RATIO = 0.25
"""Share of a window that its neighbour sees too: there the one fades out while the other fades in."""

_GRID_PX = 32
"""Windows but the last begin at multiples of every network's stride, where it samples as on the whole image."""

_BATCH_PX = 1 << 20
"""Pixels of the windows that are scored together: one of 1,024 pixels, sixteen of 256."""

_CHUNK_VALUES = 1 << 24
"""Floats that are made at once while probabilities are enlarged: 64 MiB."""

ScoreWindows = Callable[[NDArray[np.uint8]], Tensor]
"""RGB windows, uint8 (B, N, N, 3), to probabilities on the CPU, float32 (B, C, N, N)."""


def window_starts(length_px: int, window_px: int) -> list[int]:
    """Where windows begin along a side, so that they cover it and each overlaps the next by a quarter or more.

    Args:
        length_px: Of the side.
        window_px: Of a window; at most ``length_px``.
    """
    step = max(1, window_px - round(window_px * OVERLAP_RATIO))
    if step >= _GRID_PX:
        step -= step % _GRID_PX
    return [*range(0, length_px - window_px, step), length_px - window_px]


def window_weights(window_px: int) -> Tensor:
    """How much each pixel along a window counts, float32 (N,) in (0, 1]: a ramp over the overlap at both ends."""
    overlap_px = max(1, round(window_px * OVERLAP_RATIO))
    ends = torch.arange(window_px, dtype=torch.float32) + 0.5
    return torch.minimum(ends, ends.flip(0)).div(overlap_px).clamp(max=1)


def iter_blended_rows(
    score: ScoreWindows, image: NDArray[np.uint8], *, num_classes: int, window_px: int
) -> Iterator[tuple[int, Tensor]]:
    """Score an image window by window and give its rows away as soon as no further window can change them.

    At any time C · N · W floats of the strip are kept, and those of the windows that are scored together.

    Args:
        score: Scores windows of one size.
        image: RGB, uint8 (H, W, 3).
        num_classes: C.
        window_px: N; cut to the image's sides.

    Yields:
        The first row, and the mean of the windows' probabilities, float32 (C, rows, W); valid until the next one.
    """
    height, width = image.shape[:2]
    tall, wide = min(window_px, height), min(window_px, width)
    tops, lefts = window_starts(height, tall), window_starts(width, wide)
    weight = window_weights(tall)[:, None] * window_weights(wide)
    total = _total_weights(tops, tall, height)[:, None], _total_weights(lefts, wide, width)
    together = max(1, _BATCH_PX // (tall * wide))
    strip = torch.zeros(num_classes, tall, width)
    for number, top in enumerate(tops):
        if number:
            _move_up(strip, top - tops[number - 1])
        for first in range(0, len(lefts), together):
            some = lefts[first : first + together]
            windows = np.stack([image[top : top + tall, left : left + wide] for left in some])
            for left, probabilities in zip(some, score(windows), strict=True):
                strip[:, :, left : left + wide].addcmul_(probabilities, weight)
        rows = tall if top == tops[-1] else tops[number + 1] - top
        yield top, strip[:, :rows] / (total[0][top : top + rows] * total[1])


def _total_weights(starts: list[int], window_px: int, length_px: int) -> Tensor:
    """Sum of the windows' weights at each of ``length_px`` pixels."""
    total = torch.zeros(length_px)
    for start in starts:
        total[start : start + window_px] += window_weights(window_px)
    return total


def _move_up(strip: Tensor, rows: int) -> None:
    """Let the strip (C, N, W) begin ``rows`` lower; the rows that come in are zero."""
    kept = strip.shape[1] - rows
    if kept > 0:
        strip[:, :kept] = strip[:, rows:].clone()
    strip[:, max(0, kept) :] = 0


def predict_in_windows(
    score: ScoreWindows,
    image: NDArray[np.uint8],
    *,
    num_classes: int,
    window_px: int,
    mask_size: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """The class of every pixel of an image that is too large to be scored at once.

    Beside the image and the mask, 4 · C · N · min(H, W) bytes are needed for a strip (as much again while it is
    finished), those of the windows scored together, and, with another ``mask_size``, 4 · C · h · w bytes.

    Args:
        score: Scores windows of one size; sees them upright.
        image: What the network sees, RGB uint8 (h, w, 3).
        num_classes: C.
        window_px: N.
        mask_size: (H, W) of the mask, where it is not the image's: probabilities are resized bilinearly.

    Returns:
        Class indices, uint8 (H, W).
    """
    if image.shape[1] > image.shape[0]:  # strips lie along the shorter side: they are what takes memory
        turned = predict_in_windows(
            lambda windows: score(np.ascontiguousarray(windows.transpose(0, 2, 1, 3))).transpose(2, 3),
            image.transpose(1, 0, 2),
            num_classes=num_classes,
            window_px=window_px,
            mask_size=None if mask_size is None else (mask_size[1], mask_size[0]),
        )
        return np.ascontiguousarray(turned.T)
    rows = iter_blended_rows(score, image, num_classes=num_classes, window_px=window_px)
    height, width = image.shape[:2]
    if mask_size in (None, (height, width)):
        mask = np.empty((height, width), dtype=np.uint8)
        for top, probabilities in rows:
            mask[top : top + probabilities.shape[1]] = probabilities.argmax(dim=0).to(torch.uint8).numpy()
        return mask
    assert mask_size is not None
    whole = torch.empty(num_classes, height, width)
    for top, probabilities in rows:
        whole[:, top : top + probabilities.shape[1]] = probabilities
    return resized_argmax(whole, mask_size)


def resized_argmax(probabilities: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """``interpolate(probabilities, size, mode="bilinear").argmax(0)``, a few rows at a time.

    Args:
        probabilities: float32 (C, h, w).
        size: (H, W).

    Returns:
        uint8 (H, W).
    """
    num_classes, low_height, _ = probabilities.shape
    height, width = size
    centres = ((torch.arange(height) + 0.5) * (low_height / height) - 0.5).clamp(0, low_height - 1)
    above = centres.floor().long()
    below = (above + 1).clamp(max=low_height - 1)
    share = (centres - above)[:, None]
    together = max(1, _CHUNK_VALUES // (num_classes * width))
    mask = np.empty(size, dtype=np.uint8)
    for start in range(0, height, together):
        chunk = slice(start, start + together)
        mixed = torch.lerp(probabilities[:, above[chunk]], probabilities[:, below[chunk]], share[chunk])
        wide = functional.interpolate(mixed, size=width, mode="linear", align_corners=False)
        mask[chunk] = wide.argmax(dim=0).to(torch.uint8).numpy()
    return mask
