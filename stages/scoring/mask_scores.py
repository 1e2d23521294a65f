"""Score attention maps and pseudo-masks of training images against their true masks.

Called by ``evaluate`` alone: no stage before it reads a true mask.  Works shard by shard of the attention maps over
processes, and keeps each shard's counts, so that a stopped evaluation continues.
Reads: attention shards, pseudo-masks and the masks between their steps, true masks.  Writes: counts of each shard under
the folder it is given.
Shapes: C classes with background, H W image pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.contracts import (
    AttentionRecord,
    ImageSet,
    attention_shards,
    read_attention_shard,
    read_index_mask,
    read_json,
    write_json,
)
from stages.errors import DamagedFileError, DataError
from stages.masks.label_rules import (
    SeedConfig,
    background_level,
    cut_byte,
    initial_mask,
    settle_classes,
    strongest_map,
    to_class_indices,
    upsample_maps,
)
from stages.masks.mask_files import step_names, step_path
from stages.ops.metrics.confusion import (
    SparseConfusions,
    ThresholdSweep,
    confusion_matrix,
    mean_iou,
    read_confusions,
    write_confusions,
)
from stages.ops.pool import map_ordered

_SHARD_IMAGES = 64
"""Images that are counted together where there are no shards of maps."""

_THINGS = ("attention", "masks_before_crf", "masks", "masks_labelled")
"""Attention at the configured threshold for all classes, the strongest map winning (so that methods compare, and the
oracle is the best of it); pseudo-masks by the whole label rule before refinement, with 255 as background, with 255
dropped.  Where the masks between the steps were kept there are also ``masks_before_crf_labelled`` and, for each
refinement but the last, ``masks_after_<refinement>`` and the same with ``_labelled``."""


def step_things(chain: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What is counted of the masks after each step, 255 as background and 255 dropped; nothing of no chain."""
    if not chain:
        return {}
    between = [f"masks_after_{name}" for name in chain[:-1]]
    things = ("masks_before_crf", *between, "masks")
    return {name: (thing, f"{thing}_labelled") for name, thing in zip(step_names(chain), things, strict=True)}


@dataclass(frozen=True)
class ScoringContext:
    """What all shards share."""

    images: ImageSet
    ids: frozenset[str]
    """The images that count."""
    seeds: SeedConfig
    attention: Path
    masks: Path
    partial: Path
    """Where the counts of finished shards are kept."""
    chain: tuple[str, ...] = ()
    """The refinements, where the masks between the steps were kept."""
    has_maps: bool = True
    """Whether ``attention`` holds maps; where none were kept, masks alone are scored."""

    @property
    def things(self) -> tuple[str, ...]:
        """All that is counted."""
        always = _THINGS if self.has_maps else [thing for thing in _THINGS if thing != "attention"]
        return tuple(dict.fromkeys([*always, *(t for pair in step_things(self.chain).values() for t in pair)]))


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


def score_training(context: ScoringContext, *, processes: int) -> Iterator[int]:
    """Count every shard, in order; finished ones are skipped.

    Yields:
        The number of images of each shard that count.
    """
    shards = list(enumerate(_shards(context)))
    yield from map_ordered(_score_shard, shards, context=context, processes=min(processes, max(len(shards), 1)))


def _shards(context: ScoringContext) -> list[Path] | list[tuple[str, ...]]:
    """The files of maps; the ids of as many images where there are none."""
    if context.has_maps:
        return attention_shards(context.attention)
    ids = [image_id for image_id in context.images.index.splits.get("train", ()) if image_id in context.ids]
    return [tuple(ids[start : start + _SHARD_IMAGES]) for start in range(0, len(ids), _SHARD_IMAGES)]


def collect_training(context: ScoringContext) -> TrainingScores:
    """Add up what ``score_training`` kept."""
    num_classes = context.images.index.classes.num_classes
    sweep = ThresholdSweep(num_classes)
    parts: dict[str, list[SparseConfusions]] = {thing: [] for thing in context.things}
    for number in range(len(_shards(context))):
        for thing, counts in read_confusions(_counts_path(context, number)).items():
            parts[thing].append(counts)
        cells, counts = read_json(_sweep_path(context, number))
        sweep.histogram.ravel()[cells] += np.array(counts, dtype=np.int64)
    empty = SparseConfusions.from_matrices(num_classes, [])
    confusions = {thing: SparseConfusions.merge([empty, *found]) for thing, found in parts.items()}
    level = background_level(context.seeds)
    return TrainingScores(confusions, sweep if context.has_maps else None, level=level, chain=context.chain)


