"""Where the cells of a map look in the image, and maps brought to pixels or to cells that span the image evenly.

Pure tensor code, no I/O, no config.  A pixel's number is that of its centre: the first pixel of a side of n is 0, the
last one n - 1.  Everything is bilinear along rows and columns and written as two products of matrices: their gradient
is the same to the bit on every device, and every format of exported networks knows them.
Shapes: n maps, h w map cells, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CellAxis(NamedTuple):
    """The cells along one side of an image: cell i looks at pixel ``first_px + i * stride_px``."""

    first_px: float
    stride_px: float

    @classmethod
    def even(cls, cells: int, side_px: int) -> CellAxis:
        """The axis of ``cells`` cells that span ``side_px`` pixels evenly."""
        return cls((side_px / cells - 1) / 2, side_px / cells)


class CellGrid(NamedTuple):
    """Which pixels the cells of a map look at."""

    rows: CellAxis
    columns: CellAxis

    @classmethod
    def even(cls, cells: Sequence[int], size: Sequence[int]) -> CellGrid:
        """The grid of (h, w) ``cells`` that span an image of ``size`` (H, W) evenly."""
        return cls(CellAxis.even(cells[0], size[0]), CellAxis.even(cells[1], size[1]))


PIXELS = CellGrid(CellAxis(0.0, 1.0), CellAxis(0.0, 1.0))
"""Cells that are the pixels themselves."""


def cells_to_pixels(maps: Tensor, size: tuple[int, int], cells: CellGrid) -> Tensor:
    """A map's values at every pixel; outside of the outermost cells' centres those of these cells.

    Args:
        maps: (..., h, w).
        size: (H, W) of the image that the network saw.
        cells: Where the map's cells look in it.

    Returns:
        float32 (..., H, W).
    """
    return resample_maps(maps, size=size, image_size=size, cells=cells)


def resample_maps(
    maps: Tensor, *, size: Sequence[int], image_size: Sequence[int], cells: CellGrid, is_flipped: bool = False
) -> Tensor:
    """Bring the maps of one perhaps padded, perhaps mirrored network input to cells that span its image evenly.

    Args:
        maps: (..., h, w).
        size: Rows and columns of the result.
        image_size: (H, W) of the image, which stands at the top left of the network's input.
        cells: Where the cells of ``maps`` look in that input.
        is_flipped: The image was mirrored left to right before it was padded; the result is mirrored back.

    Returns:
        float32 (..., *size), also under autocast; same device.
    """
    rows, columns = (CellAxis.even(count, side_px) for count, side_px in zip(size, image_size, strict=True))
    if is_flipped:
        columns = CellAxis(image_size[1] - 1 - columns.first_px, -columns.stride_px)
    with torch.autocast(maps.device.type, enabled=False):
        down = _interpolation(size[0], rows, maps.shape[-2], cells.rows, maps.device)
        across = _interpolation(size[1], columns, maps.shape[-1], cells.columns, maps.device)
        return down @ maps.float() @ across.T


def pixels_to_cells(pixels: Tensor, size: tuple[int, int], cells: CellGrid) -> Tensor:
    """Means of the pixels around each cell's centre, as many to each side as lie half-way to the next cell.

    Args:
        pixels: (..., H, W).
        size: (h, w).
        cells: Where the cells look.

    Returns:
        float32 (..., h, w), also under autocast; pixels beyond the image count as zeros in the mean.
    """
    if cells == PIXELS:
        return pixels.float()
    with torch.autocast(pixels.device.type, enabled=False):
        down = _shares(size[0], cells.rows, pixels.shape[-2], pixels.device)
        across = _shares(size[1], cells.columns, pixels.shape[-1], pixels.device)
        return down @ pixels.float() @ across.T


def _centres(count: int, axis: CellAxis, device: torch.device) -> Tensor:
    """Pixels that ``count`` cells look at, float32 (count,)."""
    middles = torch.arange(count, dtype=torch.float32, device=device) + 0.5
    return middles * axis.stride_px + (axis.first_px - axis.stride_px / 2)


def _interpolation(wanted: int, at: CellAxis, count: int, cells: CellAxis, device: torch.device) -> Tensor:
    """How much each of ``count`` cells counts at each of ``wanted`` centres, (wanted, count); rows sum to 1."""
    places = (_centres(wanted, at, device) - cells.first_px) / cells.stride_px
    numbers = torch.arange(count, dtype=torch.float32, device=device)
    return (1 - (places.clamp(0, count - 1)[:, None] - numbers).abs()).clamp(min=0)


def _shares(count: int, cells: CellAxis, side_px: int, device: torch.device) -> Tensor:
    """How much of each cell every pixel is, (count, side_px); a row sums to 1 where its cell lies inside the image."""
    numbers = torch.arange(side_px, dtype=torch.float32, device=device)
    apart = (_centres(count, cells, device)[:, None] - numbers).abs()
    return (cells.stride_px / 2 + 0.5 - apart).clamp(0, 1) / cells.stride_px
