"""Train the segmenter on pseudo-masks, or on true masks as the upper bound (``supervision: full``).

Reads: the images of split ``train`` and ``masks/<id>.png`` of ``make_masks`` (class indices, 255 = unsure); with
``supervision: full`` the images' true masks instead, all recorded as mask supervision; with ``loss_weighting:
confidence`` also ``confidence/<id>.png`` (0 … 255 = sure); with ``init: classifier`` the trained classifier.
Writes: segmenter.safetensors, segmenter.json (net and classes), history.json (loss curve).
A run that was stopped continues at its last checkpoint and ends with the same bytes.
Under torchrun every rank trains, and the main one alone writes.
Shapes: B images, C classes with background, H W pixels of a crop, h w cells of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    ImageRecord,
    ImageSet,
    Progress,
    Runtime,
    StageConfig,
    StageResult,
    open_image_set,
    read_index_mask,
    write_json,
)
from stages.data.transforms import AugmentConfig, Augmenter, to_network_input
from stages.distributed import is_main
from stages.errors import DamagedFileError, DataError, MissingArtifactError
from stages.nets.segmenters import Init, SegmenterConfig, build_segmenter, init_problems
from stages.nets.trained import save_segmenter
from stages.soft_masks import read_confidence
from stages.training import TrainingConfig, remove_checkpoint, resolve_device, sample_seed, seed_initial_weights, train

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.nets.largefov import Segmenter
    from stages.ops.step import StepInfo

VERSION = 1
"""Raise when equal inputs give other bytes than before."""

NUM_COLLAPSE_SAMPLES = 16
"""Training crops that are looked at after the training, to see whether the net says anything but background."""

_WHY_TWO = "its image pooling is followed by a BatchNorm, which cannot learn from a single value"


def _needs_two_samples(net: SegmenterConfig) -> bool:
    return net.name != "largefov"


class TrainSegmenterConfig(StageConfig):
    """Network, supervision, loss, augmentation and schedule of the segmenter."""

    supervision: Literal["weak", "full"] = "weak"
    """weak: the pseudo-masks of make_masks; full: true masks, the upper bound."""
    init: Init = "imagenet"
    """Where the backbone starts: public ImageNet weights, this run's classifier, or random numbers."""
    net: SegmenterConfig
    """Which network; ``name`` chooses it."""
    augment: AugmentConfig
    """How a training image becomes a crop; its ``short_side_px`` is also what evaluate should use."""
    training: TrainingConfig
    """Steps, batch, learning rate, precision."""
    loss: Literal["cross_entropy", "balanced_cross_entropy"] = "cross_entropy"
    """balanced_cross_entropy weighs background and foreground one half each (DSRG)."""
    loss_resolution: Literal["pixels", "cells"] = "pixels"
    """pixels: logits are upsampled to the crop; cells: masks are sampled at the logits' cells (DeepLab v1, quicker)."""
    loss_weighting: Literal["none", "confidence"] = "none"
    """confidence: a pixel counts as much as its pseudo-label is sure, which needs ``soft: true`` in make_masks."""

    @property
    def max_devices(self) -> int:
        """Devices that the training can be spread over: each needs an image of every step."""
        return self.training.batch_size

    @model_validator(mode="after")
    def _check_init(self) -> TrainSegmenterConfig:
        # The classifier's backbone is another section: preflight compares the two, here only what this one knows.
        if self.init == "imagenet":
            problems = init_problems(self.net, self.init, None)
            if problems:
                raise ValueError("; ".join(problems))
        if self.loss_weighting == "confidence" and self.supervision == "full":
            raise ValueError("loss_weighting: confidence is of pseudo-masks; true masks have none: take none")
        if _needs_two_samples(self.net) and self.training.batch_size == 1:
            raise ValueError(f"{self.net.name} needs a training.batch_size of at least 2: {_WHY_TWO}")
        return self

    def key_content(self) -> dict[str, Any]:
        """The options as JSON; one that came later is in it only where it is used, so that earlier keys stay valid."""
        content = self.model_dump(mode="json")
        if self.loss_weighting == "none":
            del content["loss_weighting"]
        return content


