"""Pixel-adaptive refinement (``stages.ops.par``)."""

from __future__ import annotations

from collections.abc import Sequence

from stages.masks.refinements.base import Image, Probabilities, Refinement, Start
from stages.ops.par import ParBatch, ParConfig


class _Par:
    """The neighbours' weights of some images; a ``BatchRefinement``."""

    def __init__(self, images: Sequence[Image], num_labels: Sequence[int], config: ParConfig, device: str) -> None:
        del num_labels
        self._batch = ParBatch(images, config, device=device)

    def refine(self, starts: Sequence[Start]) -> list[list[Probabilities]]:
        """One start after the other."""
        return [self._batch.refine(start.probabilities()) for start in starts]


PAR = Refinement("pixel-adaptive: weighted means over dilated neighbours of like colour", _Par, uses_torch=True)
