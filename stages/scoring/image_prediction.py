"""Predict anybody's images with a trained segmenter: masks, pictures to look at, and areas.

Reads: image files, a segmenter.  Writes: ``<name>.png`` (palette PNG of class indices), ``overlays/<name>.jpg``,
``areas.csv``.  Each file appears whole or not at all.  A stopped call continues: each mask holds a digest of what it
was made from.  Torch is imported by the functions only.
Shapes: B images of one size, C classes with background, H W image pixels.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import (
    Progress,
    Runtime,
    encode_index_mask,
    read_image,
    read_image_size,
    voc_palette,
    write_atomic,
)
from stages.data.pictures import PictureFile
from stages.errors import DataError, InputError
from stages.ops.devices import check_precision
from stages.ops.pool import num_processes
from stages.ops.rate import ImageRate
from stages.scoring.network_pass import Look, look_at_images, plan_batches, refine_prediction
from stages.scoring.window_prediction import PicturePredictor, PredictOptions

if TYPE_CHECKING:
    from stages.nets.segmenters.segmenter import Segmenter

_CPU_BATCH_PX = 1 << 18
"""Pixels of a batch on a CPU, which slows down when its caches overflow: one image of VOC's size."""

_WAITING_BYTES = 1 << 32
"""Most memory for the probabilities that wait for the CRF."""

_FORMAT = 1
"""Raise when an equal image, model and options give another mask."""

AREAS_FILE = "areas.csv"
_OVERLAYS = "overlays"

_ORIGIN = "wsss"
"""Name of the PNG text that says what a mask was made from."""

_OVERLAY_PX = 1 << 20
"""Pixels of an overlay that are coloured at once."""

_JPEG_QUALITY = 90
_LONGEST_JPEG_PX = 65_500
"""JPEG ends at 65,535 pixels a side."""


@dataclass(frozen=True)
class SegmenterSource:
    """A trained segmenter: the names of its classes, what identifies it, and how to load it."""

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
    """Masks that were there already, of the same image, model and options."""
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
    """One image on its way to the disk."""

    picture: PictureFile
    origin: str
    """The digest that its mask will hold."""
    mask: NDArray[np.uint8] | None = None
    """Class indices (H, W); None where the CRF is still to make them."""


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
        ConfigError: fp16 without CUDA.
        InputError: an output would replace an input, or (without ``force``) a file of another origin.
        EnvironmentFailure: no window is small enough for the device's memory.
    """
    check_precision(options.precision, runtime, "--precision (or evaluate.precision)")
    summary = PredictionSummary(out)
    options = options.resolved(runtime.device)
    identity = _identify(source.digest, options)
    _refuse_inputs(pictures, out)
    with warnings.catch_warnings():
        # the user named the file: a large one is predicted, and one above Pillow's limit refused in words
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        progress.step("look at what is there", 0, len(pictures))
        areas, todo = _find_finished(pictures, identity, len(source.classes), out, progress, force=force)
        summary.skipped = len(areas)
        sizes = _read_sizes(todo, len(areas), summary, progress)
        progress.step("predict", len(areas), len(areas) + len(sizes))
        if sizes:
            _predict_all(source, sizes, options, identity, areas, summary, progress, runtime)
    _write_areas(out / AREAS_FILE, [p.name for p in pictures if p.name in areas], areas, source.classes)
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# What is there, what is to do
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_inputs(pictures: Sequence[PictureFile], out: Path) -> None:
    """An input is never replaced, also not by ``force``."""
    inputs = {picture.path.resolve() for picture in pictures}
    outputs = [path(out, picture) for picture in pictures for path in (_mask_path, _overlay_path)]
    replaced = [str(path) for path in outputs if path.resolve() in inputs]
    if replaced:
        raise InputError("these inputs would be replaced by results; choose another --out", replaced)


def _find_finished(
    pictures: Sequence[PictureFile], identity: str, num_classes: int, out: Path, progress: Progress, *, force: bool
) -> tuple[dict[str, NDArray[np.int64]], list[PictureFile]]:
    """Pixels per class of the masks that are there already, by name; and the images that are still to predict.

    ``progress`` hears of the former: it takes reading both files to know that they belong together.
    """
    areas: dict[str, NDArray[np.int64]] = {}
    todo: list[PictureFile] = []
    foreign: list[str] = []
    for picture in pictures:
        path = _mask_path(out, picture)
        if force or not path.exists():
            todo.append(picture)
            continue
        mask = _read_own_mask(path, picture, identity)
        if mask is None:
            foreign.append(str(path))
        elif _overlay_path(out, picture).exists():
            areas[picture.name] = _count_classes(mask, num_classes)
            progress.step("look at what is there", len(areas), len(pictures))
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
    pictures: Sequence[PictureFile], num_finished: int, summary: PredictionSummary, progress: Progress
) -> dict[PictureFile, tuple[int, int]]:
    """The sizes of the images; files that are no image are left out and become problems."""
    sizes: dict[PictureFile, tuple[int, int]] = {}
    for number, picture in enumerate(pictures, start=1):
        try:
            sizes[picture] = read_image_size(picture.path)
        except DataError as error:
            summary.problems.append(error.message)
        progress.step("look at what is there", num_finished + number, num_finished + len(pictures))
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
    num_classes = len(source.classes)
    predictor = PicturePredictor(source.load(str(device)), num_classes, options, device, progress)
    context = _Context(options, num_classes, summary.out, str(device))
    # two images' probabilities wait for each process of a CRF; of windows none are left that would wait
    largest_px = max((size[0] * size[1] for size in sizes.values() if options.window_for(size) is None), default=1)
    processes = max(1, min(num_processes(runtime.processes), _WAITING_BYTES // (2 * 4 * num_classes * largest_px)))

    def read(picture: PictureFile) -> tuple[_Job, NDArray[np.uint8]] | None:
        try:
            data = picture.path.read_bytes()
            return _Job(picture, _origin_of(identity, data)), read_image(picture.path, data)[0]
        except OSError as error:
            summary.problems.append(f"{picture.path}: not readable ({error.strerror or error})")
        except DataError as error:
            summary.problems.append(error.message)
        return None

    started, rate, total = time.monotonic(), ImageRate(), len(areas) + len(sizes)
    for name, counts in look_at_images(
        plan_batches(sizes.items(), _CPU_BATCH_PX if device.type == "cpu" else None),
        read=read,
        look=lambda jobs, pixels: _look(context, predictor, jobs, pixels),
        finish=_finish,
        context=context,
        crf=options.crf,
        device=device,
        processes=processes,
        remedy="leave out the CRF, or use --device cpu",
    ):
        areas[name] = counts
        summary.predicted += 1
        progress.step("predict", len(areas), total, unit="images", **rate.add(1))
    summary.seconds = time.monotonic() - started
    summary.windowed = predictor.num_windowed


def _look(
    context: _Context, predictor: PicturePredictor, jobs: Sequence[_Job], pixels: NDArray[np.uint8]
) -> list[Look[_Job]]:
    looks = []
    for job, image, (mask, probabilities) in zip(jobs, pixels, predictor.predict(pixels), strict=True):
        refined, crf = None, context.options.crf
        if crf is not None and probabilities is not None and context.device.startswith("cuda"):
            # alone: which images share a batch, and so the rounding, would depend on what is there already
            refined = refine_prediction(image, probabilities, crf, device=context.device)
        looks.append(Look(replace(job, mask=mask), image, probabilities, refined))
    return looks


def _finish(context: _Context, look: Look[_Job]) -> tuple[str, NDArray[np.int64]]:
    """Write one image's overlay and mask, after the CRF where there is one; its name and pixels per class.

    The mask comes last: where it is, everything is.
    """
    job, mask = look.item, look.item.mask
    if mask is None:
        assert context.options.crf is not None
        mask = look.after_crf(context.options.crf, context.device)
    _write_overlay(_overlay_path(context.out, job.picture), overlay_mask(look.image, mask))
    write_atomic(_mask_path(context.out, job.picture), encode_index_mask(mask, {_ORIGIN: job.origin}))
    return job.picture.name, _count_classes(mask, context.num_classes)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _identify(model_digest: str, options: PredictOptions) -> str:
    """Everything but the image that decides a mask."""
    content = {"format": _FORMAT, "model": model_digest, "options": options.key_content()}
    return json.dumps(content, sort_keys=True)


def _origin_of(identity: str, data: bytes) -> str:
    """Digest of the model, the options and the image's bytes, which a mask holds."""
    return hashlib.sha256(identity.encode() + hashlib.sha256(data).digest()).hexdigest()


