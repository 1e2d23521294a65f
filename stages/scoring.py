"""Score attention maps and pseudo-masks of training images against their true masks.

Called by ``evaluate`` alone: no stage before it reads a true mask.  Works shard by shard of the attention maps over
processes, and keeps each shard's counts, so that a stopped evaluation continues.
Reads: attention shards, pseudo-masks, true masks.  Writes: counts of each shard under the folder it is given.
Shapes: C classes with background, H W image pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from stages.ops.competition import settle_classes
from stages.ops.confusion import (
    SparseConfusions,
    ThresholdSweep,
    confusion_matrix,
    mean_iou,
    read_confusions,
    write_confusions,
)
from stages.ops.pool import map_ordered
from stages.ops.seeds import (
    SeedConfig,
    background_level,
    cut_byte,
    initial_mask,
    strongest_map,
    to_class_indices,
    upsample_maps,
)

THINGS = ("attention", "masks_before_crf", "masks", "masks_labelled")
"""Attention at the configured threshold for all classes, the strongest map winning (so that methods compare, and the
oracle is the best of it); pseudo-masks by the whole label rule before refinement, with 255 as background, with 255
dropped."""


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


@dataclass(frozen=True)
class TrainingScores:
    """Counts over all scored training images."""

    confusions: Mapping[str, SparseConfusions]
    sweep: ThresholdSweep
    level: float
    """The configured threshold (of ``background: power``: the equivalent one)."""

    def metrics(self) -> dict[str, float]:
        """The ``attention.*`` and ``masks.*`` scores; empty where no pixel was counted."""
        total = {thing: counts.total() for thing, counts in self.confusions.items()}
        counted = int(total["masks"].sum())
        if counted == 0:
            return {}
        by_cut = self._miou_by_cut()
        best = int(by_cut.argmax())
        scores = {
            "attention.miou": mean_iou(total["attention"]),
            "attention.miou_oracle": float(by_cut[best]),
            "attention.threshold_oracle": best / 255,
            "masks.miou_before_crf": mean_iou(total["masks_before_crf"]),
            "masks.miou": mean_iou(total["masks"]),
            "masks.coverage": int(total["masks_labelled"].sum()) / counted,
        }
        if total["masks_labelled"].any():
            scores["masks.miou_labelled"] = mean_iou(total["masks_labelled"])
        return scores

    def curve(self) -> dict[str, object]:
        """The threshold sweep for people: 0.00 … 1.00 in steps of 0.01, exact at each."""
        by_cut = self._miou_by_cut()
        thresholds = [step / 100 for step in range(101)]
        return {
            "thresholds": thresholds,
            "miou": [float(by_cut[cut_byte(threshold)]) for threshold in thresholds],
            "configured": self.level,
            "oracle": int(by_cut.argmax()) / 255,
            "split": "train_score",
            "images": len(self.confusions["masks"].ids),
        }

    def _miou_by_cut(self) -> NDArray[np.float64]:
        """The mIoU at each of the 256 cuts that bytes can be told apart at."""
        return np.array([mean_iou(matrix) for matrix in self.sweep.matrices()])


def score_training(context: ScoringContext, *, processes: int) -> Iterator[int]:
    """Count every shard, in order; finished ones are skipped.

    Yields:
        The number of images of each shard that count.
    """
    shards = list(enumerate(attention_shards(context.attention)))
    yield from map_ordered(_score_shard, shards, context=context, processes=min(processes, max(len(shards), 1)))


def collect_training(context: ScoringContext) -> TrainingScores:
    """Add up what ``score_training`` kept."""
    num_classes = context.images.index.classes.num_classes
    sweep = ThresholdSweep(num_classes)
    parts: dict[str, list[SparseConfusions]] = {thing: [] for thing in THINGS}
    for number in range(len(attention_shards(context.attention))):
        for thing, counts in read_confusions(_counts_path(context, number)).items():
            parts[thing].append(counts)
        cells, counts = read_json(_sweep_path(context, number))
        sweep.histogram.ravel()[cells] += np.array(counts, dtype=np.int64)
    empty = SparseConfusions.from_matrices(num_classes, [])
    confusions = {thing: SparseConfusions.merge([empty, *found]) for thing, found in parts.items()}
    return TrainingScores(confusions=confusions, sweep=sweep, level=background_level(context.seeds))


def _counts_path(context: ScoringContext, number: int) -> Path:
    return context.partial / f"training-{number:05d}.npz"


def _sweep_path(context: ScoringContext, number: int) -> Path:
    return context.partial / f"training-{number:05d}.sweep.json"


def _score_shard(context: ScoringContext, job: tuple[int, Path]) -> int:
    number, shard = job
    path = _counts_path(context, number)
    # damaged counts are made again
    with contextlib.suppress(DamagedFileError, KeyError):
        if path.exists() and read_json(_sweep_path(context, number)):
            return len(read_confusions(path)["masks"].ids)
    num_classes = context.images.index.classes.num_classes
    sweep = ThresholdSweep(num_classes)
    records = [record for record in read_attention_shard(shard) if record.id in context.ids]
    scored = [_score_image(context, record, sweep) for record in records]
    ids = [record.id for record in records]
    _write_counts(context, number, ids, scored, sweep)
    return len(ids)


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
        for thing in THINGS
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
    settled = settle_classes(record, context.seeds, context.images.index.classes)
    seeds = maps if settled is record else upsample_maps(settled)
    masks = _read_pseudo_mask(context.masks / "masks" / f"{record.id}.png", truth.shape)
    num_classes = sweep.num_classes
    return {
        "attention": confusion_matrix(truth, np.where(value > cut, strongest, np.uint8(0)), num_classes),
        "masks_before_crf": confusion_matrix(truth, initial_mask(settled, context.seeds, maps=seeds), num_classes),
        "masks": confusion_matrix(truth, masks, num_classes),
        "masks_labelled": confusion_matrix(truth, masks, num_classes, unsure="drop"),
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
