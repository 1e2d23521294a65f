"""What a refinement is: what it says of itself, and how it turns probabilities into better ones.

Reads and writes no file; torch-free.
Shapes: L labels of one image with background, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.masks.label_rules import SeedConfig, background_level, map_probabilities, threshold_maps

Image = NDArray[np.uint8]
"""RGB (H, W, 3)."""

Probabilities = NDArray[np.float32]
"""(L, H, W), background first, summing to 1 over L."""


@dataclass(frozen=True)
class Start:
    """What a refinement starts from: the upsampled maps of some images, or what the refinements before it made."""

    rule: SeedConfig
    """The threshold rule."""
    maps: Sequence[NDArray[np.uint8]]
    """(n, H, W) of each image."""
    states: Sequence[Probabilities] | None
    """The probabilities so far; None before the first refinement of pixels."""
    unary: Literal["labels", "maps"]
    """What a CRF takes: ``labels`` or ``probabilities``."""
    label_confidence: float
    """Probability that one of ``labels`` is right."""

    def probabilities(self) -> Sequence[Probabilities]:
        """The probabilities so far; before the first refinement those of the maps."""
        return [map_probabilities(each, self.rule) for each in self.maps] if self.states is None else self.states

    def labels(self) -> list[NDArray[np.integer]]:
        """The most probable labels 0 … L-1 (H, W) so far; before the first refinement those of the threshold rule."""
        if self.states is not None:
            return [each.argmax(axis=0) for each in self.states]
        level = background_level(self.rule)
        return [threshold_maps(each, level) for each in self.maps]


class BatchRefinement(Protocol):
    """What a refinement knows of some images; used from one start or several (``confident``)."""

    def refine(self, starts: Sequence[Start]) -> list[list[Probabilities]]:
        """From each start the probabilities of each image, refined."""
        ...


@dataclass(frozen=True)
class Refinement:
    """One refinement; the section of a config that it stands beside holds its options."""

    says: str
    """What it does, in a few words."""
    open: Callable[[Sequence[Image], Sequence[int], Any, str], BatchRefinement] | None
    """From images, the L of each, the options, and the device for torch; None for what works on the coarse maps."""
    uses_torch: bool = False
    """Whether it works with torch on a CPU too."""
