"""Learned affinity: what a pair of cells loses when an embedding gets it wrong, and the walk over what it learned.

Pure tensor code, no I/O.
Shapes: B images, D numbers of a cell's embedding, n maps of one image, h w cells.
Source: PSA (Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
Semantic Segmentation", CVPR 2018, §3.2 and §3.3): the affinity exp(-|f_i - f_j|), the balanced loss and the walk.
Differs: a cell has neighbours on both sides in the loss too, each pair counted once; the walk goes step by step over
the cells within the radius, which gives what PSA's squared matrix gives and costs less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.ops.random_walk import LocalAffinity, offsets_inside, shifted_views, spread

IGNORED = 255
"""The label of a cell whose pairs count nowhere."""

_LEAST = 1e-5
"""Keeps logarithms finite.  Source: PSA."""


def pair_losses(embedding: Tensor, labels: Tensor, radius: int) -> dict[str, Tensor]:
    """The balanced loss of all pairs of cells at a distance below ``radius``, and its three means.

    A pair of one class should have affinity 1, a pair of two classes 0; pairs of the background and pairs of an object
    are averaged apart, so that the many of the one do not drown the few of the other.

    Args:
        embedding: (B, D, h, w).
        labels: (B, h, w) class indices, 0 is background, 255 is no label.
        radius: In cells.

    Returns:
        Scalars: ``loss`` = background / 4 + object / 4 + between / 2, and these means: of -log a over the pairs of the
        background and of the objects, and of -log(1 - a) over the pairs between two classes; 0 where there are none.
    """
    height, width = labels.shape[1:]
    sums = {name: embedding.new_zeros(()) for name in ("background", "object", "between")}
    counts = {name: torch.zeros((), dtype=torch.int64, device=labels.device) for name in sums}
    for down, right in offsets_inside(radius):
        if (down, right) <= (0, 0) or down >= height or abs(right) >= width:
            continue  # the other half are the same pairs
        here, there = shifted_views(height, width, down, right)
        affinity = (-_distance(embedding[:, :, *here], embedding[:, :, *there], dim=1)).exp()
        one, other = labels[:, *here], labels[:, *there]
        is_labelled = (one != IGNORED) & (other != IGNORED)
        alike, apart = -(affinity + _LEAST).log(), -(1 + _LEAST - affinity).log()
        terms = {
            "background": (is_labelled & (one == other) & (one == 0), alike),
            "object": (is_labelled & (one == other) & (one != 0), alike),
            "between": (is_labelled & (one != other), apart),
        }
        for name, (chosen, values) in terms.items():
            sums[name] = sums[name] + (values * chosen).sum()
            counts[name] = counts[name] + chosen.sum()
    means = {name: total / counts[name].clamp(min=1) for name, total in sums.items()}
    return {"loss": means["background"] / 4 + means["object"] / 4 + means["between"] / 2, **means}


def walk_learned(maps: Tensor, embedding: Tensor, *, radius: int, beta: float, log2_steps: int) -> Tensor:
    """Let the evidence of each map walk over the affinities of an embedding.

    Args:
        maps: (n, h, w) evidence ≥ 0.
        embedding: (D, h, w).
        radius: Cells nearer than this pass evidence on.
        beta: Power of the affinity.
        log2_steps: The walk has 2^this steps.

    Returns:
        (n, h, w) ≥ 0, no value above the map's largest; NaN wherever the walk comes by an embedding that is NaN.
    """
    likeness = LocalAffinity(embedding, radius, lambda one, other: (-beta * _distance(one, other, dim=0)).exp())
    return spread(maps.float(), likeness, steps=2**log2_steps)


def _distance(one: Tensor, other: Tensor, *, dim: int) -> Tensor:
    return (one - other).abs().mean(dim=dim)
