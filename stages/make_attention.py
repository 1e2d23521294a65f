"""Attention maps of the training images for the labels they have, over several scales and mirrored.

Reads: the images and labels of split ``train`` (never a mask) and the trained classifier.
Writes: ``shards/attention-00000.npz`` …, ``shard_images`` images each, in the order of the split.
Each map is the mean over scales and flips of the method's maps (ReLU'd class scores for CAM), laid onto a grid of the
image's size / ``map_stride``, divided by its own maximum and stored as uint8 with that maximum beside it; a class
without evidence stays zero.

A run can be stopped at any instant: shards are written whole, and the next run makes those that are missing, with the
same bytes.  Batches never reach across a shard and are planned from the images' sizes alone.  How many inputs share a
forward pass (more on a GPU, fewer after it ran out of memory) changes nothing but the last bits of float arithmetic,
which the 256 steps of a stored map swallow but for a cell on the edge between two steps.  Memory does not grow with the
data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, field_validator

from stages.contracts import (
    AttentionRecord,
    ImageRecord,
    ImageSet,
    Part,
    Progress,
    Runtime,
    StageConfig,
    StageResult,
    open_image_set,
    read_attention_shard,
    write_attention_shard,
)
from stages.errors import DamagedFileError, DataError, InputError

if TYPE_CHECKING:
    from stages.methods.extraction import AttentionExtractor

VERSION = 1
"""Raise when equal inputs give other bytes than before."""


class MakeAttentionConfig(StageConfig):
    """How the trained classifier looks at an image, and how finely its attention is stored."""

    scales: tuple[Annotated[float, Field(ge=0.1, le=4.0)], ...] = Field(default=(0.5, 1.0, 1.5, 2.0), min_length=1)
    """Sizes, relative to the image (or to ``short_side_px``), that the maps are averaged over.
    Source: irn (a2ece00) run_sample.py, cam_scales."""
    flip: bool = True
    """Look at the mirrored image too, at every scale."""
    short_side_px: int | None = Field(default=None, ge=16, le=4096)
    """Resize the image's shorter side to this before the scales; None keeps the file's size."""
    map_stride: Literal[1, 2, 4, 8] = 4
    """Pixels of the original image per stored cell; 4 is irn's quarter resolution."""
    shard_images: int = Field(default=64, ge=1, le=4096)
    """Images per file: what an interrupted run loses at most."""

    @field_validator("scales")
    @classmethod
    def _check_scales(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(scales)) != len(scales):
            raise ValueError(f"each scale may stand once, got {list(scales)}; drop the repeated one")
        return scales


def make_attention(
    config: MakeAttentionConfig,
    *,
    images: Path,
    classifier: Path,
    data_root: Path | None,
    out: Path,
    progress: Progress,
    runtime: Runtime | None = None,
    part: Part | None = None,
) -> StageResult:
    """Write the attention maps of all training images under ``out / "shards"``.

    Args:
        config: Scales, flips and the stored resolution.
        images: Output folder of ``prepare_data``.
        classifier: Output folder of ``train_classifier``.
        data_root: Folder of the user's data; None for the embedded data set.
        out: Folder to write to; finished shards in it are kept.
        progress: Hears of every finished batch.
        runtime: Device, threads, and the threads that read images ahead (``workers``).
        part: Write only this part of the files, each with the name and the bytes that it has in the whole; where there
            are fewer files than parts, some parts are empty.  None writes all.

    Returns:
        Metric ``attention.bytes_per_image``: bytes on disk over images; nothing for a part.

    Raises:
        DataError: a training image has no labels, cannot be read, or changed its size.
        InputError: the classifier knows other classes, or gives NaN.
        EnvironmentFailure: the device cannot hold one image.
    """
    image_set = open_image_set(images, data_root)
    records = _labelled(image_set)
    shards = [records[start : start + config.shard_images] for start in range(0, len(records), config.shard_images)]
    wanted = range(len(shards)) if part is None else part.positions(len(shards))
    missing = [n for n in wanted if not _is_finished(_shard_path(out, n), shards[n], progress)]
    num_images, num_missing = (sum(len(shards[n]) for n in numbers) for numbers in (wanted, missing))
    progress.begin("attention maps", total=num_images, done=num_images - num_missing)
    if missing:
        runtime = runtime or Runtime()
        extractor = _open_extractor(config, classifier, image_set, progress, runtime)
        for number in missing:
            write_attention_shard(
                _shard_path(out, number), _extract(extractor, image_set, shards[number], config, progress, runtime)
            )
    return StageResult() if part is not None else _measure(out, len(shards), len(records), progress)


