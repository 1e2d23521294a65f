"""Pseudo-masks made by a chain of refinements.

Reads and writes no file.  ``random_walk`` comes before the chain of pixels: it turns attention maps into attention maps
(``stages.masks.refinements.random_walk``).
Shapes: n labels of one image, L = n + 1 labels with background, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.contracts import AttentionRecord
from stages.masks.label_rules import (
    combine_confident,
    initial_mask,
    map_probabilities,
    to_class_indices,
    upsample_maps,
)
from stages.masks.refinements.base import Image, Probabilities, Start
from stages.masks.refinements.config import REFINEMENTS, RefinementConfig

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


def refine_mask(image: Image, record: AttentionRecord, config: RefinementConfig, *, device: str = "cpu") -> Mask:
    """The pseudo-mask of one image, refined as ``config`` says, but for a random walk, which the record has behind it.

    Args:
        image: RGB, uint8 (H, W, 3).
        record: Its attention, settled where the rule is not plain (``stages.masks.label_rules``).
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
        open_batch = REFINEMENTS[name].open
        assert open_batch is not None
        batch = open_batch(images, num_labels, getattr(config, name), device)
        sets = batch.refine(
            [
                Start(rule, maps, states, rule.unary, rule.label_confidence)
                for rule, states in zip(rules, sets or [None] * len(rules), strict=True)
            ]
        )
    return [
        Refined(mask, [states[place] for states in sets], tuple(step[place] for step in before))
        for place, mask in enumerate(_decide(sets, records))
    ]


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
