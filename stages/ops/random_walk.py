"""Random walk of attention maps over the affinities of one feature map: evidence spreads to cells of like features.

Pure tensor code, no I/O; torch is imported inside functions, so that the options are checked without it.  Nothing is
trained for it: the features are the classifier's own.
Shapes: n maps of one image, D feature channels, h w cells, N = h · w, k = 2 · radius - 1 cells along the window's side.
Source: PSA (Ahn and Kwak, CVPR 2018, §3.3) and irn (Ahn, Cho and Kwak, CVPR 2019; 057cea6 ``misc/indexing.py``) for the
walk and the window; CLIP-ES (Lin et al., CVPR 2023, §3.3; 78e0198 ``generate_cams_voc12.py``) for the training-free
walk, Sinkhorn's normalisation and the boxes.
Differs: theirs are learned affinities (PSA, irn) or a transformer's attention (CLIP-ES); here the cosine of features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.contracts import StageConfig
from stages.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_MOST_DENSE_CELLS = 16_384
"""Above this many cells, affinities of all pairs take more than a gigabyte."""


class RandomWalkConfig(StageConfig):
    """Which features say that two cells belong together, and how far evidence walks between them."""

    layer: str | None = Field(default=None, min_length=1)
    """Layer of the backbone whose features are compared (``layer3``, ``features.22``); null: its output."""
    short_side_px: int | None = Field(default=None, ge=16, le=4096)
    """Resize the image's shorter side to this for the features; null keeps the file's size."""
    beta: float = Field(default=10.0, gt=0, le=100)
    """Power of the cosine: higher keeps evidence among more similar cells.  Source: irn's β is 10, PSA's 8."""
    radius_cells: int | None = Field(default=5, ge=2, le=64)
    """Only cells nearer than this pass evidence on, in cells of the feature map; null: all pairs, as CLIP-ES has it.
    Source: PSA's γ and irn's are 5."""
    steps: int = Field(default=16, ge=0, le=4096)
    """Steps of the walk.  PSA and irn take 256 over learned affinities, CLIP-ES 2 over all pairs; 16 is ours, since the
    cosine of untrained affinities seldom falls to 0 at an edge and a long walk ends at a flat map."""
    sinkhorn: int = Field(default=0, ge=0, le=100)
    """Rounds of Sinkhorn's normalisation (rows and columns sum to 1), which keeps cells with many like ones from
    outweighing the others; 0 normalises rows once.  Source: CLIP-ES takes 3."""
    box_threshold: float | None = Field(default=None, ge=0, lt=1)
    """Only evidence inside the boxes around a map's parts above this fraction of its peak starts to walk; null: all.
    Source: CLIP-ES takes 0.4."""


class Affinity(Protocol):
    """A symmetric matrix (N, N) of weights ≥ 0 between the cells of one feature map, with 1 on its diagonal."""

    def apply(self, values: Tensor) -> Tensor:
        """The matrix times each of the values (n, h, w)."""
        ...


class DenseAffinity:
    """All pairs: N² numbers."""

    def __init__(self, features: Tensor, beta: float) -> None:
        """Compare every cell of features (D, h, w) with every other."""
        flat = _unit_features(features).flatten(1)
        self._weights = (flat.T @ flat).clamp_(0, 1).pow_(beta)
        self._weights.fill_diagonal_(1.0)

    def apply(self, values: Tensor) -> Tensor:
        """The matrix times each of the values (n, h, w)."""
        return (values.flatten(1) @ self._weights).view_as(values)


class LocalAffinity:
    """Pairs nearer than a radius: k² numbers a cell, zero outside the circle and outside the map."""

    def __init__(self, features: Tensor, radius: int, likeness: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Compare every cell of features (D, h, w) with those at a distance below ``radius``.

        Args:
            features: (D, h, w).
            radius: In cells.
            likeness: From two (D, rows, columns) the weights ≥ 0 (rows, columns) between cells of one place; symmetric.
        """
        self._margin = radius - 1
        self._side = 2 * self._margin + 1
        height, width = features.shape[1:]
        weights = features.new_zeros(self._side, self._side, height, width)
        for down, right in offsets_inside(radius):
            if abs(down) < height and abs(right) < width:
                here, there = shifted_views(height, width, down, right)
                weights[self._margin + down, self._margin + right, *here] = likeness(
                    features[:, *here], features[:, *there]
                )
        weights[self._margin, self._margin] = 1.0
        self._weights = weights.flatten(2).flatten(0, 1)

    def apply(self, values: Tensor) -> Tensor:
        """The matrix times each of the values (n, h, w)."""
        from torch.nn import functional

        windows = functional.unfold(values[:, None], self._side, padding=self._margin)
        return (windows * self._weights).sum(dim=1).view_as(values)


