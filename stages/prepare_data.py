"""Stage 1: list the data set, decode every image, and write the index that all later stages read.

Reads: the data set's lists, labels, every image; of training masks only the header (mode and size), never a pixel:
the weak-supervision promise starts here.  Masks of val are read whole, since a wrong one would spoil the scores.
Only where no image of val has both labels and a mask, the classes in the training masks are compared with the labels;
a warning comes of it and nothing else.
Writes: ``index.json``, and for the synthetic set the pictures below ``data/``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import Field

from stages.contracts import ImageIndex, ImageRecord, Progress, Runtime, StageConfig, StageResult, write_json
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.synthetic_images import generate_synthetic
from stages.data.boxes import box_warnings, clip_boxes
from stages.data.check import (
    CheckedImage,
    check_any_object,
    check_images,
    image_warnings,
)
from stages.data.config import DataConfig
from stages.data.listing import list_data
from stages.data.records import PROBLEMS_SHOWN, DataListing, some
from stages.data.subsets import hold_out
from stages.errors import DataError

VERSION = 4
"""Bumped when the same input gives another output."""


class PrepareDataConfig(StageConfig):
    """How the index is made."""

    holdout_ratio: float = Field(default=0.05, ge=0.0, le=0.5)
    """Share of the training images kept from the classifier, by a hash of the id, to measure its label accuracy;
    only where val has no labels to measure it on."""


def prepare_data(
    config: PrepareDataConfig,
    *,
    data: DataConfig,
    out: Path,
    progress: Progress,
    runtime: Runtime | None = None,
) -> StageResult:
    """Write the index of a data set whose every image decodes.

    Args:
        config: The stage's own settings.
        data: Where the data set is and how it is laid out, or how to generate it.
        out: Output folder; called again with the same one, the stage ends with the same bytes.
        progress: Counts images; receives what should be known, e.g. that val has no masks.
        runtime: Number of processes; changes no result.

    Returns:
        Metrics ``data.num_train``, ``data.num_val``, ``data.num_test``, ``data.num_skipped``.

    Raises:
        DataError: lists or labels are wrong, an image or mask does not read and ``on_bad_image`` is fail, or not
            one mask of val has an object; names every problem.
    """
    listing = list_data(data)
    for text in listing.warnings:
        progress.warn(text)
    root = listing.root
    if isinstance(data, SyntheticConfig) or root is None:
        root = _generate(data, out / "data", progress)
    processes = (runtime or Runtime()).processes
    val = set(listing.splits["val"])
    images = check_images(listing, root, val, progress, compared=_compared(listing), processes=processes)
    checked = {image.id: image for image in images}
    kept = _keep_good(listing, checked, data, progress)
    for text in image_warnings(listing, checked.values()):
        progress.warn(text)
    useless = check_any_object(listing, [checked[image_id] for image_id in listing.splits["val"]])
    if useless:
        raise DataError("the scores on val would be worthless:", useless)
    for text in box_warnings((image, checked[image.id].size) for image in kept.images):
        progress.warn(text)
    # whether images are held out is up to the lists alone: a damaged file of val changes no training
    holdout = hold_out(kept, config.holdout_ratio) if hold_out(listing, config.holdout_ratio) else ()
    index = _index(kept, checked, holdout)
    write_json(out / "index.json", index.model_dump(mode="json"))
    return StageResult(metrics=_metrics(index, skipped=len(listing.images) - len(kept.images)))


def _compared(listing: DataListing) -> set[str]:
    """Training images whose masks must show whether labels and masks agree, since no mask of val can."""
    if listing.has_object_masks or any(image.mask and image.labels is not None for image in listing.split("val")):
        return set()
    return {image.id for image in listing.split("train") if image.mask and image.labels is not None}


def _generate(data: DataConfig, folder: Path, progress: Progress) -> Path:
    if not isinstance(data, SyntheticConfig):
        raise TypeError(f"only a synthetic data set has no root, got {type(data).__name__}")
    progress.info(f"drawing {data.num_train + data.num_val:,} pictures of {data.size_px} px")
    generate_synthetic(data, folder)
    return folder


def _keep_good(
    listing: DataListing,
    checked: dict[str, CheckedImage],
    data: DataConfig,
    progress: Progress,
) -> DataListing:
    """The listing without what does not read, or an error naming all of it.

    An image goes when it does not decode, a val image also when its mask is wrong.  A training image with a wrong
    mask stays and loses the mask: masks decide nothing in a weakly supervised training.
    """
    problems = [text for image in checked.values() for text in (*image.image_problems, *image.mask_problems)]
    if not problems:
        return listing
    if data.on_bad_image == "fail":
        shown = problems[:PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown):,} more; `wsss data check --json` lists all")
        raise DataError(f"{len(problems):,} images or masks of {listing.root} do not read:", shown)
    for text in problems:
        progress.warn(text)
    return _without_bad(listing, checked, progress)


def _without_bad(listing: DataListing, checked: dict[str, CheckedImage], progress: Progress) -> DataListing:
    val = set(listing.splits["val"])
    bad_masks = {image.id for image in checked.values() if image.mask_problems}
    dropped = {image.id for image in checked.values() if image.image_problems} | (bad_masks & val)
    images = tuple(
        replace(image, mask=None, full_mask=None) if image.id in bad_masks else image
        for image in listing.images
        if image.id not in dropped
    )
    splits = {split: tuple(i for i in ids if i not in dropped) for split, ids in listing.splits.items()}
    splits["train_score"] = tuple(i for i in splits["train_score"] if i not in bad_masks)
    progress.warn(f"left out {len(dropped):,} images (data.on_bad_image=skip): {some(sorted(dropped))}")
    empty = [split for split in ("train", "val") if not splits[split]]
    if empty:
        raise DataError(f"no readable image is left in {' and '.join(empty)}; replace the damaged files")
    return replace(listing, images=images, splits=splits)


def _index(listing: DataListing, checked: dict[str, CheckedImage], holdout: tuple[str, ...]) -> ImageIndex:
    records: list[ImageRecord] = []
    for image in listing.images:
        size = checked[image.id].size
        if size is None:
            raise RuntimeError(f"image '{image.id}' was kept without a size")
        records.append(
            ImageRecord(
                id=image.id,
                image=image.image,
                size=size,
                labels=image.labels,
                mask=image.mask,
                full_mask=image.full_mask,
                boxes=clip_boxes(image.boxes, size),
            )
        )
    splits = {**listing.splits, "holdout": holdout}
    return ImageIndex(
        classes=listing.classes,
        images=tuple(records),
        splits=splits,
        mask_values=listing.mask_values,
        has_object_masks=listing.has_object_masks,
        is_single_label=listing.is_single_label,
    )


def _metrics(index: ImageIndex, skipped: int) -> dict[str, int]:
    metrics = {"data.num_train": len(index.splits["train"]), "data.num_val": len(index.splits["val"])}
    if "test" in index.splits:
        metrics["data.num_test"] = len(index.splits["test"])
    return {**metrics, "data.num_skipped": skipped} if skipped else metrics
