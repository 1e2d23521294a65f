"""Attention maps of the training images for the labels they have, over several scales and mirrored.

Reads: the images and labels of split ``train`` (never a mask) and the trained classifier.
Writes: ``shards/attention-00000.npz`` …, ``shard_images`` images each, in the order of the split; with
``keep_maps: false`` only ``views.json``, by which ``make_masks`` makes the same maps when it wants them.
Each map is the mean over scales and flips of the method's maps (ReLU'd class scores for CAM), laid onto a grid of the
image's size / ``map_stride``, divided by its own maximum and stored as uint8 with that maximum beside it; a class
without evidence stays zero, and so does a map that is NaN or infinite, whose maximum is stored as NaN.

A run can be stopped at any instant: shards are written whole, and the next run makes those that are missing, with the
same bytes.  Batches never reach across a shard and are planned from the images' sizes alone.  How many inputs share a
forward pass (more on a GPU, fewer after it ran out of memory) changes nothing but the last bits of float arithmetic,
which the 256 steps of a stored map swallow but for a cell on the edge between two steps.  Memory does not grow with the
data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stages.contracts import (
    AttentionRecord,
    ImageRecord,
    ImageSet,
    Part,
    Progress,
    Runtime,
    StageResult,
    open_image_set,
    read_attention_shard,
    write_attention_shard,
)
from stages.errors import DamagedFileError, InputError
from stages.masks.attention_maps import MapCensus
from stages.masks.attention_windows import (
    AttentionConfig,
    Window,
    WindowAttention,
    check_classes,
    training_windows,
    write_views,
)
from stages.masks.writing import explain_full_disk
from stages.ops.devices import check_precision
from stages.ops.rate import ImageRate

VERSION = 3
"""Raise when equal inputs give other bytes than before."""

TASK = "attention maps"
"""What progress is told of."""


class MakeAttentionConfig(AttentionConfig):
    """How the trained classifier looks at an image, and whether its attention is stored."""

    keep_maps: bool = True
    """Store the maps.  With false, ``make_masks`` makes them as it goes and no map touches the disk: the masks are the
    same, ``attention.*`` is not scored, and other masks from the same classifier look at every image again."""


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
        config: Scales, flips and the stored resolution; whether anything is stored.
        images: Output folder of ``prepare_data``.
        classifier: Output folder of ``train_classifier``.
        data_root: Folder of the user's data; None for the embedded data set.
        out: Folder to write to; finished shards in it are kept.
        progress: Hears of every finished batch.
        runtime: Device, threads, and the threads that read images ahead (``workers``).
        part: Write only this part of the files, each with the name and the bytes that it has in the whole; where there
            are fewer files than parts, some parts are empty.  None writes all.

    Returns:
        Metric ``attention.bytes_per_image``: bytes on disk over images; nothing for a part or where no map is kept.

    Raises:
        ConfigError: ``precision: fp16`` without CUDA.
        DataError: a training image has no labels, cannot be read, or changed its size.
        InputError: the classifier knows other classes, or gives nothing but NaN.
        EnvironmentFailure: the device cannot hold one image, or the disk is full.
    """
    runtime = runtime or Runtime()
    check_precision(config.precision, runtime, "make_attention.precision")
    image_set = open_image_set(images, data_root)
    shards = training_windows(image_set, config)
    if not config.keep_maps:
        return _promise(config, classifier, image_set, out, progress, part)
    wanted = shards if part is None else [shards[position] for position in part.positions(len(shards))]
    census = MapCensus()
    missing = [shard for shard in wanted if not _is_finished(_shard_path(out, shard), shard.records, census, progress)]
    num_images, num_missing = (sum(len(shard.records) for shard in some) for some in (wanted, missing))
    progress.step(TASK, num_images - num_missing, num_images)
    if missing:
        source = WindowAttention(config, classifier=classifier, images=image_set, progress=progress, runtime=runtime)
        with explain_full_disk(out, lambda: f"{_count_shards(out)} of {len(shards)} files of maps"):
            _store(source, missing, census, out, progress, num_images)
    if part is not None:
        return StageResult()
    census.conclude(num_images, progress)
    return _measure(out, shards, num_images, progress)


def _promise(
    config: MakeAttentionConfig,
    classifier: Path,
    image_set: ImageSet,
    out: Path,
    progress: Progress,
    part: Part | None,
) -> StageResult:
    """Write what ``make_masks`` makes the maps by; a part of it is nothing."""
    check_classes(classifier, image_set)
    if part is None:
        write_views(out, config)
        progress.info("attention: no map is kept; make_masks makes them as it goes")
    return StageResult()


def _shard_path(out: Path, shard: Window) -> Path:
    return out / "shards" / f"attention-{shard.number:05d}.npz"


def _count_shards(out: Path) -> int:
    return sum(1 for _ in (out / "shards").glob("attention-*.npz"))


def _is_finished(path: Path, shard: Sequence[ImageRecord], census: MapCensus, progress: Progress) -> bool:
    """Whether an earlier run wrote this shard for these images; a damaged one is made again."""
    if not path.exists():
        return False
    try:
        found = read_attention_shard(path)
    except DamagedFileError as error:
        progress.warn(f"{error.message}: making this shard again")
        return False
    if [record.id for record in found] != [record.id for record in shard]:
        raise InputError(
            f"{path} holds attention of other images; choose an empty output folder or delete {path.parent}"
        )
    for record in found:
        census.count(record)
    return True


def _store(
    source: WindowAttention,
    shards: Sequence[Window],
    census: MapCensus,
    out: Path,
    progress: Progress,
    num_images: int,
) -> None:
    """Make and write shards, each in the order of its images as soon as the last of them is there."""
    made: dict[str, AttentionRecord] = {}
    rate, done = ImageRate(), num_images - sum(len(shard.records) for shard in shards)
    for shard, records in source.batches(shards):
        made.update((record.id, record) for record in records)
        done += len(records)
        progress.step(TASK, done, num_images, unit="images", **rate.add(len(records)))
        if len(made) == len(shard.records):
            write_attention_shard(_shard_path(out, shard), [made[image.id] for image in shard.records])
            for record in made.values():
                census.count(record)
            made.clear()


def _measure(out: Path, shards: Sequence[Window], num_images: int, progress: Progress) -> StageResult:
    """Say what the maps cost on disk."""
    total = sum(_shard_path(out, shard).stat().st_size for shard in shards)
    progress.info(f"attention: {total / num_images:,.0f} bytes per image, {total / 1e6:.1f} MB for {num_images} images")
    return StageResult(metrics={"attention.bytes_per_image": total / num_images})
