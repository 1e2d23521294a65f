"""Mean field of the dense CRF on a permutohedral lattice, in torch operations only.

For machines without pydensecrf2, which has no wheel, and for CUDA.  Probabilities agree with pydensecrf's
within 1e-3, save single pixels near a tie, where the iterations amplify either one's float32 rounding.
Reads and writes no file.  Splatting, blurring and slicing are weighted sums of rows, so each is one ``embedding_bag``,
which is deterministic (no atomic additions) and parallel.
Shapes: N = H·W pixels, d feature dimensions, D = d + 1 corners of a simplex, M lattice vertices, L labels.
Source: Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010 (the lattice);
Krähenbühl and Koltun, 2011 (the mean field, symmetric normalisation).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from stages.ops.crf import CrfNumbers

_EPS = 1e-20
"""What pydensecrf adds under the root of the normalisation."""


def _elevate(features: Tensor) -> Tensor:
    """Map features (N, d) on the plane of coordinates (N, D) that sum to zero.

    Source: Adams et al., section 3.1; the factor sqrt(2/3)·D counts in the blur's own variance.
    """
    d = features.shape[1]
    scale = [np.sqrt(2 / 3) * (d + 1) / np.sqrt((i + 1) * (i + 2)) for i in range(d)]
    scaled = features * features.new_tensor(scale)
    elevated = features.new_empty(len(features), d + 1)
    total = features.new_zeros(len(features))
    for j in range(d, 0, -1):
        elevated[:, j] = total - j * scaled[:, j - 1]
        total = total + scaled[:, j - 1]
    elevated[:, 0] = total
    return elevated


def _enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """Find the simplex around each point.

    Returns:
        Its remainder-0 vertex, int64 (N, D), and the rank of each coordinate's offset from it, int64 (N, D).
    """
    size = elevated.shape[1]
    nearest = torch.round(elevated / size)
    overshoot = nearest.sum(1).long()
    offset = elevated - nearest * size
    rank = torch.zeros_like(elevated, dtype=torch.long)
    for i in range(size):
        for j in range(i + 1, size):
            is_less = offset[:, i] < offset[:, j]
            rank[:, i] += is_less
            rank[:, j] += ~is_less
    rank += overshoot[:, None]
    correction = size * ((rank < 0).long() - (rank >= size).long())
    return nearest.long() * size + correction, rank + correction


def _barycentric(elevated: Tensor, vertex: Tensor, rank: Tensor) -> Tensor:
    """Weights (N, D) of the simplex's corners, summing to 1 (Adams et al., proposition 4.2)."""
    size = elevated.shape[1]
    offset = (elevated - vertex) / size
    weights = elevated.new_zeros(len(elevated), size + 1)
    weights.scatter_add_(1, size - 1 - rank, offset)
    weights.scatter_add_(1, size - rank, -offset)
    weights[:, 0] += 1 + weights[:, size]
    return weights[:, :size].contiguous()


def _vertex_codes(vertex: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Number all corners of all simplices: codes (N, D), and each coordinate's multiplier (d,) in a code.

    A lattice point is known by its first d coordinates; a code is those in mixed radix, with room for one step.
    """
    size = vertex.shape[1]
    d = size - 1
    corner = torch.arange(size, device=vertex.device)
    step = torch.where(corner[None, :] <= d - corner[:, None], corner[:, None], corner[:, None] - size)
    keys = vertex[:, None, :d] + step[:, rank[:, :d]].permute(1, 0, 2)
    low = keys.amin((0, 1)) - size
    extent = keys.amax((0, 1)) + size - low + 1
    multiplier = torch.ones_like(extent)
    multiplier[1:] = extent[:-1].cumprod(0)
    return ((keys - low) * multiplier).sum(-1), multiplier


def _neighbours(codes: Tensor, multiplier: Tensor) -> Tensor:
    """The two neighbours of each vertex along each of the D axes, int64 (D, M, 2); M where there is none.

    Args:
        codes: Sorted codes of the vertices, (M,).
        multiplier: Of ``_vertex_codes``, (d,).
    """
    num_vertices, d = len(codes), len(multiplier)
    steps = -multiplier.sum() + torch.cat([multiplier * (d + 1), multiplier.new_zeros(1)])
    signs = codes.new_tensor([1, -1])
    wanted = codes[None, :, None] + steps[:, None, None] * signs
    found = torch.searchsorted(codes, wanted).clamp(max=num_vertices - 1)
    return torch.where(codes[found] == wanted, found, num_vertices)


def _weighted_sums(rows: Tensor, index: Tensor, weights: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Sum rows (·, L) with weights: bags are the rows of ``index``, or start at ``offsets`` of a flat ``index``."""
    return functional.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights)


