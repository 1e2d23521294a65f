"""Make the pseudo-masks of some images: what a worker of ``make_masks`` does, a call at a time.

Reads images and masks that an earlier call finished; writes ``<id>.png`` under the context's folder, and with ``soft``
``confidence/<id>.png`` beside that; with refinements also the masks between the steps
(``stages.masks.mask_files``).  Needs no torch but for refinements that work with it.
Shapes: H W image pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.contracts import (
    IGNORE_INDEX,
    AttentionRecord,
    ClassList,
    read_index_mask,
    read_rgb,
    write_index_mask,
)
from stages.errors import DataError, EnvironmentFailure
from stages.masks.label_rules import contested_pixels, initial_mask, settle_classes, upsample_maps
from stages.masks.mask_files import (
    confidence_path,
    label_confidence,
    step_names,
    step_path,
    write_confidence,
    write_steps,
)
from stages.masks.measuring import MaskStats, measure_mask
from stages.masks.refinements.chain import Refined, refine_in_steps
from stages.masks.refinements.config import RefinementConfig
from stages.masks.writing import BackgroundWriter

Mask = NDArray[np.uint8]
"""Class indices (H, W), 255 = unsure."""


class Job(NamedTuple):
    """One image."""

    record: AttentionRecord
    """Its attention."""
    image: str
    """Its file, relative to the data root."""
    walked: AttentionRecord | None = None
    """Its attention after a random walk."""
    mask: Mask | None = None
    """Its mask, where that was found already."""
    pixels: NDArray[np.uint8] | None = None
    """Its RGB pixels, where they were read ahead."""


@dataclass(frozen=True)
class Context:
    """What every image of one run shares."""

    config: RefinementConfig
    classes: ClassList
    root: Path
    """Folder of the user's data."""
    out: Path
    """Folder of the masks."""
    device: str = "cpu"
    """Where refinements work that torch does."""
    is_pooled: bool = False
    """Whether other processes do the same beside this one."""
    writer: BackgroundWriter | None = None
    """Writes beside the work where this process refines on a device; never sent to another process."""


def make_and_measure(context: Context, jobs: Sequence[Job]) -> list[MaskStats]:
    """Make the masks of some images and measure them."""
    measured = []
    for job, mask in zip(jobs, _find_or_make(context, jobs), strict=True):
        measured.append(measure_mask(job.record, _thresholded(context, job.record), mask))
    return measured


def make_only(context: Context, jobs: Sequence[Job]) -> list[str]:
    """Make masks of a part, which nobody measures before the parts are together; the ids."""
    _find_or_make(context, jobs)
    return [job.record.id for job in jobs]


def is_made(context: Context, image_id: str) -> bool:
    """Whether all files of an image are there; one that was damaged has been taken away."""
    made, chain = context.out.parent, context.config.chain
    paths = [step_path(made, number, name, image_id) for number, name in enumerate(step_names(chain)[:-1])]
    if context.config.soft:
        paths.append(confidence_path(made, image_id))
    return all(path.is_file() for path in (*paths, context.out / f"{image_id}.png"))


def find_mask(context: Context, record: AttentionRecord) -> Mask | None:
    """The mask that an earlier, stopped call wrote; None where there is none of the image's size that reads back."""
    if not is_made(context, record.id):
        return None
    try:
        mask = read_index_mask(context.out / f"{record.id}.png")
    except DataError:
        return None
    return mask if mask.shape == record.size else None


def read_ahead(context: Context, jobs: Sequence[Job]) -> list[Job]:
    """Some jobs with the pixels of the images that have no mask yet; for a thread beside the work.

    Raises:
        DataError: an image is missing or is not of the size that its attention was made for.
    """
    return [job if is_made(context, job.record.id) else job._replace(pixels=_read_image(context, job)) for job in jobs]


def _find_or_make(context: Context, jobs: Sequence[Job]) -> list[Mask]:
    found = [find_mask(context, job.record) if job.mask is None else job.mask for job in jobs]
    missing = [job for job, mask in zip(jobs, found, strict=True) if mask is None]
    made = iter(_make(context, missing) if missing else ())
    return [next(made) if mask is None else mask for mask in found]


def _make(context: Context, jobs: Sequence[Job]) -> list[Mask]:
    """Refine and write the masks of some images."""
    if context.is_pooled and context.config.uses_torch:
        import torch

        torch.set_num_threads(1)  # the other processes have the other cores
    images = [_read_image(context, job) if job.pixels is None else job.pixels for job in jobs]
    records = [settle_classes(job.walked or job.record, context.config, context.classes) for job in jobs]
    refined = _refine(context, images, records)
    for job, record, found in zip(jobs, records, refined, strict=True):
        _mark_contested(context, record, found)
        if context.writer is None:
            _write(context, job, record, found)
        else:
            kept = found if context.config.soft else found._replace(states=[])  # probabilities are large
            context.writer.submit(_write, context, job, record, kept)
    return [found.mask for found in refined]


def _mark_contested(context: Context, record: AttentionRecord, found: Refined) -> None:
    """With ``conflict: unsure``, refinement decides nothing between classes that both claim a pixel."""
    if context.config.conflict == "unsure":
        contested = contested_pixels(upsample_maps(record), context.config)
        for mask in (*found.before, found.mask):
            mask[contested] = IGNORE_INDEX


def _write(context: Context, job: Job, record: AttentionRecord, found: Refined) -> None:
    """Write one image's files, of which ``record`` was refined; the mask comes last: it says that the image is done."""
    config, made = context.config, context.out.parent
    if config.soft:
        confidence = label_confidence(found.mask, record.labels, found.states)
        write_confidence(confidence_path(made, record.id), confidence)
    if config.chain:
        first = (_thresholded(context, job.record),) if config.walks else ()
        write_steps(made, record.id, config.chain, (*first, *found.before))
    write_index_mask(context.out / f"{record.id}.png", found.mask)


def _thresholded(context: Context, record: AttentionRecord) -> Mask:
    """The mask before any refinement."""
    return initial_mask(settle_classes(record, context.config, context.classes), context.config)


def _refine(context: Context, images: Sequence[NDArray[np.uint8]], records: Sequence[AttentionRecord]) -> list[Refined]:
    """The refined masks with what led to them.

    Half the images at a time where the device's memory does not hold them all.
    """
    try:
        return refine_in_steps(images, records, context.config, device=context.device, keep_steps=True)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which a process without torch cannot name
            raise
        if len(images) == 1:
            raise EnvironmentFailure(
                f"the device's memory does not hold the refinement of image '{records[0].id}' of {records[0].size} "
                "pixels; run with runtime.device: cpu"
            ) from error
    half = len(images) // 2
    return [*_refine(context, images[:half], records[:half]), *_refine(context, images[half:], records[half:])]


def _read_image(context: Context, job: Job) -> NDArray[np.uint8]:
    path = context.root / job.image
    image = read_rgb(path)
    if image.shape[:2] != job.record.size:
        raise DataError(
            f"{path}: expected {job.record.size} pixels (height, width), as when its attention was made, found "
            f"{image.shape[:2]}; the file changed since prepare_data ran: run it again"
        )
    return image
