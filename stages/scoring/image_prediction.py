"""Predict anybody's images with a trained segmenter: masks, pictures to look at, and areas.

Reads: image files, a segmenter.  Writes: ``<name>.png`` (palette PNG of class indices), ``overlays/<name>.jpg``,
``areas.csv``.  Each file appears whole or not at all; a stopped call continues, because a mask tells in itself what it
was made of.
The network works in this process, batch by batch; files are read before it and written behind it meanwhile.
Shapes: B images of one size, C classes with background, H W image pixels.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import Progress, Runtime
from stages.data.pictures import PictureFile, decode_picture, read_picture_size
from stages.data.whole_images import batches_of_one_size
from stages.errors import DataError, InputError
from stages.ops.pool import map_ordered, num_processes, take_in_order
from stages.ops.rate import ImageRate
from stages.scoring.image_scores import PicturePredictor, PredictOptions
from stages.scoring.prediction import refine_prediction
from stages.scoring.prediction_files import (
    AREAS_FILE,
    count_classes,
    identify,
    mask_path,
    origin_of,
    overlay_mask,
    overlay_path,
    read_own_mask,
    write_areas,
    write_mask,
    write_overlay,
)

if TYPE_CHECKING:
    from stages.nets.segmenters.segmenter import Segmenter

_BATCH = 8
"""Images of one size that go through the network together."""

_BATCH_PX = 1 << 22
"""Pixels of such a batch, unless one image alone has more."""

_CPU_BATCH_PX = 1 << 18
"""The same on a CPU, which is slower with what leaves its caches: one image of VOC's size."""

_WAITING_BYTES = 1 << 32
"""Most memory for the probabilities that wait for the CRF."""

_NUM_WRITERS = 4


@dataclass(frozen=True)
class SegmenterSource:
    """A trained segmenter: what it calls its classes, what identifies it, and how to get it."""

    classes: tuple[str, ...]
    """Background first."""
    digest: str
    """sha256 of its tensors' file."""
    load: Callable[[str], Segmenter]
    """Gives the net on a device, in evaluation mode."""


@dataclass
class PredictionSummary:
    """What a call did."""

    out: Path
    predicted: int = 0
    skipped: int = 0
    """Masks of the same image, model and options that were there already."""
    windowed: int = 0
    """Images that were seen in windows."""
    problems: list[str] = field(default_factory=list)
    """One line for each image that could not be read."""
    seconds: float = 0.0
    """From the first image's reading to the last one's writing; the model was loaded before."""

    @property
    def images_per_s(self) -> float:
        """Predicted images a second, reading and writing included."""
        return self.predicted / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class _Job:
    """One image with its prediction, on its way to the disk."""

    picture: PictureFile
    origin: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None
    """Class indices (H, W); None where the CRF is still to make them."""
    probabilities: NDArray[np.float32] | None
    """(C, H, W), for the CRF."""


@dataclass(frozen=True)
class _Context:
    """What the writing of all images shares."""

    options: PredictOptions
    num_classes: int
    out: Path
    device: str


def predict_pictures(
    source: SegmenterSource,
    pictures: Sequence[PictureFile],
    options: PredictOptions,
    *,
    out: Path,
    progress: Progress,
    runtime: Runtime,
    force: bool = False,
) -> PredictionSummary:
    """Predict ``pictures`` and write masks, overlays and areas under ``out``.

    Args:
        source: The segmenter.
        pictures: What to predict; names differ.
        options: Scales, CRF, windows.
        out: Where to write.
        progress: Hears of every image.
        runtime: Device, threads, and processes for the CRF.
        force: Predict again what is there, and replace files of another origin.

    Returns:
        What was done, with one problem for each image that could not be read; the others are finished.

    Raises:
        InputError: an output would replace an input, or (without ``force``) a file of another origin.
        EnvironmentFailure: no window is small enough for the device's memory.
    """
    summary = PredictionSummary(out)
    options = options.resolved(runtime.device)
    identity = identify(source.digest, options)
    _refuse_inputs(pictures, out)
    with warnings.catch_warnings():
        # the user named the file: a large one is predicted, and one above Pillow's limit refused in words
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        progress.begin("look at what is there", total=len(pictures))
        areas, todo = _find_finished(pictures, identity, len(source.classes), out, progress, force=force)
        summary.skipped = len(areas)
        sizes = _read_sizes(todo, summary, progress)
        progress.begin("predict", total=len(areas) + len(sizes), done=len(areas))
        if sizes:
            _predict_all(source, sizes, options, identity, areas, summary, progress, runtime)
    write_areas(out / AREAS_FILE, [p.name for p in pictures if p.name in areas], areas, source.classes)
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# What is there, what is to do
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_inputs(pictures: Sequence[PictureFile], out: Path) -> None:
    """An input is never replaced, also not by ``force``."""
    inputs = {picture.path.resolve() for picture in pictures}
    outputs = [path(out, picture) for picture in pictures for path in (mask_path, overlay_path)]
    replaced = [str(path) for path in outputs if path.resolve() in inputs]
    if replaced:
        raise InputError("these inputs would be replaced by results; choose another --out", replaced)


def _find_finished(
    pictures: Sequence[PictureFile], identity: str, num_classes: int, out: Path, progress: Progress, *, force: bool
) -> tuple[dict[str, NDArray[np.int64]], list[PictureFile]]:
    """Pixels per class of the masks that are there already, by name; and the images that are still to predict.

    ``progress`` hears of the former: that they are these images' masks is known once both files have been read.
    """
    areas: dict[str, NDArray[np.int64]] = {}
    todo: list[PictureFile] = []
    foreign: list[str] = []
    for picture in pictures:
        path = mask_path(out, picture)
        if force or not path.exists():
            todo.append(picture)
            continue
        mask = read_own_mask(path, picture, identity)
        if mask is None:
            foreign.append(str(path))
        elif overlay_path(out, picture).exists():
            areas[picture.name] = count_classes(mask, num_classes)
            progress.advance(1)
        else:
            todo.append(picture)
    if foreign:
        raise InputError(
            "these files are there and are not the masks of these images, this model and these options; choose "
            "another --out, or replace them with --force",
            foreign,
        )
    return areas, todo