class PermutohedralFilter:
    """Gaussian filter of unit width over given features, normalised symmetrically."""

    def __init__(self, features: Tensor) -> None:
        """Build the lattice.

        Args:
            features: Positions divided by the kernel's widths, float32 (N, d).
        """
        elevated = _elevate(features)
        vertex, rank = _enclosing_simplex(elevated)
        self._weights = _barycentric(elevated, vertex, rank)
        codes, multiplier = _vertex_codes(vertex, rank)
        unique, self._corners = torch.unique(codes, return_inverse=True)
        self.num_vertices = len(unique)
        self._neighbours = _neighbours(unique, multiplier)
        self._group_by_vertex()
        size = self._corners.shape[1]
        self._alpha = 1 / (1 + 2.0 ** -(size - 1))
        mass = self._filter(features.new_ones(len(features), 1))
        self._norm = 1 / torch.sqrt(mass + _EPS)

    def _group_by_vertex(self) -> None:
        """Order the (pixel, corner) pairs by vertex, so that splatting sums runs instead of scattering."""
        size = self._corners.shape[1]
        flat = self._corners.reshape(-1)
        order = torch.argsort(flat, stable=True)
        self._splat_pixels = order // size
        self._splat_weights = self._weights.reshape(-1)[order]
        counts = torch.bincount(flat, minlength=self.num_vertices)
        self._splat_offsets = counts.cumsum(0) - counts

    def _filter(self, values: Tensor) -> Tensor:
        """Splat, blur along each axis, slice: (N, L) to (N, L)."""
        lattice = _weighted_sums(values, self._splat_pixels, self._splat_weights, self._splat_offsets)
        nowhere = lattice.new_zeros(1, lattice.shape[1])
        half = lattice.new_full((self.num_vertices, 2), 0.5)
        for pair in self._neighbours:
            lattice = lattice + _weighted_sums(torch.cat([lattice, nowhere]), pair, half)
        return _weighted_sums(lattice * self._alpha, self._corners, self._weights)

    def __call__(self, values: Tensor) -> Tensor:
        """Filter float32 (N, L)."""
        return self._norm * self._filter(values * self._norm)


class TorchCrf:
    """The kernels of one image on a torch device; an ``ImageCrf``."""

    def __init__(self, image: NDArray[np.uint8], numbers: CrfNumbers, *, device: str = "cpu") -> None:
        """Build both lattices.

        Args:
            image: RGB, uint8 (H, W, 3).
            numbers: Weights and widths.
            device: cpu or cuda; mps works on the CPU.
        """
        height, width = image.shape[:2]
        self._size = (height, width)
        # MPS lacks some of the integer operations that the lattice is built with
        self._device = torch.device("cpu" if device.startswith("mps") else device)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        position = torch.stack([columns, rows], -1).reshape(-1, 2).float().to(self._device)
        colour = torch.tensor(np.ascontiguousarray(image)).reshape(-1, 3).float().to(self._device)
        bilateral = torch.cat([position / numbers.bilateral_sxy_px, colour / numbers.bilateral_srgb], 1)
        with torch.inference_mode():
            self._kernels = (
                (numbers.gaussian_weight, PermutohedralFilter(position / numbers.gaussian_sxy_px)),
                (numbers.bilateral_weight, PermutohedralFilter(bilateral)),
            )

    def infer(self, unary: NDArray[np.float32], iterations: int) -> NDArray[np.float32]:
        """Marginals (L, H, W) after ``iterations`` steps from the energies ``unary`` (L, H, W)."""
        if unary.shape[1:] != self._size:
            raise ValueError(f"expected a unary (L, *{self._size}), got {unary.shape}")
        with torch.inference_mode():
            energy = torch.tensor(np.ascontiguousarray(unary)).reshape(len(unary), -1).T.contiguous()
            energy = energy.to(self._device)
            marginals = torch.softmax(-energy, 1)
            for _ in range(iterations):
                logits = -energy
                for weight, kernel in self._kernels:
                    logits = logits + weight * kernel(marginals)
                marginals = torch.softmax(logits, 1)
            return marginals.T.reshape(unary.shape).cpu().numpy().copy()
