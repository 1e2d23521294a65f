"""Train the classifier whose attention becomes the pseudo-masks, from image-level labels alone.

Reads: the images and labels of split ``train`` minus split ``holdout``, and those of ``holdout`` for the closing score
(where val has labels, ``evaluate`` scores the classifier on them).  No pixel mask is read, but those of the training
images that the method asks for by id (GAIN_ext's subset), which are recorded as mask supervision.
Writes: classifier.safetensors, classifier.json (what it takes to build it again), history.json (loss curve).
A run that was stopped continues at its last checkpoint and ends with the same bytes.
Under torchrun every rank trains, and the main one alone writes and scores.
Shapes: K foreground classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from stages.contracts import (
    IGNORE_INDEX,
    ImageRecord,
    ImageSet,
    Progress,
    Runtime,
    StageConfig,
    StageResult,
    open_image_set,
    write_json,
)
from stages.data.records import DataListing, some
from stages.data.subsets import Candidate
from stages.data.transforms import AugmentConfig, Augmenter
from stages.errors import ConfigError, DataError
from stages.methods import MethodConfigUnion, method_key
from stages.methods.classifier_files import (
    ClassifierDescription,
    build_classifier,
    check_head,
    check_start,
    save_classifier,
)
from stages.nets.backbones.config import BackboneConfig, ClassificationLoss, HeadName
from stages.ops.metrics.multilabel import multi_hot
from stages.training.checkpoints import remove_checkpoint
from stages.training.config import TrainingConfig
from stages.training.distributed import is_main
from stages.training.loop import Remembering, train
from stages.training.randomness import sample_seed, seed_initial_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.methods.base import Method
    from stages.nets.classifier import Classifier
    from stages.ops.step import StepInfo

VERSION = 3
"""Raise when equal inputs give other bytes than before."""


class TrainClassifierConfig(StageConfig):
    """Network, method, augmentation and schedule of the classifier."""

    backbone: BackboneConfig
    """What computes the features."""
    head: HeadName = "gap"
    """gap: a 1×1 convolution, whose maps are averaged; fc: VGG16's own fc6 and fc7, for methods without score maps."""
    method: MethodConfigUnion
    """What the training minimises and how attention is read off; ``name`` chooses it."""
    loss: ClassificationLoss | Literal["auto"] = "auto"
    """How every method learns the labels.  multilabel_soft_margin: a yes or no for each class; cross_entropy: a softmax
    over the classes, for images of exactly one label; auto: cross_entropy with formats cub and imagenet."""
    augment: AugmentConfig
    """How a training image becomes a crop; its ``short_side_px`` also holds for the closing score."""
    training: TrainingConfig
    """Steps, batch, learning rate, precision."""

    @property
    def max_devices(self) -> int:
        """Devices that the training can be spread over: each needs an image of every step."""
        return self.training.max_devices

    def resolved_loss(self, *, is_single_label: bool) -> ClassificationLoss:
        """The loss by name.

        Args:
            is_single_label: Whether the data set's format gives each image one label.
        """
        if self.loss != "auto":
            return self.loss
        return "cross_entropy" if is_single_label else "multilabel_soft_margin"

    def key_content(self, listing: DataListing | None) -> dict[str, Any]:
        """What of these options decides the weights, as JSON; the loss where it is another than that of several labels.

        Args:
            listing: The data set, whose format decides what ``loss: auto`` means; None as for several labels.
        """
        content = self.model_dump(mode="json", exclude={"loss"}) | {"method": method_key(self.method)}
        loss = self.resolved_loss(is_single_label=listing is not None and listing.is_single_label)
        return content if loss == "multilabel_soft_margin" else content | {"loss": loss}

    def check_labels(self, candidates: Sequence[Candidate]) -> None:
        """Refuse a loss that these training images' labels do not fit.

        Raises:
            ConfigError: with ``cross_entropy`` an image has not exactly one label.
        """
        others = [image for image in candidates if image.labels is not None and len(image.labels) != 1]
        if self.loss == "cross_entropy" and others:
            raise ConfigError(
                f"loss: cross_entropy expects exactly one label on each training image, found another number on "
                f"{len(others):,} of {len(candidates):,} ({some([image.id for image in others])}); take loss: "
                "multilabel_soft_margin, or leave these images out of the train list"
            )

    @model_validator(mode="after")
    def _check(self) -> TrainClassifierConfig:
        check_head(self.head, self.backbone, self.method)
        if self.training.epochs is not None and self.training.epochs <= self.method.warmup_epochs:
            raise ValueError(self._explain_warmup(f"training.epochs {self.training.epochs:g}"))
        return self

    def _explain_warmup(self, length: str) -> str:
        return (
            f"the method's warm-up of {self.method.warmup_epochs} epochs leaves nothing of {length}; train longer, or "
            "shorten the warm-up"
        )

    def check_length(self, num_samples: int) -> None:
        """Refuse a training on so many samples an epoch that ends before the method's warm-up does.

        Raises:
            ConfigError: saying how many steps there are, and how many an epoch has.
        """
        steps, per_epoch = self.training.num_steps(num_samples), self.training.steps_per_epoch(num_samples)
        if steps <= self.method.warmup_epochs * per_epoch:
            raise ConfigError(self._explain_warmup(f"the training's {steps} steps, of which an epoch has {per_epoch}"))