def _counts_path(context: ScoringContext, number: int) -> Path:
    return context.partial / f"training-{number:05d}.npz"


def _sweep_path(context: ScoringContext, number: int) -> Path:
    return context.partial / f"training-{number:05d}.sweep.json"


def _score_shard(context: ScoringContext, job: tuple[int, Path | tuple[str, ...]]) -> int:
    number, shard = job
    path = _counts_path(context, number)
    # damaged counts are made again
    with contextlib.suppress(DamagedFileError, KeyError):
        if path.exists() and read_json(_sweep_path(context, number)):
            return len(read_confusions(path)["masks"].ids)
    num_classes = context.images.index.classes.num_classes
    sweep = ThresholdSweep(num_classes)
    if isinstance(shard, Path):
        records = [record for record in read_attention_shard(shard) if record.id in context.ids]
        scored = {record.id: _score_image(context, record, sweep) for record in records}
    else:
        scored = {image_id: _score_without_maps(context, image_id) for image_id in shard}
    _write_counts(context, number, list(scored), list(scored.values()), sweep)
    return len(scored)


def _write_counts(
    context: ScoringContext,
    number: int,
    ids: Sequence[str],
    scored: Sequence[dict[str, NDArray[np.int64]]],
    sweep: ThresholdSweep,
) -> None:
    """Keep one shard's counts; the file that says the shard is finished is written last."""
    cells = np.flatnonzero(sweep.histogram)
    write_json(_sweep_path(context, number), [cells.tolist(), sweep.histogram.ravel()[cells].tolist()])
    confusions = {
        thing: SparseConfusions.from_matrices(
            sweep.num_classes, [(image_id, matrices[thing]) for image_id, matrices in zip(ids, scored, strict=True)]
        )
        for thing in context.things
    }
    write_confusions(_counts_path(context, number), confusions)


def _score_image(
    context: ScoringContext, record: AttentionRecord, sweep: ThresholdSweep
) -> dict[str, NDArray[np.int64]]:
    truth = context.images.read_mask(context.images.index.record(record.id))
    maps = upsample_maps(record)
    winner, value = strongest_map(maps)
    strongest = to_class_indices(winner + (1 if record.labels else 0), record.labels)
    sweep.add(truth, strongest, value)
    cut = cut_byte(background_level(context.seeds))
    attention = np.where(value > cut, strongest, np.uint8(0))
    between = _masks_between(context, record.id, truth.shape)
    masks = between or {"masks_before_crf": _thresholded(context, record, maps)}
    scored = {"attention": confusion_matrix(truth, attention, sweep.num_classes)}
    return scored | _score_masks(context, record.id, truth, masks)


def _score_without_maps(context: ScoringContext, image_id: str) -> dict[str, NDArray[np.int64]]:
    """Without refinement, the pseudo-mask is what it was before."""
    truth = context.images.read_mask(context.images.index.record(image_id))
    earlier = _masks_between(context, image_id, truth.shape)
    scored = _score_masks(context, image_id, truth, earlier)
    return scored if earlier else {**scored, "masks_before_crf": scored["masks"]}


