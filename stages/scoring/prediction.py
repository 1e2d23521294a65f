"""Predict whole splits with a trained segmenter and count the predictions where there are true masks.

The network works in this process, batch by batch; the CRF of what it gives works over processes meanwhile.
Reads: images, true masks, a segmenter.  Writes: ``predictions/<id>.png``, masks of the kind that is asked for, and,
batch by batch, the counts of finished images under ``partial/``, so that a stopped run continues.
Shapes: B images of one size, C classes with background, H W image pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from stages.contracts import ImageRecord, ImageSet, Progress, Runtime, StageConfig, write_index_mask
from stages.data.whole_images import batches_of_one_size
from stages.errors import DamagedFileError, DataError, EnvironmentFailure
from stages.nets.segmenters.files import load_segmenter
from stages.ops.crf.dense_crf import CrfConfig, open_crf_batch, probability_unary, resolve_crf_backend
from stages.ops.metrics.boundaries import count_boundaries
from stages.ops.metrics.confusion import SparseConfusions, confusion_matrix, read_confusions, write_confusions
from stages.ops.pool import map_ordered, num_processes, take_in_order
from stages.ops.rate import ImageRate

if TYPE_CHECKING:
    import torch

_BATCH = 8
"""Images of one size that go through the network together; also what is done at once or not at all."""

_BATCH_PX = 1 << 22
"""Pixels of such a batch, unless one image alone has more: the probabilities of all classes are kept for each."""

_LIKELY = 0.01
"""The CRF of a prediction gets the classes that reach this probability somewhere: its cost grows with the labels."""


def _check_scales(scales: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0.1 <= scale <= 4 for scale in scales):
        raise ValueError("scales must lie in 0.1 … 4")
    return scales


Scales = Annotated[tuple[float, ...], Field(min_length=1, max_length=16), AfterValidator(_check_scales)]
"""Factors on the size at which a segmenter sees an image."""

MaskKind = Literal["single", "multi_scale", "multi_scale_crf"]
"""Masks of one scale; of the mean over scales and mirror images; of that mean after the CRF."""

SCORE_SUFFIXES: Mapping[MaskKind, str] = {"single": "", "multi_scale": "_ms", "multi_scale_crf": "_ms_crf"}
"""How the scores of each kind end: ``segmenter.miou_ms``, and ``segmenter_ms`` for its counts."""

Matrices = dict[str, NDArray[np.int64]]
"""Counts of one image by what was scored: segmenter, segmenter_ms, segmenter_ms_crf, and the outlines of each."""


class PredictionConfig(StageConfig):
    """How a segmenter looks at whole images."""

    short_side_px: int | None = Field(default=None, ge=16, le=4096)
    """The shorter side of what the network sees, in pixels; None keeps the image's.  Masks have the image's size."""
    multi_scale: bool = True
    """Also score the mean of the probabilities over ``scales`` and mirror images."""
    scales: Scales = (0.5, 0.75, 1.0, 1.25, 1.5)
    """Factors on the network's input size."""
    flip: bool = True
    """Whether each scale also sees the mirror image."""
    crf: bool = False
    """Also score the multi-scale probabilities after a dense CRF."""
    crf_config: CrfConfig = CrfConfig(preset="deeplab_v2_resnet101")
    """Numbers of that CRF."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.crf and not self.multi_scale:
            raise ValueError("crf: true refines the multi-scale probabilities and needs multi_scale: true")
        return self


@dataclass(frozen=True)
class _Batch:
    """Images of one size that are predicted together; the plan depends on the image list alone."""

    number: int
    records: tuple[ImageRecord, ...]


@dataclass(frozen=True)
class _Prediction:
    """One image's way from the network to its counts."""

    record: ImageRecord
    single: NDArray[np.uint8]
    """Class indices (H, W) at one scale."""
    multi: NDArray[np.uint8] | None
    """Class indices (H, W) of the multi-scale mean."""
    probabilities: NDArray[np.float32] | None
    """That mean (C, H, W), for the CRF alone."""
    refined: NDArray[np.uint8] | None = None
    """Class indices (H, W) after the CRF, where a CUDA device refined the batch at once."""