def train_segmenter(
    config: TrainSegmenterConfig,
    *,
    images: Path,
    masks: Path | None,
    classifier: Path | None,
    data_root: Path | None,
    weights: Mapping[str, Path],
    seed: int,
    out: Path,
    progress: Progress,
    runtime: Runtime | None = None,
) -> StageResult:
    """Train a segmenter; see the module's docstring for what is read and written.

    Args:
        config: What to train and how.
        images: Output folder of ``prepare_data``.
        masks: Output folder of ``make_masks``; None with ``supervision: full``.
        classifier: Output folder of ``train_classifier``; needed by ``init: classifier`` only.
        data_root: Folder of the user's data; None for the embedded data set.
        weights: Files of public weights by backbone name; what is not there is downloaded.
        seed: Seeds the head, the order of the images, every crop and every step.
        out: Folder to write to; a checkpoint in it is continued.
        progress: Hears of every step.
        runtime: Device, threads and loading processes.

    Returns:
        No metrics (evaluate measures); the ids whose true masks were used.  Nothing on other ranks than the main one.

    Raises:
        MissingArtifactError: ``masks`` or ``classifier`` is needed and not given.
        DataError: no training image has a mask, or one and the net needs two; an image or true mask cannot be read.
        DamagedFileError: a pseudo-mask does not fit its image or its classes.
        WeightsError: the start weights cannot be had or do not fit.
        InputError: the loss is no longer finite.
    """
    runtime = runtime or Runtime()
    image_set = open_image_set(images, data_root)
    records, mask_folder = _supervised_records(config, image_set, masks, progress)
    if len(records) == 1 and _needs_two_samples(config.net):
        raise DataError(f"{config.net.name} needs at least 2 training images with a mask, found 1: {_WHY_TWO}")
    segmenter = _build_seeded(config, image_set.index.classes.num_classes, classifier, weights, seed, progress)
    dataset = MaskedImages(
        image_set, records, mask_folder, Augmenter(config.augment), seed, _confidence_folder(config, masks)
    )
    history = train(
        segmenter,
        objective=_Objective(config.loss, config.loss_resolution),
        dataset=dataset,
        config=config.training,
        parameter_groups=segmenter.parameter_groups(config.training.head_lr_factor),
        seed=seed,
        out=out,
        progress=progress,
        runtime=runtime,
        task="train segmenter",
    )
    if not is_main():
        return StageResult()
    _warn_of_collapse(segmenter, dataset, runtime, progress)
    write_json(out / "history.json", history)
    save_segmenter(out, config.net, segmenter, image_set.index.classes)
    remove_checkpoint(out)
    used = tuple(record.id for record in records) if config.supervision == "full" else ()
    return StageResult(mask_supervision=used)


# ---------------------------------------------------------------------------------------------------------------------
# Training data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedImages:
    """Random crops with their masks; picklable, and a pure function of (seed, epoch, index)."""

    image_set: ImageSet
    records: Sequence[ImageRecord]
    mask_folder: Path | None
    """Folder of the pseudo-masks; None reads the true masks."""
    augmenter: Augmenter
    seed: int
    confidence_folder: Path | None = None
    """Folder of how sure each pixel of a pseudo-mask is; None where all count alike."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def get(self, index: int, epoch: int) -> dict[str, NDArray[Any]]:
        """One training sample.

        Args:
            index: 0 … len - 1.
            epoch: 0-based; another epoch gives another crop.

        Returns:
            ``images`` uint8 (crop, crop, 3), ``masks`` uint8 (crop, crop), and where it is used ``confidence`` uint8
            (crop, crop).
        """
        record = self.records[index]
        image, mask = self.image_set.read_image(record), self._read_mask(record)
        if image.shape[:2] != mask.shape:
            raise DataError(f"image '{record.id}' has {image.shape[:2]} pixels, its mask {mask.shape}")
        seed = sample_seed(self.seed, epoch, index)
        if self.confidence_folder is not None:
            confidence = read_confidence(self.confidence_folder / f"{record.id}.png", record.size)
            crop, (mask_crop, confidence_crop) = self.augmenter.crop_aligned(image, [mask, confidence], seed=seed)
            return {"images": crop, "masks": mask_crop, "confidence": confidence_crop}
        crop, mask_crop = self.augmenter(image, mask, seed=seed)
        assert mask_crop is not None
        return {"images": crop, "masks": mask_crop}

    def _read_mask(self, record: ImageRecord) -> NDArray[np.uint8]:
        if self.mask_folder is None:
            return self.image_set.read_mask(record, "full")
        path = self.mask_folder / f"{record.id}.png"
        try:
            mask = read_index_mask(path)
        except DataError as error:
            raise DamagedFileError(f"{error.message}; rebuild make_masks") from error
        num_classes = self.image_set.index.classes.num_classes
        if mask.shape != record.size or ((mask >= num_classes) & (mask != IGNORE_INDEX)).any():
            raise DamagedFileError(
                f"{path}: expected {record.size} pixels of values below {num_classes} or 255, found {mask.shape} with "
                f"values {np.unique(mask).tolist()}; rebuild make_masks"
            )
        return mask


def _confidence_folder(config: TrainSegmenterConfig, masks: Path | None) -> Path | None:
    """Where the confidence of the pseudo-masks is, if it is used."""
    if config.loss_weighting == "none" or masks is None:
        return None
    folder = masks / "confidence"
    if not folder.is_dir():
        raise MissingArtifactError(
            f"loss_weighting: confidence needs {folder}, which make_masks writes with soft: true; run it so, or take "
            "loss_weighting: none"
        )
    return folder


def _supervised_records(
    config: TrainSegmenterConfig, image_set: ImageSet, masks: Path | None, progress: Progress
) -> tuple[list[ImageRecord], Path | None]:
    """The training images that have a mask, and the folder of pseudo-masks."""
    train_records = image_set.index.split("train")
    if config.supervision == "full":
        folder, kind = None, "true mask"
        records = [record for record in train_records if record.full_mask is not None]
    else:
        if masks is None:
            raise MissingArtifactError("supervision: weak needs the folder of make_masks; run make_masks first")
        folder, kind = masks / "masks", "pseudo-mask"
        present = {path.stem for path in folder.glob("*.png")}
        records = [record for record in train_records if record.id in present]
    if not records:
        where = "the data set" if folder is None else str(folder)
        raise DataError(f"none of the {len(train_records)} images of split train has a {kind} in {where}")
    if len(records) < len(train_records):
        missing = len(train_records) - len(records)
        progress.warn(f"{missing} of {len(train_records)} training images have no {kind} and are left out")
    return records, folder


# ---------------------------------------------------------------------------------------------------------------------
# Network and loss
# ---------------------------------------------------------------------------------------------------------------------


def _build_seeded(
    config: TrainSegmenterConfig,
    num_classes: int,
    classifier: Path | None,
    weights: Mapping[str, Path],
    seed: int,
    progress: Progress,
) -> Segmenter:
    """The network, its fresh layers drawn from ``seed``; the caller's random numbers are left as they were."""
    import torch

    backbone = _read_classifier_backbone(classifier) if config.init == "classifier" else None
    with torch.random.fork_rng(devices=[]):
        seed_initial_weights(seed)
        return build_segmenter(
            config.net,
            num_classes,
            init=config.init,
            weights=weights,
            classifier_backbone=backbone,
            progress=progress,
        )


