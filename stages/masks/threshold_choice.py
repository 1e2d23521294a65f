"""Choose the threshold of the pseudo-masks on a few training images with true masks, and read what was chosen.

Called by ``make_masks``, and by ``evaluate``, which scores at the same threshold.
Reads: attention shards and the true masks of the chosen images, which are mask supervision from then on; ``stats.json``
of ``make_masks``.  Writes nothing.
Shapes: C classes with background, H W image pixels; matrices are int64 (C, C) with the truth in rows.
Source: SEAM (Wang et al., CVPR 2020) sweeps its background score over the training set's masks; here over a subset that
is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from stages.contracts import AttentionRecord, ClassList, ImageSet, read_json
from stages.data.subsets import choose_sweep_images
from stages.errors import DamagedFileError, DataError
from stages.masks.attention_maps import find_attention
from stages.masks.label_rules import (
    SeedConfig,
    initial_mask,
    settle_classes,
    strongest_map,
    to_class_indices,
    upsample_maps,
)
from stages.ops.metrics.confusion import ThresholdSweep, confusion_matrix, mean_iou
from stages.ops.pool import map_ordered

ConfigT = TypeVar("ConfigT", bound=SeedConfig)

NUM_CUTS = 255
"""Thresholds that bytes can be told apart at: 0/255 … 254/255."""


@dataclass(frozen=True)
class ThresholdChoice:
    """The threshold of the best masks before refinement of pixels, and what it was chosen on."""

    threshold: float
    """A multiple of 1/255; the smallest of equally good ones."""
    miou: float
    """Of the chosen images' masks before refinement at it, 255 as background."""
    image_ids: tuple[str, ...]
    """Sorted."""


def choose_threshold(
    config: SeedConfig,
    image_set: ImageSet,
    attention: Path,
    *,
    processes: int,
    walk: Callable[[Sequence[AttentionRecord]], Sequence[AttentionRecord]] | None = None,
) -> ThresholdChoice:
    """The threshold with the best mIoU before any refinement of pixels on the images that ``config.sweep`` names.

    A pure function of the data, the attention and the config: whoever makes a part of the masks finds the same.

    Args:
        config: The rule, with ``sweep``; its other options stay as they are at every threshold.
        image_set: The images with their true masks.
        attention: Output folder of ``make_attention``.
        processes: How many count; no result depends on it.
        walk: What a random walk makes of the images' maps, in their order; None where the masks are made without.

    Raises:
        ConfigError: ``sweep`` asks for images that are not there or have no true mask.
        DataError: a true mask does not read, or none of them has a pixel that counts.
        DamagedFileError: attention is missing for one of the images.
        InputError: the maps of one are not of the labels that it has.
    """
    if config.sweep is None:
        raise ValueError("there is no sweep to choose a threshold by")
    ids = tuple(sorted(choose_sweep_images(config.sweep, image_set.index.split("train"))))
    records: Sequence[AttentionRecord] = _require_attention(image_set, attention, ids)
    if walk is not None:
        records = walk(records)
    groups = [group for start in range(processes) if (group := records[start::processes])]
    counted = map_ordered(_count_group, groups, context=_Context(config, image_set), processes=len(groups))
    total = _no_counts(image_set.index.classes.num_classes)
    for matrices in counted:
        total += matrices
    if not total.any():
        raise DataError(f"the true masks of the {len(ids)} images of sweep have no pixel other than 255; take others")
    scores = np.array([mean_iou(matrix) for matrix in total])
    best = int(scores.argmax())
    return ThresholdChoice(threshold=best / 255, miou=float(scores[best]), image_ids=ids)


def with_chosen_threshold(config: ConfigT, masks: Path) -> ConfigT:
    """``config`` with the threshold that ``make_masks`` chose; ``config`` itself where it had none to choose.

    Args:
        config: What ``make_masks`` was called with.
        masks: Its output folder.

    Raises:
        DamagedFileError: ``stats.json`` does not read or names no threshold.
    """
    if config.sweep is None:
        return config
    try:
        return with_threshold(config, float(read_json(masks / "stats.json")["sweep"]["threshold"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{masks / 'stats.json'} names no chosen threshold; rebuild make_masks") from error


def with_threshold(config: ConfigT, threshold: float) -> ConfigT:
    """``config`` at another ``threshold``."""
    return config.model_copy(update={"threshold": threshold})


def _require_attention(images: ImageSet, attention: Path, ids: Sequence[str]) -> list[AttentionRecord]:
    """The stored attention of the images of ``sweep``."""
    found = list(find_attention(images.index, attention, ids))
    missing = sorted(set(ids) - {record.id for record in found})
    if missing:
        raise DamagedFileError(
            f"{attention} has no attention for {len(missing)} images of sweep ({', '.join(missing[:5])}…); "
            "rebuild make_attention"
        )
    return found


@dataclass(frozen=True)
class _Context:
    """What all groups share."""

    config: SeedConfig
    images: ImageSet


def _no_counts(num_classes: int) -> NDArray[np.int64]:
    return np.zeros((NUM_CUTS, num_classes, num_classes), dtype=np.int64)


def _count_group(context: _Context, records: Sequence[AttentionRecord]) -> NDArray[np.int64]:
    """The matrices of a process's share of the images, added up: with many classes they are large."""
    index = context.images.index
    total = _no_counts(index.classes.num_classes)
    for record in records:
        truth = context.images.read_mask(index.record(record.id))
        total += count_thresholds(record, truth, index.classes, context.config)
    return total


def count_thresholds(
    record: AttentionRecord, truth: NDArray[np.uint8], classes: ClassList, config: SeedConfig
) -> NDArray[np.int64]:
    """One image's matrix at each threshold, (255, C, C): in one pass where the strongest map alone decides.

    Args:
        record: The image's attention.
        truth: Its true mask, class indices and 255, (H, W).
        classes: The data set's classes.
        config: The rule; ``threshold`` does not matter.
    """
    if config.is_plain:
        return _count_in_one_pass(record, truth, classes.num_classes)
    full = replace(record, maps=upsample_maps(record))  # once: maps of the image's size are left as they are
    matrices = []
    for cut in range(NUM_CUTS):
        at_cut = with_threshold(config, cut / 255)
        settled = settle_classes(full, at_cut, classes)
        mask = initial_mask(settled, at_cut, maps=settled.maps)
        matrices.append(confusion_matrix(truth, mask, classes.num_classes))
    return np.stack(matrices)


def _count_in_one_pass(record: AttentionRecord, truth: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    winner, value = strongest_map(upsample_maps(record))
    sweep = ThresholdSweep(num_classes)
    sweep.add(truth, to_class_indices(winner + (1 if record.labels else 0), record.labels), value)
    return sweep.matrices()[:NUM_CUTS]
