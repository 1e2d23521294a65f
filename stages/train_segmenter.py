"""Train the segmenter on pseudo-masks, or on true masks as the upper bound (``supervision: full``).

Reads: the images of split ``train`` and ``masks/<id>.png`` of ``make_masks`` (class indices, 255 = unsure); with
``supervision: full`` the images' true masks instead, with ``corrected_masks`` those of some images from that folder;
these and those are recorded as mask supervision; with ``loss_weighting: confidence`` also ``confidence/<id>.png``
(0 … 255 = sure); with ``init: classifier`` the trained classifier.
Writes: segmenter.safetensors, segmenter.json (net and classes), history.json (loss curve); with ``validation`` also
validation.json (curve, held-out images) and best.safetensors or last.safetensors, whichever is not the segmenter; with
``rounds`` also rounds.json and ``rounds/<n>/`` (``stages.training.rounds``).
A run that was stopped continues at its last checkpoint and ends with the same bytes.
Under torchrun every rank trains, and the main one alone writes.
The losses are in ``stages.training.segmenter_objective``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.contracts import (
    ImageRecord,
    ImageSet,
    Progress,
    Runtime,
    StageResult,
    open_image_set,
    write_json,
)
from stages.data.corrected import check_corrected, digest_corrected, find_corrected
from stages.data.transforms import AugmentConfig, Augmenter
from stages.errors import ConfigError, DataError, MissingArtifactError
from stages.nets.segmenters.build import build_segmenter
from stages.nets.segmenters.config import Init, LargeFovConfig, SegmenterConfig, init_problems
from stages.nets.segmenters.files import RECORD_FILE, WEIGHTS_FILE, save_segmenter
from stages.nets.weights import load_weights, save_weights
from stages.training.checkpoints import remove_checkpoint
from stages.training.config import TrainingConfig
from stages.training.distributed import is_main
from stages.training.loop import train
from stages.training.masked_images import MaskedImages, check_class_list, confidence_folder, supervised_records
from stages.training.randomness import seed_initial_weights
from stages.training.rounds import Labelling, RetrainingConfig, Training, train_in_rounds
from stages.training.segmenter_objective import LossConfig, LossName, SegmenterObjective
from stages.training.validation import HeldOutImages, ValidationConfig, choose_held_out, warn_of_collapse

if TYPE_CHECKING:
    from torch import Tensor

    from stages.nets.segmenters.segmenter import Segmenter

VERSION = 4
"""Raise when equal inputs give other bytes than before."""

_WHY_TWO = "its image pooling is followed by a BatchNorm, which cannot learn from a single value"


def _needs_two_samples(net: SegmenterConfig) -> bool:
    return net.name in ("deeplabv3", "deeplabv3plus")


class TrainSegmenterConfig(LossConfig):
    """Network, supervision, loss, augmentation and schedule of the segmenter."""

    supervision: Literal["weak", "full"] = "weak"
    """weak: the pseudo-masks of make_masks; full: true masks, the upper bound."""
    corrected_masks: Path | None = None
    """Folder of masks that a person has corrected, ``<image id>.png`` of class indices (0 background, i + 1 the i-th
    class, 255 unsure), as ``wsss masks import`` writes it: each stands in place of its training image's pseudo-mask.
    null for none."""
    corrected_repeat: int = Field(default=1, ge=1, le=1000)
    """How often a corrected image stands in an epoch; every other stands once."""
    init: Init = "imagenet"
    """Where the backbone starts: public ImageNet weights, a public backbone trained on COCO's masks (``coco``), this
    run's classifier, or random numbers."""
    net: SegmenterConfig
    """Which network; ``name`` chooses it."""
    augment: AugmentConfig
    """How a training image becomes a crop; its ``short_side_px`` is also what evaluate should use."""
    training: TrainingConfig
    """Steps, batch, learning rate, precision."""
    validation: ValidationConfig | None = None
    """Measure on held-out training images while it trains; null trains on all of them."""
    rounds: int = Field(default=0, ge=0, le=10)
    """How many times the segmenter labels its training images and is trained again on that."""
    retraining: RetrainingConfig = RetrainingConfig()
    """How ``rounds`` label and train."""

    @property
    def max_devices(self) -> int:
        """Devices that the training can be spread over: each needs an image in every pass of a step."""
        return self.training.max_devices

    @model_validator(mode="after")
    def _check_init(self) -> TrainSegmenterConfig:
        # The classifier's backbone is another section: preflight compares the two, here only what this one knows.
        is_decimated = isinstance(self.net, LargeFovConfig) and self.net.fc_init == "decimated"
        if self.init != "classifier" or is_decimated:
            problems = init_problems(self.net, self.init, None)
            if problems:
                raise ValueError("; ".join(problems))
        if self.loss_weighting == "confidence" and self.supervision == "full":
            raise ValueError("loss_weighting: confidence is of pseudo-masks; true masks have none: take none")
        if _needs_two_samples(self.net) and self.training.max_devices == 1:
            passes = "" if self.training.accumulate_steps == 1 else " in each pass of training.accumulate_steps"
            raise ValueError(f"{self.net.name} needs a training.batch_size of at least 2{passes}: {_WHY_TWO}")
        return self

    @model_validator(mode="after")
    def _check_corrected(self) -> TrainSegmenterConfig:
        if self.corrected_masks is not None and self.supervision == "full":
            raise ValueError("corrected_masks replace pseudo-masks, and supervision: full takes none: leave out one")
        return self

    @model_validator(mode="after")
    def _check_rounds(self) -> TrainSegmenterConfig:
        if self.rounds and self.supervision == "full":
            raise ValueError("rounds replace pseudo-masks by the segmenter's; true masks need none: take rounds: 0")
        if self.rounds and self.loss_weighting == "confidence":
            raise ValueError("rounds make masks without confidence: take loss_weighting: none, or rounds: 0")
        return self

    def find_corrected(self, train: Collection[str]) -> dict[str, Path]:
        """The masks of ``corrected_masks`` by image id; none where there is no such folder in the config.

        Args:
            train: Ids of the training images.

        Raises:
            ConfigError: masks of other images, or none; no image is left where some must be.
        """
        if self.corrected_masks is None:
            return {}
        found = find_corrected(self.corrected_masks, train)
        needing = [name for name, value in (("rounds", self.rounds), ("validation", self.validation)) if value]
        if needing and len(found) == len(train):
            raise ConfigError(
                f"corrected_masks: all {len(train):,} training images have a corrected mask, and "
                f"train_segmenter.{' and '.join(needing)} need some that have a pseudo-mask alone; leave that out"
            )
        return found

    @property
    def losses(self) -> frozenset[LossName]:
        """The losses of all trainings."""
        later = self.retraining.loss if self.rounds else None
        return frozenset({self.loss, later or self.loss})

    def resolved(self, device: str = "cpu") -> TrainSegmenterConfig:
        """The same with every CRF's backend by name, so that the stage runs the ones that are in its key."""
        changes: dict[str, Any] = {}
        if "sec" in self.losses:
            changes["sec"] = self.sec.model_copy(update={"crf": self.sec.crf.resolved(device)})
        if self.rounds and self.retraining.crf is not None:
            changes["retraining"] = self.retraining.model_copy(update={"crf": self.retraining.crf.resolved(device)})
        return self.model_copy(update=changes)

    def key_content(self, device: str = "cpu") -> dict[str, Any]:
        """What of these options decides the weights, as JSON; not those of a loss or of rounds that there are not.

        Args:
            device: ``Runtime.device``, which decides what a CRF's ``backend: auto`` means.

        Raises:
            ConfigError: the corrected masks cannot be read.
        """
        hands = {"corrected_masks", "corrected_repeat"}
        content = self.model_dump(mode="json", exclude={"retraining", *hands, *LossConfig.model_fields})
        if self.corrected_masks is not None:
            content["corrected_masks"] = digest_corrected(self.corrected_masks)
            content["corrected_repeat"] = self.corrected_repeat
        if self.rounds:
            content["retraining"] = self.retraining.key_content(device)
        return content | self.loss_key_content(self.losses, device)


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
        No metrics (evaluate measures); the ids whose true or corrected masks were used.  Nothing on other ranks than
        the main one.

    Raises:
        MissingArtifactError: ``masks`` or ``classifier`` is needed and not given.
        ConfigError: corrected masks of images that are not trained on.
        DataError: no training image has a mask, or one and the net needs two; an image or true mask cannot be read;
            corrected masks do not fit their images or classes; the pseudo-masks are of another class list.
        DamagedFileError: a pseudo-mask does not fit its image or its classes.
        WeightsError: the start weights cannot be had or do not fit.
        InputError: the loss is no longer finite, or the net says background everywhere (``validation``, ``rounds``).
    """
    runtime = runtime or Runtime()
    image_set = open_image_set(images, data_root)
    index = image_set.index
    corrected = config.find_corrected(index.splits["train"])
    for text in check_corrected(corrected, index.split("train"), index.classes):
        progress.warn(text)
    records, mask_folder = supervised_records(config.supervision, image_set, masks, progress, corrected=corrected)
    course = _Course(config, image_set, records, corrected, classifier, weights, seed, progress, runtime)
    confidence = confidence_folder(masks) if config.loss_weighting != "none" and masks is not None else None
    if config.rounds and mask_folder is not None:
        labelled = [record for record in records if record.id not in corrected]
        labelling = Labelling(
            config.retraining, image_set, labelled, config.augment.seen_short_side_px, progress, runtime
        )
        train_in_rounds(
            lambda one: _train_round(course, one),
            labelling,
            rounds=config.rounds,
            masks=mask_folder,
            out=out,
            results=_results(config),
        )
    else:
        _train_once(course, mask_folder, confidence, out)
    if not is_main():
        return StageResult()
    used = tuple(record.id for record in records) if config.supervision == "full" else tuple(corrected)
    return StageResult(mask_supervision=used)


@dataclass(frozen=True)
class _Course:
    """What all trainings of one call share."""

    config: TrainSegmenterConfig
    image_set: ImageSet
    records: Sequence[ImageRecord]
    """The images with a mask."""
    corrected: Mapping[str, Path]
    """Image id to its corrected mask."""
    classifier: Path | None
    weights: Mapping[str, Path]
    seed: int
    progress: Progress
    runtime: Runtime


def _results(config: TrainSegmenterConfig) -> tuple[str, ...]:
    """The files that a training leaves."""
    watched = () if config.validation is None else ("validation.json", _other_weights(config.validation))
    return (RECORD_FILE, WEIGHTS_FILE, "history.json", *watched)


def _other_weights(validation: ValidationConfig) -> str:
    """The file of the weights that are not delivered."""
    return "last.safetensors" if validation.keep == "best" else "best.safetensors"


def _train_round(course: _Course, one: Training) -> None:
    """One of several trainings; the later ones may have a loss of their own."""
    loss = course.config.retraining.loss if one.number else None
    config = course.config if loss is None else course.config.model_copy(update={"loss": loss})
    _train_once(replace(course, config=config), one.masks, None, one.out, start=one.start)


def _train_once(
    course: _Course, mask_folder: Path | None, confidence: Path | None, out: Path, *, start: Path | None = None
) -> None:
    """Train and write what the module's docstring says; ``start`` is a segmenter's folder whose weights are taken."""
    config, image_set, progress = course.config, course.image_set, course.progress
    # a correction is made to be learned: what is held out has a pseudo-mask
    candidates = [record for record in course.records if record.id not in course.corrected]
    held_out = choose_held_out(config.validation, candidates) if config.validation is not None else frozenset()
    records = [record for record in course.records if record.id not in held_out]
    least = 2 * config.training.accumulate_steps
    if len(records) < least and _needs_two_samples(config.net):
        raise DataError(
            f"{config.net.name} needs at least {least} training images with a mask, found {len(records)}: {_WHY_TWO}"
        )
    segmenter = _build_seeded(course)
    if start is not None:
        load_weights(segmenter, start / WEIGHTS_FILE)
    # a crop may have lost a class of its image: there the loss asks the crop's mask
    with_labels = config.loss == "sec" and config.augment.is_whole and all(r.labels is not None for r in records)
    augmenter = Augmenter(config.augment)
    repeats = [config.corrected_repeat if record.id in course.corrected else 1 for record in records]
    epoch = [record for record, times in zip(records, repeats, strict=True) for _ in range(times)]
    dataset = MaskedImages(
        image_set, epoch, mask_folder, augmenter, course.seed, confidence, with_labels, course.corrected
    )
    check_class_list(dataset)
    watch = _watch(config, [record for record in course.records if record.id in held_out], dataset, progress)
    history = train(
        segmenter,
        objective=SegmenterObjective(config),
        dataset=dataset,
        config=config.training,
        parameter_groups=segmenter.parameter_groups(config.training.head_lr_factor),
        seed=course.seed,
        out=out,
        progress=progress,
        runtime=course.runtime,
        task="train segmenter",
        watch=watch,
    )
    if not is_main():
        return
    write_json(out / "history.json", history)
    if watch is not None:
        _write_validation(out, config, watch, segmenter)
    warn_of_collapse(segmenter, dataset, course.runtime, progress, image_set.index.classes.names_with_background)
    save_segmenter(out, config.net, segmenter, image_set.index.classes)
    remove_checkpoint(out)


def _watch(
    config: TrainSegmenterConfig, held_out: Sequence[ImageRecord], dataset: MaskedImages, progress: Progress
) -> HeldOutImages | None:
    """What looks at the held-out images while the net trains."""
    if config.validation is None:
        return None
    if not held_out:
        raise DataError(
            "validation holds out a share of the images with a mask, of which there is only one; add images"
        )
    num_images = len(held_out) + len({record.id for record in dataset.records})
    progress.info(f"{len(held_out)} of {num_images} images with a mask are held out for validation")
    return HeldOutImages(
        config.validation,
        held_out,
        dataset.read_pair,
        num_classes=dataset.image_set.index.classes.num_classes,
        short_side_px=config.augment.seen_short_side_px,
        progress=progress,
    )


def _write_validation(out: Path, config: TrainSegmenterConfig, watch: HeldOutImages, segmenter: Segmenter) -> None:
    """Write the curve and the weights that are not delivered; leave the net with those that are."""
    assert watch.best is not None
    saved = watch.config.keep
    last = {name: value.detach().cpu().clone() for name, value in segmenter.state_dict().items()}
    segmenter.load_state_dict(last if saved == "best" else watch.best)
    save_weights(segmenter, out / _other_weights(watch.config))
    segmenter.load_state_dict(watch.best if saved == "best" else last)
    document = {
        "compared_with": "true masks" if config.supervision == "full" else "pseudo-masks",
        "held_out": [record.id for record in watch.records],
        "saved": saved,
        "best_step": watch.best_step,
        "curve": watch.curve,
    }
    write_json(out / "validation.json", document)


# ---------------------------------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------------------------------


def _build_seeded(course: _Course) -> Segmenter:
    """The network, its fresh layers drawn from the seed; the caller's random numbers are left as they were."""
    import torch

    config = course.config
    backbone = _read_classifier_backbone(course.classifier) if config.init == "classifier" else None
    with torch.random.fork_rng(devices=[]):
        seed_initial_weights(course.seed)
        return build_segmenter(
            config.net,
            course.image_set.index.classes.num_classes,
            init=config.init,
            weights=course.weights,
            classifier_backbone=backbone,
            progress=course.progress,
        )


def _read_classifier_backbone(classifier: Path | None) -> dict[str, Tensor]:
    import torch

    from stages.methods.classifier_files import load_classifier

    if classifier is None:
        raise MissingArtifactError("init: classifier needs the folder of train_classifier; run train_classifier first")
    trained, _ = load_classifier(classifier, torch.device("cpu"))
    return trained.backbone.state_dict()
