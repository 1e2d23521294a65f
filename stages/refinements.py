"""The refinements of a pseudo-mask by name, and the chain of them that a config asks for.

Reads and writes no file.  A refinement of pixels takes and gives probabilities (L, H, W); ``random_walk`` comes before
them all and turns attention maps into attention maps (``stages.walked_maps``).  A new refinement is one file in
``stages.ops``, its line in REFINEMENTS, and its section in ``RefinementConfig``: see ``docs/refinements.md``.
Shapes: n labels of one image, L = n + 1 labels with background, H W image pixels.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from stages.contracts import AttentionRecord
from stages.ops.crf import CrfConfig, label_unary, open_crf_batch, probability_unary
from stages.ops.par import ParBatch, ParConfig
from stages.ops.random_walk import RandomWalkConfig
from stages.ops.seeds import (
    SeedConfig,
    background_level,
    combine_confident,
    initial_mask,
    map_probabilities,
    threshold_maps,
    to_class_indices,
    upsample_maps,
)

RefinementName = Literal["crf", "par", "random_walk"]

Image = NDArray[np.uint8]
"""RGB (H, W, 3)."""

Probabilities = NDArray[np.float32]
"""(L, H, W), background first, summing to 1 over L."""

WALK = "random_walk"
"""The refinement that works on the maps' own grid and needs the trained classifier."""


class BatchRefinement(Protocol):
    """What a refinement knows of some images; used with one set of probabilities or several."""

    def refine(self, probabilities: Sequence[Probabilities]) -> list[Probabilities]:
        """The probabilities of each image, refined."""
        ...


class _Crf:
    """The dense CRF, with probabilities at both ends."""

    def __init__(self, images: Sequence[Image], num_labels: Sequence[int], config: CrfConfig, device: str) -> None:
        self._batch = open_crf_batch(images, num_labels, config, device=device)
        self._iterations = config.iterations

    def refine(self, probabilities: Sequence[Probabilities]) -> list[Probabilities]:
        return self.refine_energies([probability_unary(each) for each in probabilities])

    def refine_energies(self, unaries: Sequence[NDArray[np.float32]]) -> list[Probabilities]:
        return self._batch.infer(unaries, self._iterations)


def _open_par(images: Sequence[Image], num_labels: Sequence[int], config: ParConfig, device: str) -> BatchRefinement:
    del num_labels
    return ParBatch(images, config, device=device)


@dataclass(frozen=True)
class Refinement:
    """One entry of the registry."""

    open: Callable[[Sequence[Image], Sequence[int], Any, str], BatchRefinement] | None
    """From images, the L of each, the refinement's own options, and device; None for what works on maps."""
    says: str
    """What it does, in a few words."""


REFINEMENTS: Mapping[RefinementName, Refinement] = {
    "crf": Refinement(_Crf, "dense CRF: pixels of like colour and place agree, over the whole image"),
    "par": Refinement(_open_par, "pixel-adaptive: weighted means over dilated neighbours of like colour"),
    "random_walk": Refinement(None, "the maps spread over cells of like features of the classifier"),
}
"""The refinements; a config's section of the same name holds the options."""


class RefinementConfig(SeedConfig):
    """The threshold rule, and what fits its masks to the image."""

    refine: Literal["none", "crf", "par", "random_walk"] | tuple[RefinementName, ...] = "crf"
    """none, the name of a refinement, or a list of them, applied in this order (``[random_walk, par, crf]``)."""
    crf: CrfConfig = CrfConfig(preset="irn")
    """Numbers of the CRF."""
    par: ParConfig = ParConfig()
    """Numbers of the pixel-adaptive refinement."""
    random_walk: RandomWalkConfig = RandomWalkConfig()
    """Numbers of the random walk."""
    unary: Literal["labels", "maps"] = "labels"
    """What a CRF that comes first starts from: the thresholded labels with a confidence, or the rescaled maps."""
    label_confidence: float = Field(default=0.7, gt=0.5, lt=1)
    """Probability that a thresholded label is right (``unary: labels``, and always with ``confident``)."""

    @field_validator("refine", mode="before")
    @classmethod
    def _check_refine(cls, value: object) -> object:
        """A list of one is its name, so that equal work has equal keys."""
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names:
            raise ValueError(f"expected none, or one or a list of {', '.join(REFINEMENTS)}")
        if names == ["none"]:
            return "none"
        problem = _chain_problem(names)
        if problem is not None:
            raise ValueError(problem)
        return names[0] if len(names) == 1 else tuple(names)

    @property
    def chain(self) -> tuple[str, ...]:
        """The refinements in order, none at all for ``none``."""
        if isinstance(self.refine, str):
            return () if self.refine == "none" else (self.refine,)
        return self.refine

    @property
    def walks(self) -> bool:
        """Whether the trained classifier is needed."""
        return WALK in self.chain

    @property
    def pixel_chain(self) -> tuple[str, ...]:
        """The refinements of pixels, in order."""
        return tuple(name for name in self.chain if name != WALK)

    def key_content(self) -> dict[str, Any]:
        """What decides the masks, as JSON; the numbers of a refinement that is not in the chain do not.

        ``sweep`` and ``crf`` are left to the caller, who knows their files and the device.
        """
        unused = {name for name in ("par", WALK) if name not in self.chain}
        return {name: value for name, value in super().key_content().items() if name not in unused}