def _read_classifier_backbone(classifier: Path | None) -> dict[str, Tensor]:
    import torch

    from stages.methods.trained import load_classifier

    if classifier is None:
        raise MissingArtifactError("init: classifier needs the folder of train_classifier; run train_classifier first")
    trained, _ = load_classifier(classifier, torch.device("cpu"))
    return trained.backbone.state_dict()


@dataclass(frozen=True)
class _Objective:
    """The segmentation loss as the training loop calls it."""

    loss: Literal["cross_entropy", "balanced_cross_entropy"]
    resolution: Literal["pixels", "cells"]

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], step: StepInfo) -> dict[str, Tensor]:
        from stages.ops.losses import balanced_segmentation_cross_entropy, segmentation_cross_entropy

        logits, masks = match_sizes(model(batch["images"]), batch["masks"], self.resolution)
        criterion = segmentation_cross_entropy if self.loss == "cross_entropy" else balanced_segmentation_cross_entropy
        if "confidence" not in batch:
            return {"loss": criterion(logits, masks)}
        confidence = batch["confidence"]
        if self.resolution == "cells":
            confidence = _at_cells(confidence, logits.shape[-2:])
        return {"loss": criterion(logits, masks, confidence.float() / 255)}


def match_sizes(logits: Tensor, masks: Tensor, resolution: Literal["pixels", "cells"]) -> tuple[Tensor, Tensor]:
    """Bring logits and masks to one size.

    Args:
        logits: (B, C, h, w), any float dtype.
        masks: (B, H, W), integers.
        resolution: pixels upsamples the logits bilinearly; cells takes the mask's value at each cell's centre.

    Returns:
        float32 logits and masks of one size, (H, W) or (h, w).
    """
    from torch.nn import functional

    if resolution == "cells":
        return logits.float(), _at_cells(masks, logits.shape[-2:])
    upsampled = functional.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
    return upsampled, masks


def _at_cells(values: Tensor, size: Sequence[int]) -> Tensor:
    """The value of (B, H, W) at the centre of each of the (h, w) cells."""
    from torch.nn import functional

    cells = functional.interpolate(values[:, None].float(), size=tuple(size), mode="nearest-exact")
    return cells[:, 0].to(values.dtype)


def _warn_of_collapse(segmenter: Segmenter, dataset: MaskedImages, runtime: Runtime, progress: Progress) -> None:
    """Warn when the trained net says background everywhere on crops whose masks hold objects."""
    import torch

    samples = [dataset.get(index, 0) for index in range(min(len(dataset), NUM_COLLAPSE_SAMPLES))]
    labelled = [_has_foreground(sample["masks"]) for sample in samples]
    if not any(labelled):
        progress.warn(
            f"the masks of the first {len(samples)} training crops hold no object pixel; check the pseudo-masks "
            "(make_masks.threshold too high, or a refinement that removes everything)"
        )
        return
    device = resolve_device(runtime)
    segmenter.to(device).eval()
    with torch.inference_mode():
        for sample in samples:
            logits = segmenter(to_network_input(torch.from_numpy(sample["images"][None]), device))
            if bool((logits.argmax(1) != BACKGROUND_INDEX).any()):
                return
    progress.warn(
        f"the segmenter predicts only background on {len(samples)} training crops; train longer, raise "
        "training.learning_rate, or use loss: balanced_cross_entropy"
    )


def _has_foreground(mask: NDArray[Any]) -> bool:
    return bool(((mask != BACKGROUND_INDEX) & (mask != IGNORE_INDEX)).any())