@dataclass(frozen=True)
class _Context:
    """What all images of one run share."""

    config: PredictionConfig
    images: ImageSet
    scored: frozenset[str]
    segmenter: Path
    out: Path
    masks: MaskKind = "single"
    """What is written."""
    device: str = "cpu"
    """Where the torch backend of the CRF works."""

    def needs_multi(self, record: ImageRecord) -> bool:
        """Whether the multi-scale mean of an image is scored or written."""
        return self.config.multi_scale and (record.id in self.scored or self.masks != "single")

    def needs_crf(self, record: ImageRecord) -> bool:
        """Whether its mask after the CRF is."""
        return self.config.crf and (record.id in self.scored or self.masks == "multi_scale_crf")


def predict_images(
    config: PredictionConfig,
    image_set: ImageSet,
    records: Sequence[ImageRecord],
    *,
    segmenter: Path,
    scored: frozenset[str],
    out: Path,
    progress: Progress,
    runtime: Runtime,
    masks: MaskKind = "single",
) -> dict[str, SparseConfusions]:
    """Write the prediction of every image and count those that are scored.

    Args:
        config: Sizes, scales, CRF.
        image_set: The data.
        records: Its images to predict.
        segmenter: Output folder of ``train_segmenter``.
        scored: Ids of those whose true masks are to be compared.
        out: Where to write; finished batches are skipped.
        progress: Where to report to.
        runtime: Device, and processes for the CRF.
        masks: Which masks are written; ``config`` asks for their scores too.

    Returns:
        The counts of the scored images, in the order of ``records``, by what was scored; empty when none was.

    Raises:
        EnvironmentFailure: the accelerator's memory does not hold one image.
    """
    batches = _plan(records)
    todo = [batch for batch in batches if not _is_finished(_partial_path(out, batch), progress)]
    progress.begin("segmenter", total=len(records), done=len(records) - sum(len(batch.records) for batch in todo))
    if todo:
        context = _Context(config=config, images=image_set, scored=scored, segmenter=segmenter, out=out, masks=masks)
        _predict_batches(context, todo, progress, runtime)
    parts: dict[str, list[SparseConfusions]] = {}
    for batch in batches:
        for thing, counts in read_confusions(_partial_path(out, batch)).items():
            parts.setdefault(thing, []).append(counts)
    return {thing: _in_order(SparseConfusions.merge(found), records) for thing, found in parts.items()}


def _in_order(counts: SparseConfusions, records: Sequence[ImageRecord]) -> SparseConfusions:
    """``counts`` with its images in the order of ``records``."""
    known = frozenset(counts.ids)
    return counts.select(record.id for record in records if record.id in known)


def _plan(records: Sequence[ImageRecord]) -> list[_Batch]:
    """The batches of a list: a continued run makes the same ones as an uninterrupted one."""
    sized = ((record, record.size) for record in records)
    chunks = batches_of_one_size(sized, most_images=_BATCH, most_px=_BATCH_PX)
    return [_Batch(number, tuple(chunk)) for number, chunk in enumerate(chunks)]


def _partial_path(out: Path, batch: _Batch) -> Path:
    return out / "partial" / f"segmenter-{batch.number:05d}.npz"


def _is_finished(path: Path, progress: Progress) -> bool:
    """Whether an earlier run kept these counts; damaged ones are counted again."""
    if not path.exists():
        return False
    try:
        read_confusions(path)
    except DamagedFileError as error:
        progress.warn(f"{error.message}: counting these images again")
        return False
    return True


def _predict_batches(context: _Context, batches: Sequence[_Batch], progress: Progress, runtime: Runtime) -> None:
    """Predict and count ``batches``; each one's counts are written when its last image is finished."""
    from stages.ops.devices import resolve_device

    config, device = context.config, resolve_device(runtime)
    processes = num_processes(runtime.processes) if config.crf else 1
    if config.crf and resolve_crf_backend(config.crf_config.backend) == "torch":
        context, processes = replace(context, device=str(device)), 1
    predictions = _predictions(context, batches, device)
    rate = ImageRate()
    finished = map_ordered(_finish_image, predictions, context=context, processes=processes, in_flight=2)
    for batch in batches:
        counted: dict[str, Matrices] = {}
        for record in batch.records:
            matrices = next(finished)
            if matrices:
                counted[record.id] = matrices
            progress.advance(1, **rate.add(1))
        _write_counts(context, batch, counted)
    next(finished, None)  # lets the pool end