def _mask_path(out: Path, picture: PictureFile) -> Path:
    """Where the mask of ``picture`` belongs."""
    return out / f"{picture.name}.png"


def _overlay_path(out: Path, picture: PictureFile) -> Path:
    """Where the overlay of ``picture`` belongs."""
    return out / _OVERLAYS / f"{picture.name}.jpg"


def _read_own_mask(path: Path, picture: PictureFile, identity: str) -> NDArray[np.uint8] | None:
    """The mask at ``path``, where it is whole and of this image, this model and these options."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            if image.info.get(_ORIGIN) == _origin_of(identity, picture.path.read_bytes()):
                return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return None


def overlay_mask(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image with 60 % of its class's colour (VOC's palette) over every pixel that is not background.

    Args:
        image: RGB, uint8 (H, W, 3).
        mask: Class indices, uint8 (H, W).

    Returns:
        RGB, uint8 (H, W, 3).
    """
    mixed = image.copy()
    rows = max(1, _OVERLAY_PX // image.shape[1])
    for top in range(0, len(mask), rows):
        part, is_object = mixed[top : top + rows], mask[top : top + rows] > 0
        colours = voc_palette()[mask[top : top + rows][is_object]].astype(np.uint16)
        part[is_object] = (part[is_object].astype(np.uint16) * 2 + colours * 3) // 5
    return mixed


def _write_overlay(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write RGB (H, W, 3) as JPEG; a side that no JPEG can have is shrunk."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((_LONGEST_JPEG_PX, _LONGEST_JPEG_PX))
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    write_atomic(path, buffer.getvalue())


def _count_classes(mask: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    """Pixels of each class; Pillow counts without widening every pixel to eight bytes."""
    return np.array(Image.fromarray(mask).histogram()[:num_classes], dtype=np.int64)


def _write_areas(
    path: Path, names: Sequence[str], areas: Mapping[str, NDArray[np.int64]], classes: Sequence[str]
) -> None:
    """One line for each image and class in it: ``image,class,pixels,ratio``; an image's ratios sum to 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class", "pixels", "ratio"])
    for name in names:
        total = int(areas[name].sum())
        for class_name, pixels in zip(classes, areas[name].tolist(), strict=True):
            if pixels:
                writer.writerow([name, class_name, pixels, f"{pixels / total:.6f}"])
    write_atomic(path, text.getvalue().encode(errors="surrogateescape"))  # names of files are bytes