def _labelled(image_set: ImageSet) -> list[ImageRecord]:
    """The training images; every one must have known labels."""
    records = list(image_set.index.split("train"))
    unlabelled = [f"image '{record.id}' of split train has no labels" for record in records if record.labels is None]
    if unlabelled:
        raise DataError("attention maps are made for known labels; label these images or drop them", unlabelled)
    if not records:
        raise DataError("split train has no images; attention maps are made for training images")
    return records


def _shard_path(out: Path, number: int) -> Path:
    return out / "shards" / f"attention-{number:05d}.npz"


def _is_finished(path: Path, shard: Sequence[ImageRecord], progress: Progress) -> bool:
    """Whether an earlier run wrote this shard for these images; a damaged one is made again."""
    if not path.exists():
        return False
    try:
        found = [record.id for record in read_attention_shard(path)]
    except DamagedFileError as error:
        progress.warn(f"{error.message}: making this shard again")
        return False
    if found != [record.id for record in shard]:
        raise InputError(
            f"{path} holds attention of other images; choose an empty output folder or delete {path.parent}"
        )
    return True


def _open_extractor(
    config: MakeAttentionConfig, classifier: Path, image_set: ImageSet, progress: Progress, runtime: Runtime
) -> AttentionExtractor:
    """Load the classifier onto the device, after a look at whether it fits the data."""
    from stages.methods.extraction import AttentionExtractor, Views
    from stages.methods.trained import load_classifier, read_description
    from stages.training import resolve_device

    known, wanted = read_description(classifier).classes, image_set.index.classes
    if known != wanted:
        raise InputError(
            f"the classifier in {classifier} knows the classes {list(known.names)}, the data has {list(wanted.names)}; "
            "train it on this data"
        )
    device = resolve_device(runtime)
    network, method = load_classifier(classifier, device)
    views = Views(config.scales, config.flip, config.short_side_px)
    return AttentionExtractor(
        network,
        method,
        views=views,
        map_stride=config.map_stride,
        num_foreground=wanted.num_foreground,
        device=device,
        warn=progress.warn,
    )


def _extract(
    extractor: AttentionExtractor,
    image_set: ImageSet,
    shard: Sequence[ImageRecord],
    config: MakeAttentionConfig,
    progress: Progress,
    runtime: Runtime,
) -> list[AttentionRecord]:
    """Attention of one shard, in its order."""
    from stages.data.inference import prefetch, read_checked
    from stages.methods.extraction import build_inputs, plan_batches
    from stages.ops.attention import map_size

    found: dict[str, AttentionRecord] = {}
    for record in shard:
        if not record.labels:
            maps = np.zeros((0, *map_size(record.size, config.map_stride)), dtype=np.uint8)
            found[record.id] = AttentionRecord(record.id, record.size, (), maps, np.zeros(0, dtype=np.float32))
    if found:
        progress.advance(len(found))
    batches = list(plan_batches([r for r in shard if r.labels], extractor.views, extractor.budget_px))

    def load(batch: list[ImageRecord]) -> list[np.ndarray]:
        return build_inputs([read_checked(image_set, record) for record in batch], extractor.views)

    for batch, inputs in prefetch(load, batches, workers=runtime.workers):
        found.update((record.id, record) for record in extractor.records(batch, inputs))
        progress.advance(len(batch))
    return [found[record.id] for record in shard]


def _measure(out: Path, num_shards: int, num_images: int, progress: Progress) -> StageResult:
    """Say what the maps cost on disk."""
    total = sum(_shard_path(out, number).stat().st_size for number in range(num_shards))
    progress.info(f"attention: {total / num_images:,.0f} bytes per image, {total / 1e6:.1f} MB for {num_images} images")
    return StageResult(metrics={"attention.bytes_per_image": total / num_images})
