"""From a segmenter's probabilities of its training images to their masks: the CRF of a retraining round, the writing.

Writes ``<id>.png``.  Needs no torch but for the CRF's torch backend, so that a process for a CRF starts quickly.
Shapes: C classes with background, L = 1 + the labels of an image, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.contracts import BACKGROUND_INDEX, ClassList, ImageRecord, Runtime, write_index_mask
from stages.ops.crf.dense_crf import CrfConfig, resolve_crf_backend
from stages.ops.pool import map_ordered, num_processes, take_in_order
from stages.scoring.prediction import refine_predictions
from stages.training.distributed import num_ranks

_NUM_WRITERS = 4


@dataclass(frozen=True)
class LabelledImage:
    """One image on its way from the network to its mask."""

    record: ImageRecord
    pixels: NDArray[np.uint8]
    """RGB, (H, W, 3)."""
    probabilities: NDArray[np.float32]
    """(L, H, W) of ``possible_classes``, summing to 1."""


@dataclass(frozen=True)
class LabellingContext:
    """What the writing of all masks shares."""

    crf: CrfConfig | None
    folder: Path
    num_classes: int
    """C."""
    device: str
    """Where the CRF's torch backend works."""


def possible_classes(record: ImageRecord, num_classes: int) -> NDArray[np.uint8]:
    """Class indices that an image's mask may hold: background and its labels; all where it has no labels."""
    if record.labels is None:
        return np.arange(num_classes, dtype=np.uint8)
    return np.array([BACKGROUND_INDEX, *(ClassList.class_index(label) for label in record.labels)], dtype=np.uint8)


def write_labels(context: LabellingContext, batches: Iterator[list[LabelledImage]], runtime: Runtime) -> Iterator[None]:
    """Write the masks: over processes, which the ranks share, where there is a CRF on the CPU, else over threads."""
    if context.crf is not None and resolve_crf_backend(context.crf.backend, context.device) != "torch":
        processes = max(1, num_processes(runtime.processes) // num_ranks())
        jobs = (job for batch in batches for job in batch)
        yield from map_ordered(_finish, jobs, context=context, processes=processes, in_flight=2)
        return
    decided = (pair for batch in batches for pair in zip(batch, _decide(context, batch), strict=True))
    with ThreadPoolExecutor(max_workers=_NUM_WRITERS) as writers:
        yield from take_in_order(writers, lambda pair: _write(context, *pair), decided, limit=2 * _NUM_WRITERS)


def _finish(context: LabellingContext, job: LabelledImage) -> None:
    """Decide and write one image's mask."""
    _write(context, job, _decide(context, [job])[0])


def _decide(context: LabellingContext, jobs: Sequence[LabelledImage]) -> list[NDArray[np.intp] | NDArray[np.uint8]]:
    """The place of each pixel's class in ``possible_classes``, after a CRF where there is one: on a GPU all at once."""
    if context.crf is None:
        return [job.probabilities.argmax(axis=0) for job in jobs]
    if not context.device.startswith("cuda"):
        return [found for job in jobs for found in _refine(context, [job])]
    from stages.ops.multi_scale import in_fitting_parts

    parts = in_fitting_parts(lambda part: _refine(context, jobs[part]), slice(0, len(jobs)))
    return [found for part in parts for found in part]


def _refine(context: LabellingContext, jobs: Sequence[LabelledImage]) -> list[NDArray[np.uint8]]:
    assert context.crf is not None
    images, probabilities = [job.pixels for job in jobs], [job.probabilities for job in jobs]
    return refine_predictions(images, probabilities, context.crf, device=context.device)


def _write(context: LabellingContext, job: LabelledImage, found: NDArray[np.intp] | NDArray[np.uint8]) -> None:
    mask = possible_classes(job.record, context.num_classes)[found]
    write_index_mask(context.folder / f"{job.record.id}.png", mask)