def _write_counts(context: _Context, batch: _Batch, counted: dict[str, Matrices]) -> None:
    things = next(iter(counted.values()), {})
    counts = {
        # counts of outlines have a class more than those of masks
        thing: SparseConfusions.from_matrices(len(matrix), [(key, found[thing]) for key, found in counted.items()])
        for thing, matrix in things.items()
    }
    write_confusions(_partial_path(context.out, batch), counts)


def _predictions(context: _Context, batches: Sequence[_Batch], device: torch.device) -> Iterator[_Prediction]:
    """Run the network over ``batches``; the next one's images are decoded meanwhile."""
    import torch

    model = load_segmenter(context.segmenter, device)

    def read(batch: _Batch) -> NDArray[np.uint8]:
        return np.stack([_read_image(context.images, record) for record in batch.records])

    with ThreadPoolExecutor(max_workers=1) as reader:
        for batch, pixels in zip(batches, take_in_order(reader, read, batches, limit=2), strict=True):
            wants_multi = any(context.needs_multi(record) for record in batch.records)
            try:
                with torch.inference_mode():
                    single, multi = _predict(context.config, model, torch.from_numpy(pixels), device, wants_multi)
                refined = _refine_on_cuda(context, batch.records, pixels, multi)
            except torch.OutOfMemoryError as error:
                raise EnvironmentFailure(
                    f"{device} does not hold one image of {pixels.shape[1]} × {pixels.shape[2]} pixels; take fewer or "
                    "smaller evaluate.scales, set evaluate.short_side_px, or use runtime.device=cpu"
                ) from error
            for position, record in enumerate(batch.records):
                probabilities = multi[position] if multi is not None and context.needs_multi(record) else None
                yield _Prediction(
                    record=record,
                    single=single[position],
                    multi=None if probabilities is None else probabilities.argmax(axis=0).astype(np.uint8),
                    probabilities=probabilities if context.needs_crf(record) else None,
                    refined=refined.get(position),
                )


def _refine_on_cuda(
    context: _Context, records: Sequence[ImageRecord], images: NDArray[np.uint8], multi: NDArray[np.float32] | None
) -> dict[int, NDArray[np.uint8]]:
    """The masks after the CRF by position, of the images that need it, where torch makes them on a CUDA device."""
    from stages.ops.multi_scale import in_fitting_parts

    places = [position for position, record in enumerate(records) if context.needs_crf(record)]
    if multi is None or not places or not context.device.startswith("cuda"):
        return {}
    images, probabilities, config = images[places], multi[places], context.config.crf_config

    def refine(part: slice) -> list[NDArray[np.uint8]]:
        return refine_predictions([*images[part]], [*probabilities[part]], config, device=context.device)

    masks = itertools.chain.from_iterable(in_fitting_parts(refine, slice(0, len(places))))
    return dict(zip(places, masks, strict=True))


def _read_image(images: ImageSet, record: ImageRecord) -> NDArray[np.uint8]:
    pixels = images.read_image(record)
    if pixels.shape[:2] != record.size:
        raise DataError(
            f"{images.root / record.image}: expected {record.size} pixels (height, width), found {pixels.shape[:2]}; "
            "the file changed since prepare_data ran: run it again"
        )
    return pixels