def _chain_problem(names: Sequence[object]) -> str | None:
    """What is wrong with a list of refinements."""
    for name in names:
        if name == "none":
            return "none stands alone; leave it out of the list"
        if name not in REFINEMENTS:
            near = difflib.get_close_matches(str(name).lower().replace("-", "_"), REFINEMENTS, n=1, cutoff=0.5)
            guess = f"; did you mean '{near[0]}'?" if near else ""
            return (
                f"there is no refinement '{name}'{guess}  Expected none, or one or a list of {', '.join(REFINEMENTS)}"
            )
    repeated = sorted({str(name) for name in names if names.count(name) > 1})
    if repeated:
        return f"a refinement may stand once, found {repeated[0]} again; drop the repeated one"
    if WALK in names[1:]:
        return f"{WALK} works on the coarse maps, before any pixel is refined; put it first: [{WALK}, …]"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Some images
# ---------------------------------------------------------------------------------------------------------------------


def refine_mask(
    image: Image, record: AttentionRecord, config: RefinementConfig, *, device: str = "cpu"
) -> NDArray[np.uint8]:
    """The pseudo-mask of one image, refined as ``config`` says, but for a random walk, which the record has behind it.

    Args:
        image: RGB, uint8 (H, W, 3).
        record: Its attention, settled where the rule is not plain (``stages.ops.competition``).
        config: Threshold rule and refinements.
        device: Where torch works (``par``, and the torch backend of the CRF).

    Returns:
        Class indices (H, W), 255 = unsure.
    """
    return refine_masks([image], [record], config, device=device)[0]


def refine_masks(
    images: Sequence[Image], records: Sequence[AttentionRecord], config: RefinementConfig, *, device: str = "cpu"
) -> list[NDArray[np.uint8]]:
    """The pseudo-masks of images of any sizes, as of ``refine_mask``: at once where that is quicker (CUDA).

    An image gets what it would get alone, but for float32 rounding.
    """
    return [mask for mask, _ in refine_with_states(images, records, config, device=device)]


def refine_with_states(
    images: Sequence[Image], records: Sequence[AttentionRecord], config: RefinementConfig, *, device: str = "cpu"
) -> list[tuple[NDArray[np.uint8], list[Probabilities]]]:
    """The masks of ``refine_masks``, each with the probabilities behind it.

    Returns:
        Mask (H, W) and one set of probabilities, with ``confident`` the strict and the loose one; no set for an image
        without labels.
    """
    labelled = [position for position, record in enumerate(records) if record.labels and config.pixel_chain]
    found = {}
    if labelled:
        refined = _refine_labelled([images[p] for p in labelled], [records[p] for p in labelled], config, device)
        found = dict(zip(labelled, refined, strict=True))
    return [found[p] if p in found else _begin_only(record, config) for p, record in enumerate(records)]


def _begin_only(record: AttentionRecord, config: RefinementConfig) -> tuple[NDArray[np.uint8], list[Probabilities]]:
    """What the threshold rule alone says; its probabilities only where they are wanted (``soft``)."""
    maps = upsample_maps(record)
    states = [map_probabilities(maps, rule) for rule in _rules(config)] if config.soft and record.labels else []
    return initial_mask(record, config, maps=maps), states


def _refine_labelled(
    images: Sequence[Image], records: Sequence[AttentionRecord], config: RefinementConfig, device: str
) -> list[tuple[NDArray[np.uint8], list[Probabilities]]]:
    """Masks of images with labels, and the probabilities behind them.

    With ``confident`` there are two sets of probabilities, by the foreground and by the background threshold, which
    share what a refinement knows of the images.
    Source: irn ``step/cam_to_ir_label.py`` refines two labellings by a CRF, AFA ``utils/camutils.py`` two by PAR.
    """
    num_labels = [len(record.labels) + 1 for record in records]
    maps = [upsample_maps(record) for record in records]
    sets: list[list[Probabilities]] = []
    for name in config.pixel_chain:
        refinement = _open(name, images, num_labels, config, device)
        if sets:
            sets = [refinement.refine(state) for state in sets]
        else:
            sets = [_begin(refinement, maps, rule) for rule in _rules(config)]
    masks = [
        [to_class_indices(state.argmax(axis=0), record.labels) for state, record in zip(states, records, strict=True)]
        for states in sets
    ]
    chosen = masks[0] if config.confident is None else [combine_confident(*pair) for pair in zip(*masks, strict=True)]
    return [(mask, list(states)) for mask, *states in zip(chosen, *sets, strict=True)]


def _open(
    name: str, images: Sequence[Image], num_labels: Sequence[int], config: RefinementConfig, device: str
) -> BatchRefinement:
    """What the refinement ``name`` knows of the images."""
    for known, refinement in REFINEMENTS.items():
        if known == name and refinement.open is not None:
            return refinement.open(images, num_labels, getattr(config, name), device)
    raise ValueError(f"'{name}' is no refinement of pixels")


def _begin(
    refinement: BatchRefinement, maps: Sequence[NDArray[np.uint8]], config: RefinementConfig
) -> list[Probabilities]:
    """The first refinement's probabilities: a CRF may start from hard labels, all others start from the maps."""
    if not isinstance(refinement, _Crf) or config.unary == "maps":
        return refinement.refine([map_probabilities(each, config) for each in maps])
    level, confidence = background_level(config), config.label_confidence
    return refinement.refine_energies(
        [label_unary(threshold_maps(each, level), len(each) + 1, confidence) for each in maps]
    )


def _rules(config: RefinementConfig) -> list[RefinementConfig]:
    """The threshold rule; with ``confident`` the strict one and the loose one, which a CRF sees as labels always."""
    pair = config.confident
    if pair is None:
        return [config]
    plain = {"confident": None, "background": "constant", "unary": "labels"}
    thresholds = (pair.foreground_threshold, pair.background_threshold)
    return [config.model_copy(update={**plain, "threshold": threshold}) for threshold in thresholds]