def offsets_inside(radius: int) -> list[tuple[int, int]]:
    """(rows down, columns to the right) of the cells at a distance below ``radius``, the cell itself among them."""
    reach = range(1 - radius, radius)
    return [(down, right) for down in reach for right in reach if down**2 + right**2 < radius**2]


def shifted_views(height: int, width: int, down: int, right: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Rows and columns of a map's cells whose neighbour ``down`` and ``right`` is on the map too, and of these."""
    here = slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right))
    there = slice(max(0, down), height - max(0, -down)), slice(max(0, right), width - max(0, -right))
    return here, there


def _unit_features(features: Tensor) -> Tensor:
    """Features (D, h, w) of length 1 at every cell, zero where there are none."""
    from torch.nn import functional

    return functional.normalize(features.float(), dim=0)


def build_affinity(features: Tensor, config: RandomWalkConfig) -> Affinity:
    """The affinities of features (D, h, w).

    Raises:
        InputError: all pairs are asked for and there are too many.
    """
    if config.radius_cells is not None:
        return LocalAffinity(
            _unit_features(features),
            config.radius_cells,
            lambda one, other: (one * other).sum(dim=0).clamp_(0, 1).pow_(config.beta),
        )
    num_cells = features.shape[1] * features.shape[2]
    if num_cells > _MOST_DENSE_CELLS:
        raise InputError(
            f"random_walk.radius_cells: null compares all pairs of at most {_MOST_DENSE_CELLS} cells, found "
            f"{features.shape[1]} × {features.shape[2]}; set radius_cells (5), or a smaller random_walk.short_side_px"
        )
    return DenseAffinity(features, config.beta)


def walk_maps(maps: Tensor, features: Tensor, config: RandomWalkConfig) -> Tensor:
    """Let the evidence of each map walk: a cell's new value is the mean of the cells like it, weighted by likeness.

    Args:
        maps: (n, h, w) evidence ≥ 0 on the cells of ``features``.
        features: (D, h, w).
        config: Affinities and steps.

    Returns:
        (n, h, w) ≥ 0, float32, no value above the map's largest; NaN wherever the walk comes by features that are NaN
        or infinite.

    Raises:
        InputError: too many cells for all pairs.
    """
    values = maps.float()
    if config.box_threshold is not None:
        values = values * values.new_tensor(
            np.stack([_box_mask(m, config.box_threshold) for m in values.cpu().numpy()])
        )
    if config.steps == 0:
        return values
    return spread(values, build_affinity(features, config), steps=config.steps, sinkhorn=config.sinkhorn)


def spread(values: Tensor, affinity: Affinity, *, steps: int, sinkhorn: int = 0) -> Tensor:
    """Values (n, h, w) after ``steps`` of a walk over the affinities; ``sinkhorn`` as in ``RandomWalkConfig``."""
    rows, columns = _scalings(affinity, values[:1], sinkhorn)
    for _ in range(steps):
        values = rows * affinity.apply(columns * values)
    return values


def _scalings(affinity: Affinity, like: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Factors (1, h, w) of rows and columns, after which every row sums to 1, and with ``rounds`` every column nearly.

    The matrix is symmetric, so one product gives the sums of its rows and of its columns.
    Differs: CLIP-ES averages the normalised matrix with its transpose; with more rounds the two become equal.
    """
    columns = like.new_ones(like.shape)
    rows = 1 / affinity.apply(columns)
    for _ in range(rounds):
        columns = 1 / affinity.apply(rows)
        rows = 1 / affinity.apply(columns)
    return rows, columns


def _box_mask(values: NDArray[np.float32], threshold: float) -> NDArray[np.float32]:
    """1 inside the boxes around the parts of a map (h, w) above ``threshold`` of its peak, 0 elsewhere."""
    from stages.ops.metrics.boxes import component_boxes

    mask = np.zeros_like(values)
    for left, top, right, bottom in component_boxes(values > threshold * values.max()):
        mask[top : bottom + 1, left : right + 1] = 1
    return mask