def train_classifier(
    config: TrainClassifierConfig,
    *,
    images: Path,
    data_root: Path | None,
    weights: Mapping[str, Path],
    seed: int,
    out: Path,
    progress: Progress,
    runtime: Runtime | None = None,
) -> StageResult:
    """Train a classifier, and score it on the images that were held out for it.

    Args:
        config: What to train and how.
        images: Output folder of ``prepare_data``.
        data_root: Folder of the user's data; None for the embedded data set.
        weights: Files of public weights by backbone name; what is not there is downloaded.  Under ``classifier`` the
            weights of a trained classifier to go on from, which replace the public ones.
        seed: Seeds the head, the order of the images, every crop and every step.
        out: Folder to write to; a checkpoint in it is continued.
        progress: Hears of every step.
        runtime: Device, threads and loading processes.

    Returns:
        ``classifier.map`` (mean average precision) and ``classifier.label_accuracy`` in [0, 1], with ``cross_entropy``
        ``classifier.top1_accuracy`` too, all absent where nothing is held out; the ids whose masks the method used.
        Nothing on other ranks than the main one.

    Raises:
        DataError: a training image has no labels, no image is left to train on, an image cannot be read.
        ConfigError: the method names a layer that the network does not have, or needs a trained classifier to start
            from and has none; or the loss does not fit the labels.
        WeightsError: the weights to start from cannot be had or do not fit.
        InputError: the loss is no longer finite.
    """
    from stages.scoring.label_scores import score_classifier

    runtime = runtime or Runtime()
    check_start(config.method, weights)
    image_set = open_image_set(images, data_root)
    records = _training_records(image_set)
    config.check_labels(records)
    supervised = frozenset(config.method.pixel_labelled(records))
    epoch = [record for record in records for _ in range(config.method.repeats(record.id, supervised))]
    config.check_length(len(epoch))
    description = ClassifierDescription(
        backbone=config.backbone,
        head=config.head,
        method=config.method,
        classes=image_set.index.classes,
        loss=config.resolved_loss(is_single_label=image_set.index.is_single_label),
    )
    classifier, method = _build_seeded(description, weights, seed, progress)
    history = train(
        classifier,
        objective=_Objective(method),
        dataset=LabelledImages(image_set, epoch, Augmenter(config.augment), seed, supervised),
        config=config.training,
        parameter_groups=classifier.parameter_groups(config.training.head_lr_factor),
        seed=seed,
        out=out,
        progress=progress,
        runtime=runtime,
        task="train classifier",
        memory=method if isinstance(method, Remembering) else None,
    )
    if not is_main():
        return StageResult()
    short_side_px = config.augment.short_side_px
    metrics = score_classifier(classifier.eval(), image_set, "holdout", short_side_px, progress, runtime)
    write_json(out / "history.json", history)
    save_classifier(out, description, classifier)
    remove_checkpoint(out)
    return StageResult(metrics=metrics, mask_supervision=tuple(sorted(supervised)))


# ---------------------------------------------------------------------------------------------------------------------
# Training data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledImages:
    """Random crops with their image's labels; picklable, and a pure function of (seed, epoch, index)."""

    image_set: ImageSet
    records: Sequence[ImageRecord]
    augmenter: Augmenter
    seed: int
    with_masks: frozenset[str] = frozenset()
    """Ids whose true mask is read; where there are any, the other images come with a mask of 255."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def get(self, index: int, epoch: int) -> dict[str, NDArray[Any]]:
        """One training sample.

        Args:
            index: 0 … len - 1.
            epoch: 0-based; another epoch gives another crop.

        Returns:
            ``images`` uint8 (crop, crop, 3), ``labels`` float32 (K,), and ``masks`` uint8 (crop, crop) for a method
            that reads masks.
        """
        record = self.records[index]
        image = self.image_set.read_image(record)
        crop, mask = self.augmenter(
            image, self._mask(record, image.shape[:2]), seed=sample_seed(self.seed, epoch, index)
        )
        labels = multi_hot(record.labels or (), self.image_set.index.classes.num_foreground)
        sample: dict[str, NDArray[Any]] = {"images": crop, "labels": labels}
        return sample if mask is None else {**sample, "masks": mask}

    def _mask(self, record: ImageRecord, size: tuple[int, ...]) -> NDArray[np.uint8] | None:
        if not self.with_masks:
            return None
        if record.id in self.with_masks:
            return self.image_set.read_mask(record, "full" if record.mask is None else "score")
        return np.full(size, IGNORE_INDEX, dtype=np.uint8)


def _training_records(image_set: ImageSet) -> list[ImageRecord]:
    """Split train without holdout; every image must have known labels."""
    kept_out = set(image_set.index.splits.get("holdout", ()))
    records = [record for record in image_set.index.split("train") if record.id not in kept_out]
    unlabelled = [f"image '{record.id}' of split train has no labels" for record in records if record.labels is None]
    if unlabelled:
        raise DataError("a classifier is trained on labelled images; label these or drop them", unlabelled)
    if not records:
        raise DataError("split train has no image besides its hold-out; add training images")
    return records


def _build_seeded(
    description: ClassifierDescription, weights: Mapping[str, Path], seed: int, progress: Progress
) -> tuple[Classifier, Method]:
    """The network at its start, fresh layers drawn from ``seed``; the caller's random numbers are left as they were."""
    import torch

    with torch.random.fork_rng(devices=[]):
        seed_initial_weights(seed)
        return build_classifier(description, weights, progress)


@dataclass(frozen=True)
class _Objective:
    """The method's objective as the training loop calls it."""

    method: Method

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], step: StepInfo) -> dict[str, Tensor]:
        classifier = cast("Classifier", model)
        return self.method.objective(classifier, batch["images"], batch["labels"], step, masks=batch.get("masks"))
