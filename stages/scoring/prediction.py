"""Predict whole splits with a trained segmenter and count the predictions where there are true masks.

Reads: images, true masks, a segmenter.  Writes: ``predictions/<id>.png``, masks of the kind that is asked for, and,
batch by batch, the counts of finished images under ``partial/``, so that a stopped run continues.
Shapes: B images of one size, C classes with background, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from stages.contracts import ImageRecord, ImageSet, Progress, Runtime, write_index_mask
from stages.data.whole_images import read_checked
from stages.errors import DamagedFileError
from stages.nets.segmenters.files import load_segmenter
from stages.ops.crf.dense_crf import CrfConfig
from stages.ops.devices import ForwardConfig, check_precision
from stages.ops.metrics.boundaries import count_boundaries
from stages.ops.metrics.confusion import SparseConfusions, confusion_matrix, read_confusions, write_confusions
from stages.ops.pool import num_processes
from stages.ops.rate import ImageRate
from stages.scoring.network_pass import Look, look_at_images, plan_batches

if TYPE_CHECKING:
    import torch


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


class PredictionConfig(ForwardConfig):
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
class _Prediction:
    """The masks of one image that the network gives at once."""

    record: ImageRecord
    single: NDArray[np.uint8]
    """Class indices (H, W) at one scale."""
    multi: NDArray[np.uint8] | None
    """Class indices (H, W) of the multi-scale mean."""


@dataclass(frozen=True)
class _Context:
    """What all images of one run share."""

    config: PredictionConfig
    images: ImageSet
    scored: frozenset[str]
    out: Path
    masks: MaskKind
    """What is written."""
    device: str
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
        DataError: an image or a true mask is damaged.
        ConfigError: ``precision: fp16`` without CUDA.
        EnvironmentFailure: the accelerator's memory does not hold one image.
    """
    check_precision(config.precision, runtime, "evaluate.precision")
    batches = plan_batches((record, record.size) for record in records)
    partial = [out / "partial" / f"segmenter-{number:05d}.npz" for number in range(len(batches))]
    folder = out / "predictions"
    todo = [
        number
        for number, batch in enumerate(batches)
        if not all((folder / f"{record.id}.png").is_file() for record in batch)
        or not _is_counted(partial[number], progress)
    ]
    done = len(records) - sum(len(batches[number]) for number in todo)
    progress.step("segmenter", done, len(records))
    if todo:
        from stages.ops.devices import resolve_device

        device, rate = resolve_device(runtime), ImageRate()
        if config.crf:
            config = config.model_copy(update={"crf_config": config.crf_config.resolved()})
        context = _Context(config, image_set, scored, out, masks, str(device))
        model = load_segmenter(segmenter, device)
        finished = look_at_images(
            [batches[number] for number in todo],
            read=lambda record: (record, read_checked(image_set, record)),
            look=lambda chosen, pixels: _look(context, model, device, chosen, pixels),
            finish=_finish_image,
            context=context,
            crf=config.crf_config if config.crf else None,
            device=device,
            processes=num_processes(runtime.processes),
            remedy="take fewer or smaller evaluate.scales, set evaluate.short_side_px, or use runtime.device=cpu",
        )
        for number in todo:
            counted: dict[str, Matrices] = {}
            for record in batches[number]:
                matrices = next(finished)
                if matrices:
                    counted[record.id] = matrices
                done += 1
                progress.step("segmenter", done, len(records), unit="images", **rate.add(1))
            _write_counts(partial[number], counted)
        next(finished, None)  # lets the pool end
    parts: dict[str, list[SparseConfusions]] = {}
    for path in partial:
        for thing, counts in read_confusions(path).items():
            parts.setdefault(thing, []).append(counts)
    merged = {thing: SparseConfusions.merge(found) for thing, found in parts.items()}
    ids = {thing: frozenset(counts.ids) for thing, counts in merged.items()}
    return {
        thing: counts.select(record.id for record in records if record.id in ids[thing])
        for thing, counts in merged.items()
    }


def _is_counted(path: Path, progress: Progress) -> bool:
    """Whether an earlier run kept these counts; damaged ones are counted again."""
    if not path.exists():
        return False
    try:
        read_confusions(path)
    except DamagedFileError as error:
        progress.warn(f"{error.message}: counting these images again")
        return False
    return True


def _write_counts(path: Path, counted: dict[str, Matrices]) -> None:
    things = next(iter(counted.values()), {})
    counts = {
        # counts of outlines have a class more than those of masks
        thing: SparseConfusions.from_matrices(len(matrix), [(key, found[thing]) for key, found in counted.items()])
        for thing, matrix in things.items()
    }
    write_confusions(path, counts)


def _look(
    context: _Context,
    model: torch.nn.Module,
    device: torch.device,
    records: Sequence[ImageRecord],
    pixels: NDArray[np.uint8],
) -> list[Look[_Prediction]]:
    """Class indices at one scale and, where they are wanted, of the mean over scales; probabilities for the CRF."""
    import torch

    from stages.data.transforms import to_network_input
    from stages.ops.multi_scale import multi_scale_probabilities, predict_logits

    config = context.config
    images = to_network_input(torch.from_numpy(pixels), device)
    logits = predict_logits(model, images, short_side_px=config.short_side_px, precision=config.precision)
    single = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
    mean: NDArray[np.float32] | None = None
    if any(context.needs_multi(record) for record in records):
        probabilities = multi_scale_probabilities(
            model,
            images,
            scales=config.scales,
            flip=config.flip,
            short_side_px=config.short_side_px,
            single_scale=logits,
            precision=config.precision,
        )
        mean = probabilities.cpu().numpy()
    looks = []
    for place, record in enumerate(records):
        own = mean[place] if mean is not None and context.needs_multi(record) else None
        multi = None if own is None else own.argmax(axis=0).astype(np.uint8)
        prediction = _Prediction(record, single[place], multi)
        looks.append(Look(prediction, pixels[place], own if context.needs_crf(record) else None))
    return looks


def _finish_image(context: _Context, look: Look[_Prediction]) -> Matrices:
    """Write one image's mask and count its predictions, after the CRF where there is one."""
    record, masks = look.item.record, {"segmenter": look.item.single}
    if look.item.multi is not None:
        masks["segmenter_ms"] = look.item.multi
    if context.needs_crf(record):
        masks["segmenter_ms_crf"] = look.after_crf(context.config.crf_config, context.device)
    written = masks["segmenter" + SCORE_SUFFIXES[context.masks]]
    write_index_mask(context.out / "predictions" / f"{record.id}.png", written)
    if record.id not in context.scored:
        return {}
    truth, num_classes = context.images.read_mask(record), context.images.index.classes.num_classes
    matrices: Matrices = {}
    for thing, mask in masks.items():  # whole and on the outlines; trimaps of the single scale alone
        matrices[thing] = confusion_matrix(truth, mask, num_classes)
        outlines = count_boundaries(truth, mask, num_classes, trimaps=thing == "segmenter")
        matrices |= {f"{thing}{name}": matrix for name, matrix in outlines.items()}
    return matrices