def _read_sizes(
    pictures: Sequence[PictureFile], summary: PredictionSummary, progress: Progress
) -> dict[PictureFile, tuple[int, int]]:
    """The sizes of the images, those that are none left out and named."""
    sizes: dict[PictureFile, tuple[int, int]] = {}
    for picture in pictures:
        try:
            sizes[picture] = read_picture_size(picture.path)
        except DataError as error:
            summary.problems.append(error.message)
        progress.advance(1)
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# The work
# ---------------------------------------------------------------------------------------------------------------------


def _predict_all(
    source: SegmenterSource,
    sizes: dict[PictureFile, tuple[int, int]],
    options: PredictOptions,
    identity: str,
    areas: dict[str, NDArray[np.int64]],
    summary: PredictionSummary,
    progress: Progress,
    runtime: Runtime,
) -> None:
    """Read, predict and write ``sizes``' images; adds to ``areas`` and ``summary``."""
    from stages.ops.devices import resolve_device

    device = resolve_device(runtime)
    predictor = PicturePredictor(source.load(str(device)), len(source.classes), options, device, progress)
    context = _Context(options, len(source.classes), summary.out, str(device))
    started, rate = time.monotonic(), ImageRate()
    most_px = _CPU_BATCH_PX if device.type == "cpu" else _BATCH_PX
    batches = batches_of_one_size(sizes.items(), most_images=_BATCH, most_px=most_px)
    jobs = _predictions(predictor, batches, identity, summary)
    # of windows no probabilities are left that would wait
    largest_px = max((size[0] * size[1] for size in sizes.values() if options.window_for(size) is None), default=1)
    for name, counts in _finished(context, jobs, _num_crf_processes(context, largest_px, runtime)):
        areas[name] = counts
        summary.predicted += 1
        progress.advance(1, **rate.add(1))
    summary.seconds = time.monotonic() - started
    summary.windowed = predictor.num_windowed


def _num_crf_processes(context: _Context, largest_px: int, runtime: Runtime) -> int:
    """Processes for the CRF: two images' probabilities wait for each, and together they stay below a bound."""
    each_bytes = 2 * 4 * context.num_classes * largest_px
    return max(1, min(num_processes(runtime.processes), _WAITING_BYTES // each_bytes))


def _finished(context: _Context, jobs: Iterator[_Job], processes: int) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Write the predictions: over processes where there is a CRF on the CPU, else over threads."""
    crf = context.options.crf
    if crf is not None and crf.backend != "torch":
        yield from map_ordered(_finish, jobs, context=context, processes=processes, in_flight=2)
        return
    num_threads = 1 if crf is not None else _NUM_WRITERS
    with ThreadPoolExecutor(max_workers=num_threads) as writers:
        yield from take_in_order(writers, lambda job: _finish(context, job), jobs, limit=2 * num_threads)


def _predictions(
    predictor: PicturePredictor, batches: Sequence[list[PictureFile]], identity: str, summary: PredictionSummary
) -> Iterator[_Job]:
    """Run the network over ``batches``; the next one's images are read meanwhile."""

    def read(batch: list[PictureFile]) -> list[tuple[PictureFile, str, NDArray[np.uint8]] | str]:
        return [_read(picture, identity) for picture in batch]

    with ThreadPoolExecutor(max_workers=1) as reader:
        for found in take_in_order(reader, read, batches, limit=2):
            summary.problems += [problem for problem in found if isinstance(problem, str)]
            for group in _by_shape([item for item in found if not isinstance(item, str)]):
                pixels = np.stack([image for _, _, image in group])
                scored = predictor.predict(pixels)
                for (picture, origin, image), (mask, probabilities) in zip(group, scored, strict=True):
                    yield _Job(picture, origin, image, mask, probabilities)


def _read(picture: PictureFile, identity: str) -> tuple[PictureFile, str, NDArray[np.uint8]] | str:
    """The image with what its mask will tell, or why it cannot be read."""
    try:
        data = picture.path.read_bytes()
        return picture, origin_of(identity, data), decode_picture(data, picture.path)
    except OSError as error:
        return f"{picture.path}: not readable ({error.strerror or error})"
    except DataError as error:
        return error.message


def _by_shape(
    found: Sequence[tuple[PictureFile, str, NDArray[np.uint8]]],
) -> list[list[tuple[PictureFile, str, NDArray[np.uint8]]]]:
    """Split what was decoded where a file's head told another size than its pixels have."""
    groups: dict[tuple[int, ...], list[tuple[PictureFile, str, NDArray[np.uint8]]]] = {}
    for item in found:
        groups.setdefault(item[2].shape, []).append(item)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def _finish(context: _Context, job: _Job) -> tuple[str, NDArray[np.int64]]:
    """Write one image's overlay and mask, after the CRF where there is one; its name and pixels per class.

    The mask comes last: where it is, everything is.
    """
    mask, crf = job.mask, context.options.crf
    if mask is None:
        assert job.probabilities is not None
        assert crf is not None
        mask = refine_prediction(job.image, job.probabilities, crf, device=context.device)
    write_overlay(overlay_path(context.out, job.picture), overlay_mask(job.image, mask))
    write_mask(mask_path(context.out, job.picture), mask, job.origin)
    return job.picture.name, count_classes(mask, context.num_classes)