def _thresholded(context: ScoringContext, record: AttentionRecord, maps: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mask before refinement; ``maps`` are the record's, upsampled."""
    settled = settle_classes(record, context.seeds, context.images.index.classes)
    return initial_mask(settled, context.seeds, maps=maps if settled is record else upsample_maps(settled))


def _score_masks(
    context: ScoringContext, image_id: str, truth: NDArray[np.uint8], earlier: Mapping[str, NDArray[np.uint8]]
) -> dict[str, NDArray[np.int64]]:
    """The matrices of one image's pseudo-mask and of the masks before it."""
    final = _read_pseudo_mask(context.masks / "masks" / f"{image_id}.png", truth.shape)
    num_classes = context.images.index.classes.num_classes
    scored = {}
    for thing, mask in {**earlier, "masks": final}.items():
        scored[thing] = confusion_matrix(truth, mask, num_classes)
        if f"{thing}_labelled" in context.things:
            scored[f"{thing}_labelled"] = confusion_matrix(truth, mask, num_classes, unsure="drop")
    return scored


def _masks_between(context: ScoringContext, image_id: str, size: tuple[int, ...]) -> dict[str, NDArray[np.uint8]]:
    """The masks of one image after each step but the last, by what they are counted as; none where none were kept."""
    earlier = list(step_things(context.chain).items())[:-1]
    return {
        thing: _read_pseudo_mask(step_path(context.masks, number, name, image_id), size)
        for number, (name, (thing, _)) in enumerate(earlier)
    }


def _read_pseudo_mask(path: Path, size: tuple[int, ...]) -> NDArray[np.uint8]:
    """A mask that ``make_masks`` wrote.

    Raises:
        DamagedFileError: missing, unreadable or of another size.
    """
    try:
        mask = read_index_mask(path)
    except DataError as error:
        raise DamagedFileError(f"{error.message}; rebuild make_masks") from error
    if mask.shape != size:
        raise DamagedFileError(
            f"{path}: expected {size} pixels (height, width), found {mask.shape}; rebuild make_masks"
        )
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingScores:
    """Counts over all scored training images."""

    confusions: Mapping[str, SparseConfusions]
    sweep: ThresholdSweep | None
    """None without maps."""
    level: float
    """The configured threshold (of ``background: power``: the equivalent one)."""
    chain: tuple[str, ...] = ()
    """The refinements, where the masks between the steps were scored."""

    def metrics(self) -> dict[str, Any]:
        """The ``attention.*`` and ``masks.*`` scores; empty where no pixel was counted."""
        total = {thing: counts.total() for thing, counts in self.confusions.items()}
        counted = int(total["masks"].sum())
        if counted == 0:
            return {}
        scores: dict[str, Any] = {
            **self._attention_metrics(),
            "masks.miou_before_crf": mean_iou(total["masks_before_crf"]),
            "masks.miou": mean_iou(total["masks"]),
            "masks.coverage": int(total["masks_labelled"].sum()) / counted,
        }
        if total["masks_labelled"].any():
            scores["masks.miou_labelled"] = mean_iou(total["masks_labelled"])
        if self.chain:
            scores["masks.steps"] = [
                _score_step(name, total[thing], total[labelled])
                for name, (thing, labelled) in step_things(self.chain).items()
            ]
        return scores

    def _attention_metrics(self) -> dict[str, float]:
        if self.sweep is None:
            return {}
        by_cut = _miou_by_cut(self.sweep)
        best = int(by_cut.argmax())
        return {
            "attention.miou": mean_iou(self.confusions["attention"].total()),
            "attention.miou_oracle": float(by_cut[best]),
            "attention.threshold_oracle": best / 255,
        }

    def curve(self) -> dict[str, object] | None:
        """The threshold sweep for people: 0.00 … 1.00 in steps of 0.01, exact at each; None without maps."""
        if self.sweep is None:
            return None
        by_cut = _miou_by_cut(self.sweep)
        thresholds = [step / 100 for step in range(101)]
        return {
            "thresholds": thresholds,
            "miou": [float(by_cut[cut_byte(threshold)]) for threshold in thresholds],
            "configured": self.level,
            "oracle": int(by_cut.argmax()) / 255,
            "split": "train_score",
            "images": len(self.confusions["masks"].ids),
        }


def _miou_by_cut(sweep: ThresholdSweep) -> NDArray[np.float64]:
    """The mIoU at each of the 256 cuts that bytes can be told apart at."""
    return np.array([mean_iou(matrix) for matrix in sweep.matrices()])


def _score_step(name: str, counted: NDArray[np.int64], labelled: NDArray[np.int64]) -> dict[str, str | float]:
    """What the masks after one step are worth.

    Args:
        name: ``threshold``, or the refinement.
        counted: Confusions with 255 as background, at least one pixel.
        labelled: Confusions with 255 dropped.

    Returns:
        ``step``, ``miou``, ``coverage`` and, where any pixel is labelled, ``miou_labelled``; fractions.
    """
    sure = int(labelled.sum())
    entry: dict[str, str | float] = {"step": name, "miou": mean_iou(counted), "coverage": sure / int(counted.sum())}
    return entry | ({"miou_labelled": mean_iou(labelled)} if sure else {})
