"""Mean field of the dense CRF on a permutohedral lattice, in torch operations only.

For CUDA, and for machines with neither pydensecrf2 nor numba.  Probabilities agree with pydensecrf's
within 1e-3, save single pixels near a tie, where the iterations amplify either one's float32 rounding.
Reads and writes no file.  Splatting, blurring and slicing are weighted sums of rows, so each is one ``embedding_bag``,
which is deterministic (no atomic additions) and parallel.
Images of a batch share one lattice, on which none is a neighbour of another.
Shapes: N pixels of all B images, d feature dimensions, D = d + 1 corners of a simplex, M lattice vertices, L labels.
Source: Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010 (the lattice);
Krähenbühl and Koltun, 2011 (the mean field, symmetric normalisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from stages.ops.crf.presets import CrfNumbers

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


def _vertex_codes(vertex: Tensor, rank: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """Number all corners of all simplices: codes (N, D), and each coordinate's multiplier (d,) in a code.

    A lattice point is known by its first d coordinates; a code is those in mixed radix, with room for one step, and
    then the number of the group (N,): points of different groups are never one, nor neighbours.
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
    codes = ((keys - low) * multiplier).sum(-1)
    if group is not None:
        codes += group[:, None] * (multiplier[-1] * extent[-1])
    return codes, multiplier


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

    def __init__(self, features: Tensor, group: Tensor | None = None) -> None:
        """Build the lattice.

        Args:
            features: Positions divided by the kernel's widths, float32 (N, d).
            group: Number of each row's group, int64 (N,), such as its image: groups are filtered apart; None is one.
        """
        elevated = _elevate(features)
        vertex, rank = _enclosing_simplex(elevated)
        self._weights = _barycentric(elevated, vertex, rank)
        codes, multiplier = _vertex_codes(vertex, rank, group)
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
    """The kernels of a batch of images, of any sizes, on a torch device; a ``BatchCrf``."""

    def __init__(
        self,
        images: Sequence[NDArray[np.uint8]],
        numbers: CrfNumbers,
        *,
        device: str = "cpu",
        tolerance: float | None = None,
    ) -> None:
        """Build both lattices of all images.

        Args:
            images: RGB, uint8 (H, W, 3) each; at least one.
            numbers: Weights and widths.
            device: cpu or cuda; mps works on the CPU.
            tolerance: An image keeps the marginals of the step that moved none by as much; None makes all steps.
        """
        self._sizes: list[tuple[int, int]] = [(image.shape[0], image.shape[1]) for image in images]
        self._num_pixels = [height * width for height, width in self._sizes]
        self._tolerance = tolerance
        self.steps = [0] * len(images)
        """Mean-field steps of each image in the last ``infer``."""
        # MPS lacks some of the integer operations that the lattice is built with
        self._device = torch.device("cpu" if device.startswith("mps") else device)
        with torch.inference_mode():
            position = torch.cat([_positions(*size) for size in self._sizes]).to(self._device)
            flat = [torch.tensor(np.ascontiguousarray(image)).reshape(-1, 3) for image in images]
            colour = torch.cat(flat).to(self._device).float()
            bilateral = torch.cat([position / numbers.bilateral_sxy_px, colour / numbers.bilateral_srgb], 1)
            group = self._image_of_each_pixel() if len(images) > 1 else None
            self._kernels = (
                (numbers.gaussian_weight, PermutohedralFilter(position / numbers.gaussian_sxy_px, group)),
                (numbers.bilateral_weight, PermutohedralFilter(bilateral, group)),
            )

    def _image_of_each_pixel(self) -> Tensor:
        counts = torch.tensor(self._num_pixels, device=self._device)
        return torch.repeat_interleave(torch.arange(len(counts), device=self._device), counts)

    def infer(self, unaries: Sequence[NDArray[np.float32]], iterations: int) -> list[NDArray[np.float32]]:
        """Marginals (L, H, W) of each image after at most ``iterations`` steps from its energies (L, H, W).

        The images may have different numbers of labels.
        """
        with torch.inference_mode():
            energy = self._joined(unaries)
            marginals = self._mean_field(energy, iterations).split(self._num_pixels)
            return [
                part[:, : len(unary)].T.reshape(unary.shape).cpu().numpy().copy()
                for part, unary in zip(marginals, unaries, strict=True)
            ]

    def infer_sets(
        self, sets: Sequence[Sequence[NDArray[np.float32]]], iterations: int
    ) -> list[list[NDArray[np.float32]]]:
        """As ``infer`` for each set, one after the other."""
        return [self.infer(unaries, iterations) for unaries in sets]

    def _joined(self, unaries: Sequence[NDArray[np.float32]]) -> Tensor:
        """Energies (N, most labels of an image); infinite for labels that an image does not have."""
        num_labels = max(len(unary) for unary in unaries)
        rows = [torch.tensor(np.ascontiguousarray(unary)).reshape(len(unary), -1).T for unary in unaries]
        energy = torch.cat([functional.pad(row, (0, num_labels - row.shape[1]), value=torch.inf) for row in rows])
        return energy.contiguous().to(self._device)

    def _mean_field(self, energy: Tensor, iterations: int) -> Tensor:
        self.steps = [0] * len(self._sizes)
        is_moving = [True] * len(self._sizes)
        marginals = torch.softmax(-energy, 1)
        for _ in range(iterations):
            before, marginals = marginals, self._step(energy, marginals)
            self.steps = [steps + moves for steps, moves in zip(self.steps, is_moving, strict=True)]
            if self._tolerance is None:
                continue
            marginals = self._keep_still(before, marginals, is_moving)
            is_moving = [
                m and c for m, c in zip(is_moving, self._moves(before, marginals, self._tolerance), strict=True)
            ]
            if not any(is_moving):
                break
        return marginals

    def _step(self, energy: Tensor, marginals: Tensor) -> Tensor:
        logits = -energy
        for weight, kernel in self._kernels:
            logits = logits + weight * kernel(marginals)
        return torch.softmax(logits, 1)

    def _keep_still(self, before: Tensor, after: Tensor, is_moving: Sequence[bool]) -> Tensor:
        """``after``, but ``before`` for the images that do not move any more."""
        if all(is_moving):
            return after
        pairs = zip(before.split(self._num_pixels), after.split(self._num_pixels), is_moving, strict=True)
        return torch.cat([new if moves else old for old, new, moves in pairs])

    def _moves(self, before: Tensor, after: Tensor, tolerance: float) -> list[bool]:
        """Whether a probability of the image moved by the tolerance or more."""
        moved = [part.amax() for part in (after - before).abs().split(self._num_pixels)]
        return (torch.stack(moved) >= tolerance).tolist()


def _positions(height: int, width: int) -> Tensor:
    """Column and row of each pixel, float32 (H·W, 2)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows], -1).reshape(-1, 2).float()