def _predict(
    config: PredictionConfig, model: torch.nn.Module, pixels: torch.Tensor, device: torch.device, wants_multi: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """Class indices (B, H, W) at one scale and, where wanted, multi-scale probabilities (B, C, H, W)."""
    import torch

    from stages.data.transforms import to_network_input
    from stages.ops.multi_scale import in_fitting_batches, multi_scale_probabilities, predict_logits

    def score(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = to_network_input(batch, device)
        logits = predict_logits(model, images, short_side_px=config.short_side_px)
        single = logits.argmax(dim=1).to(torch.uint8)
        if not wants_multi:
            return (single,)
        probabilities = multi_scale_probabilities(
            model,
            images,
            scales=config.scales,
            flip=config.flip,
            short_side_px=config.short_side_px,
            single_scale=logits,
        )
        return single, probabilities

    single, *rest = in_fitting_batches(score, pixels)
    return single.numpy(), rest[0].numpy() if rest else None


def _finish_image(context: _Context, prediction: _Prediction) -> Matrices:
    """Write one image's mask and count its predictions, after the CRF where there is one."""
    record = prediction.record
    looks = {"segmenter": prediction.single}
    if prediction.multi is not None:
        looks["segmenter_ms"] = prediction.multi
    if prediction.refined is not None:
        looks["segmenter_ms_crf"] = prediction.refined
    elif prediction.probabilities is not None:
        image = context.images.read_image(record)
        refined = refine_prediction(image, prediction.probabilities, context.config.crf_config, device=context.device)
        looks["segmenter_ms_crf"] = refined
    mask = looks["segmenter" + SCORE_SUFFIXES[context.masks]]
    write_index_mask(context.out / "predictions" / f"{record.id}.png", mask)
    if record.id not in context.scored:
        return {}
    return _count(context.images.read_mask(record), looks, context.images.index.classes.num_classes)


def _count(truth: NDArray[np.uint8], looks: Mapping[str, NDArray[np.uint8]], num_classes: int) -> Matrices:
    """Count each of an image's predictions, whole and on its outlines; trimaps of the single scale alone."""
    matrices: Matrices = {}
    for thing, mask in looks.items():
        matrices[thing] = confusion_matrix(truth, mask, num_classes)
        outlines = count_boundaries(truth, mask, num_classes, trimaps=thing == "segmenter")
        matrices |= {f"{thing}{name}": matrix for name, matrix in outlines.items()}
    return matrices


def refine_prediction(
    image: NDArray[np.uint8], probabilities: NDArray[np.float32], config: CrfConfig, *, device: str = "cpu"
) -> NDArray[np.uint8]:
    """Class indices (H, W) after a dense CRF.

    Args:
        image: RGB, uint8 (H, W, 3).
        probabilities: float32 (C, H, W).
        config: Numbers and backend.
        device: Where the torch backend works.

    Source:
        Differs: classes that reach 1 % in no pixel are left out; most codes keep all, at two to three times the cost.
    """
    return refine_predictions([image], [probabilities], config, device=device)[0]


def refine_predictions(
    images: Sequence[NDArray[np.uint8]],
    probabilities: Sequence[NDArray[np.float32]],
    config: CrfConfig,
    *,
    device: str = "cpu",
) -> list[NDArray[np.uint8]]:
    """Class indices (H, W) of images as of ``refine_prediction``, by one lattice for all on a CUDA device.

    An image gets what it would get alone, but for float32 rounding.
    """
    likely = [likely_classes(each) for each in probabilities]
    found = [np.full(each.shape[1:], classes[0]) for each, classes in zip(probabilities, likely, strict=True)]
    open_ones = [place for place, classes in enumerate(likely) if len(classes) > 1]  # one class has nothing to change
    if open_ones:
        counts = [len(likely[place]) for place in open_ones]
        batch = open_crf_batch([images[place] for place in open_ones], counts, config, device=device)
        chosen = [probabilities[place][likely[place]] for place in open_ones]
        unaries = [probability_unary(each / each.sum(axis=0, keepdims=True)) for each in chosen]
        for place, marginals in zip(open_ones, batch.infer(unaries, config.iterations), strict=True):
            found[place] = likely[place][marginals.argmax(axis=0)]
    return [mask.astype(np.uint8) for mask in found]


def likely_classes(probabilities: NDArray[np.float32]) -> NDArray[np.intp]:
    """The classes of (C, H, W) that a CRF gets: those that reach ``_LIKELY`` in a pixel.

    Of more than 100 classes the winner of a pixel may be less likely; it is among them too.
    """
    least = min(_LIKELY, 0.99 / len(probabilities))
    return np.flatnonzero(probabilities.max(axis=(1, 2)) >= least)
