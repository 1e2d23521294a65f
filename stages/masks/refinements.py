"""The refinements of a pseudo-mask by name, and pseudo-masks made by a chain of them.

Reads and writes no file.  A refinement of pixels takes and gives probabilities (L, H, W); ``random_walk`` comes before
them all and turns attention maps into attention maps (``stages.masks.walked_maps``).  Which there are in a
chain, and their numbers, says ``stages.masks.refinement_config``.
Shapes: n labels of one image, L = n + 1 labels with background, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.contracts import AttentionRecord
from stages.masks.refinement_config import RefinementConfig, RefinementName
from stages.ops.crf.dense_crf import CrfConfig, label_unary, open_crf_batch, probability_unary
from stages.ops.par import ParBatch, ParConfig
from stages.ops.seeds import (
    background_level,
    combine_confident,
    initial_mask,
    map_probabilities,
    threshold_maps,
    to_class_indices,
    upsample_maps,
)

Image = NDArray[np.uint8]
"""RGB (H, W, 3)."""

Probabilities = NDArray[np.float32]
"""(L, H, W), background first, summing to 1 over L."""

Mask = NDArray[np.uint8]
"""Class indices (H, W), 255 = unsure."""


class Refined(NamedTuple):
    """The pseudo-mask of one image, and what led to it."""

    mask: Mask
    states: list[Probabilities]
    """The probabilities behind the mask, with ``confident`` the strict and the loose ones; none for an image without
    labels, nor for the threshold rule alone where ``soft`` does not ask for them."""
    before: tuple[Mask, ...]
    """The mask before each refinement of pixels, where that was asked for: first that of the threshold rule."""


class BatchRefinement(Protocol):
    """What a refinement knows of some images; used with one set of probabilities or several."""

    def refine(self, probabilities: Sequence[Probabilities]) -> list[Probabilities]:
        """The probabilities of each image, refined."""
        ...


class _Crf:
    """The dense CRF, with probabilities at both ends."""

    def __init__(self, images: Sequence[Image], num_labels: Sequence[int], config: CrfConfig, device: str) -> None:
        self._batch = open_crf_batch(images, num_labels, config, device=device)
        self._num_labels, self._iterations = num_labels, config.iterations

    def refine(self, probabilities: Sequence[Probabilities]) -> list[Probabilities]:
        return self.refine_energies([[probability_unary(each) for each in probabilities]])[0]

    def label_energies(self, labels: Sequence[NDArray[np.integer]], confidence: float) -> list[NDArray[np.float32]]:
        """The energies of each image from hard labels 0 … L-1 (H, W), each right with ``confidence``."""
        pairs = zip(labels, self._num_labels, strict=True)
        return [label_unary(each, count, confidence) for each, count in pairs]

    def refine_energies(self, sets: Sequence[Sequence[NDArray[np.float32]]]) -> list[list[Probabilities]]:
        """The probabilities of each image from each set of energies; a backend may take all sets in one pass."""
        return self._batch.infer_sets(sets, self._iterations)


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


# ---------------------------------------------------------------------------------------------------------------------
# Some images
# ---------------------------------------------------------------------------------------------------------------------


def refine_mask(image: Image, record: AttentionRecord, config: RefinementConfig, *, device: str = "cpu") -> Mask:
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
) -> list[Mask]:
    """The pseudo-masks of images of any sizes, as of ``refine_mask``: at once where that is quicker (CUDA).

    An image gets what it would get alone, but for float32 rounding.
    """
    return [found.mask for found in refine_in_steps(images, records, config, device=device)]


def refine_in_steps(
    images: Sequence[Image],
    records: Sequence[AttentionRecord],
    config: RefinementConfig,
    *,
    device: str = "cpu",
    keep_steps: bool = False,
) -> list[Refined]:
    """The masks of ``refine_masks``, each with what led to it.

    Args:
        images: RGB, uint8 (H, W, 3).
        records: Their attention, as for ``refine_mask``.
        config: Threshold rule and refinements.
        device: Where torch works.
        keep_steps: Whether the masks before each refinement of pixels are wanted, ``Refined.before``.
    """
    labelled = [position for position, record in enumerate(records) if record.labels and config.pixel_chain]
    found = {}
    if labelled:
        chosen = [images[p] for p in labelled], [records[p] for p in labelled]
        found = dict(zip(labelled, _refine_labelled(*chosen, config, device, keep_steps=keep_steps), strict=True))
    return [
        found[p] if p in found else _begin_only(record, config, keep_steps=keep_steps)
        for p, record in enumerate(records)
    ]


def _begin_only(record: AttentionRecord, config: RefinementConfig, *, keep_steps: bool) -> Refined:
    """What the threshold rule alone says; its probabilities only where they are wanted (``soft``)."""
    maps = upsample_maps(record)
    states = [map_probabilities(maps, rule) for rule in _rules(config)] if config.soft and record.labels else []
    mask = initial_mask(record, config, maps=maps)
    return Refined(mask, states, (mask,) * len(config.pixel_chain) if keep_steps else ())


def _refine_labelled(
    images: Sequence[Image],
    records: Sequence[AttentionRecord],
    config: RefinementConfig,
    device: str,
    *,
    keep_steps: bool,
) -> list[Refined]:
    """Masks of images with labels, and what led to them.

    With ``confident`` there are two sets of probabilities, by the foreground and by the background threshold, which
    share what a refinement knows of the images.
    Source: irn ``step/cam_to_ir_label.py`` refines two labellings by a CRF, AFA ``utils/camutils.py`` two by PAR.
    """
    num_labels = [len(record.labels) + 1 for record in records]
    maps = [upsample_maps(record) for record in records]
    rules, sets = _rules(config), list[list[Probabilities]]()
    before: list[list[Mask]] = []
    for name in config.pixel_chain:
        if keep_steps:
            before.append(_decide(sets, records) if sets else _threshold(records, config, maps))
        refinement = _open(name, images, num_labels, config, device)
        starts = sets or [None] * len(rules)
        if isinstance(refinement, _Crf):
            energies = [_energies(refinement, states, maps, rule) for states, rule in zip(starts, rules, strict=True)]
            sets = refinement.refine_energies(energies)
        else:
            sets = [refinement.refine(_or_maps(states, maps, rule)) for states, rule in zip(starts, rules, strict=True)]
    return [
        Refined(mask, [states[place] for states in sets], tuple(step[place] for step in before))
        for place, mask in enumerate(_decide(sets, records))
    ]


def _open(
    name: str, images: Sequence[Image], num_labels: Sequence[int], config: RefinementConfig, device: str
) -> BatchRefinement:
    """What the refinement ``name`` knows of the images."""
    for known, refinement in REFINEMENTS.items():
        if known == name and refinement.open is not None:
            return refinement.open(images, num_labels, getattr(config, name), device)
    raise ValueError(f"'{name}' is no refinement of pixels")


def _or_maps(
    states: Sequence[Probabilities] | None, maps: Sequence[NDArray[np.uint8]], config: RefinementConfig
) -> Sequence[Probabilities]:
    """The probabilities so far; before the first refinement those of the maps."""
    return [map_probabilities(each, config) for each in maps] if states is None else states


def _energies(
    crf: _Crf, states: Sequence[Probabilities] | None, maps: Sequence[NDArray[np.uint8]], config: RefinementConfig
) -> list[NDArray[np.float32]]:
    """What a CRF starts from: the labels that are thresholded or the most probable so far, or probabilities."""
    if config.unary != "labels":
        return [probability_unary(each) for each in _or_maps(states, maps, config)]
    level = background_level(config)
    labels = (
        [threshold_maps(each, level) for each in maps] if states is None else [each.argmax(axis=0) for each in states]
    )
    return crf.label_energies(labels, config.label_confidence)


def _threshold(
    records: Sequence[AttentionRecord], config: RefinementConfig, maps: Sequence[NDArray[np.uint8]]
) -> list[Mask]:
    """The masks of the threshold rule."""
    return [initial_mask(record, config, maps=each) for record, each in zip(records, maps, strict=True)]


def _decide(sets: Sequence[Sequence[Probabilities]], records: Sequence[AttentionRecord]) -> list[Mask]:
    """The most probable classes; of two sets of probabilities (``confident``) what both agree on, else 255."""
    masks = [
        [to_class_indices(state.argmax(axis=0), record.labels) for state, record in zip(states, records, strict=True)]
        for states in sets
    ]
    return masks[0] if len(masks) == 1 else [combine_confident(*pair) for pair in zip(*masks, strict=True)]


def _rules(config: RefinementConfig) -> list[RefinementConfig]:
    """The threshold rule; with ``confident`` the strict one and the loose one, which a CRF sees as labels always."""
    pair = config.confident
    if pair is None:
        return [config]
    plain = {"confident": None, "background": "constant", "unary": "labels"}
    thresholds = (pair.foreground_threshold, pair.background_threshold)
    return [config.model_copy(update={**plain, "threshold": threshold}) for threshold in thresholds]
