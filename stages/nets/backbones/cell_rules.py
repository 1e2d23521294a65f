"""Where the cells of a network's maps look, known from how its layers of stride 2 are padded; torch-free."""

from __future__ import annotations

from enum import Enum


class CellRule(Enum):
    """Where the cells of a network's maps look, at every stride that its layers reach.

    Along a side of n pixels, numbered from 0, cell i at stride s looks at pixel first + s · i.
    """

    PADDED_KERNELS = "padded kernels"
    """Odd kernels of stride 2, padded alike on both sides: cells look at pixels 0, s, 2s ….  Most networks."""
    EVEN_POOLS = "even pools"
    """2×2 pools: a cell looks at the middle of its own s × s pixels.  VGG16."""
    UNPADDED_KERNELS = "unpadded kernels"
    """3×3 kernels of stride 2 without padding: cells look at pixels s - 1, 2s - 1 …; the rest has none."""
    TENSORFLOW_SAME = "TensorFlow's SAME"
    """Padding that at an even size is all at the end, so that the *last* cell looks at the last pixel, n - 1: the first
    one at s - 1 where s divides n, at 0 where it divides n - 1.  Networks whose weights come from TensorFlow."""

    def first_px(self, stride: int, side_px: int) -> float:
        """The pixel that cell 0 of a side of ``side_px`` pixels looks at."""
        match self:
            case CellRule.PADDED_KERNELS:
                return 0.0
            case CellRule.EVEN_POOLS:
                return (stride - 1) / 2
            case CellRule.UNPADDED_KERNELS:
                return float(stride - 1)
            case CellRule.TENSORFLOW_SAME:
                return float((side_px - 1) % stride)

    def num_cells(self, stride: int, side_px: int) -> int:
        """How many cells a side of ``side_px`` pixels has."""
        match self:
            case CellRule.PADDED_KERNELS | CellRule.TENSORFLOW_SAME:
                return -(-side_px // stride)
            case CellRule.EVEN_POOLS:
                return side_px // stride
            case CellRule.UNPADDED_KERNELS:
                return (side_px - 1) // stride
