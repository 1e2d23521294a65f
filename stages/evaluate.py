"""Measure the segmenter on val, and attention maps and pseudo-masks on the training images that have true masks.

Where val has labels, also the classifier's, where there is one.
Where ``localization`` is set, also how well the classifier's attention points at the objects of val; with
``segmentation: false`` nothing else.
Reads: the segmenter, the classifier, images, labels of val, true masks, attention shards, pseudo-masks.
Writes: ``predictions/<id>.png`` (class indices; ``predictions`` says of how many scales, before or after the CRF),
``confusions.npz`` (counts of each image and scored thing), ``boundaries.npz`` (the same on the outlines of the
segmenter's masks), ``sweep.json`` (mIoU of the attention maps at every threshold), ``localization.json`` (accuracy at
every threshold), ``metrics.json``.  Until these are there, counts of finished batches are kept under ``partial/``, so
that a stopped evaluation continues.
Source: VOC's devkit and deeplab-pytorch: one confusion matrix, truth 255 dropped, mean of the classes' IoU.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from stages.contracts import ImageSet, Progress, Runtime, StageResult, open_image_set, write_json
from stages.errors import DamagedFileError
from stages.masks.attention_windows import check_classes, read_views
from stages.masks.refinements.config import RefinementConfig
from stages.masks.threshold_choice import with_chosen_threshold
from stages.nets.segmenters.files import read_segmenter_record
from stages.ops.devices import check_precision
from stages.ops.metrics.confusion import SparseConfusions, iou, mean_iou, pixel_accuracy, write_confusions
from stages.ops.pool import num_processes
from stages.scoring.intervals import boundary_metrics, interval_metrics, is_boundary
from stages.scoring.localization_scores import LocalizationConfig, score_localization
from stages.scoring.mask_scores import ScoringContext, collect_training, score_training
from stages.scoring.prediction import SCORE_SUFFIXES, MaskKind, PredictionConfig, predict_images

VERSION = 5

_SCORES = {"val": "segmenter", "test": "segmenter_test"}
"""What the scores of each split are called."""


class EvaluateConfig(PredictionConfig):
    """How the segmenter is tested; the training images need no choice."""

    splits: tuple[Literal["val", "test"], ...] = Field(default=("val",), min_length=1)
    """Splits to predict; images with true masks are scored, those of test apart: ``segmenter_test.*``."""
    predictions: MaskKind = "single"
    """Which masks are written, and so packed by ``wsss submission`` and shown in the report: single (one scale, those
    of ``segmenter.miou``), multi_scale (``segmenter.miou_ms``) or multi_scale_crf (``segmenter.miou_ms_crf``)."""
    segmentation: bool = True
    """Predict with the segmenter and score pseudo-masks; false for data without masks: neither masks nor a segmenter
    are made."""
    localization: LocalizationConfig | None = None
    """Score how well the classifier's attention points at the objects of val ({} for all defaults); null for not."""

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if len(set(self.splits)) != len(self.splits):
            raise ValueError(f"splits must differ, found {self.splits}")
        if not self.segmentation and self.localization is None:
            raise ValueError("segmentation: false leaves nothing to measure; set localization ({} for its defaults)")
        return self

    @model_validator(mode="after")
    def _scores_what_it_writes(self) -> Self:
        needed = {"single": True, "multi_scale": self.multi_scale, "multi_scale_crf": self.crf}
        if not needed[self.predictions]:
            option = "crf" if self.predictions == "multi_scale_crf" else "multi_scale"
            raise ValueError(
                f"predictions: {self.predictions} writes masks that are not made with {option}: false; set {option}: "
                "true (its score is measured too), or predictions: single"
            )
        return self

    @property
    def written_score(self) -> str:
        """What the counts of the written masks are called on val: ``segmenter``, ``segmenter_ms``, …."""
        return "segmenter" + SCORE_SUFFIXES[self.predictions]

    def describe_predictions(self) -> str:
        """The written masks in words."""
        if self.predictions == "single":
            return "one scale, no CRF (scored as segmenter.miou)"
        flips = ", each with its mirror image" if self.flip else ""
        scales = f"mean of scales {', '.join(f'{scale:g}' for scale in self.scales)}{flips}"
        crf = f"CRF {self.crf_config.preset}" if self.predictions == "multi_scale_crf" else "no CRF"
        return f"{scales}; {crf} (scored as segmenter.miou{SCORE_SUFFIXES[self.predictions]})"


@dataclass(frozen=True)
class PseudoMasks:
    """What a weakly supervised run made of the training images."""

    attention: Path
    """Output folder of ``make_attention``."""
    masks: Path
    """Output folder of ``make_masks``."""
    config: RefinementConfig
    """Of ``make_masks``: the threshold rule, and the refinements whose steps are scored."""
    exclude: frozenset[str] = frozenset()
    """Ids of images whose true masks were trained on; they never count in ``attention.*`` and ``masks.*``."""


def evaluate(
    config: EvaluateConfig,
    *,
    images: Path,
    data_root: Path | None,
    segmenter: Path | None = None,
    classifier: Path | None = None,
    labels_short_side_px: int | None = None,
    pseudo_masks: PseudoMasks | None = None,
    out: Path,
    progress: Progress,
    runtime: Runtime | None = None,
) -> StageResult:
    """Score everything that has true masks and write the predictions.

    Args:
        config: How the segmenter is tested, and what else is.
        images: Output folder of ``prepare_data``.
        data_root: Folder of the user's data; None where it is generated.
        segmenter: Output folder of ``train_segmenter``; None with ``segmentation: false``.
        classifier: Output folder of ``train_classifier``, whose labels are scored on val; needed by ``localization``.
        labels_short_side_px: Shorter side at which the classifier sees an image whole for its labels, as in its
            training; None for the file's size.
        pseudo_masks: What is scored on the training images; None with full supervision.
        out: Where to write; an earlier, stopped call's files are continued.
        progress: Where to report to.
        runtime: Device, and processes for everything off the network.

    Returns:
        The metrics of ``metrics.json``, fractions; a score without any true mask is absent, and so is a class in
        ``segmenter.iou`` that does not occur.  ``masks.steps`` lists in order what the masks after each step
        of the refinement are worth (``step``, ``miou``, ``miou_labelled``, ``coverage``), where the steps were kept.

    Raises:
        ConfigError: ``precision: fp16`` without CUDA.
        DataError: an image or a true mask is damaged.
        DamagedFileError: an input artifact does not fit the data.
    """
    runtime = runtime or Runtime()
    if config.segmentation:
        check_precision(config.precision, runtime, "evaluate.precision")
    image_set = open_image_set(images, data_root)
    if (segmenter is not None) != config.segmentation:
        raise ValueError("give a segmenter exactly where segmentation is true")
    if segmenter is not None:
        _check_classes(image_set, segmenter)
    metrics: dict[str, Any] = {}
    confusions: dict[str, SparseConfusions] = {}
    if pseudo_masks is not None:
        metrics |= _evaluate_training(pseudo_masks, image_set, confusions, out, progress, runtime)
    if config.localization is not None:
        if classifier is None:
            raise ValueError("localization needs the classifier")
        metrics |= score_localization(
            config.localization, image_set, classifier=classifier, out=out, progress=progress, runtime=runtime
        )
    if classifier is not None:
        metrics |= _score_labels(image_set, classifier, labels_short_side_px, progress, runtime)
    if segmenter is not None:
        metrics |= _evaluate_segmenter(config, image_set, segmenter, confusions, out, progress, runtime)
    metrics |= boundary_metrics(confusions) | interval_metrics(confusions)
    outlines = {thing: confusions.pop(thing) for thing in list(confusions) if is_boundary(thing)}
    if outlines:
        write_confusions(out / "boundaries.npz", outlines)
    write_confusions(out / "confusions.npz", confusions)
    write_json(out / "metrics.json", metrics)
    shutil.rmtree(out / "partial", ignore_errors=True)
    return StageResult(metrics=metrics)


def _check_classes(image_set: ImageSet, segmenter: Path) -> None:
    trained = read_segmenter_record(segmenter).classes
    expected = image_set.index.classes.names
    if tuple(trained) != expected:
        raise DamagedFileError(
            f"{segmenter} was trained on the classes {', '.join(trained)}; the data has {', '.join(expected)}: "
            "rebuild train_segmenter"
        )


def _score_labels(
    image_set: ImageSet, classifier: Path, short_side_px: int | None, progress: Progress, runtime: Runtime
) -> dict[str, float]:
    """``classifier.*`` on val; nothing where its labels are not known."""
    if all(record.labels is None for record in image_set.index.split("val")):
        if not image_set.index.splits.get("holdout"):
            progress.info("classifier: neither val nor a hold-out has labels, so its accuracy is not measured")
        return {}
    from stages.methods.classifier_files import load_classifier
    from stages.ops.devices import resolve_device
    from stages.scoring.label_scores import score_classifier

    check_classes(classifier, image_set)
    network, _ = load_classifier(classifier, resolve_device(runtime))
    return score_classifier(network, image_set, "val", short_side_px, progress, runtime)


def _evaluate_training(
    made: PseudoMasks,
    image_set: ImageSet,
    confusions: dict[str, SparseConfusions],
    out: Path,
    progress: Progress,
    runtime: Runtime,
) -> dict[str, Any]:
    """Score attention maps and pseudo-masks; adds their counts to ``confusions`` and writes ``sweep.json``."""
    context = ScoringContext(
        images=image_set,
        ids=frozenset(image_set.index.splits.get("train_score", ())) - made.exclude,
        seeds=with_chosen_threshold(made.config, made.masks),
        attention=made.attention,
        masks=made.masks,
        partial=out / "partial",
        chain=made.config.chain,
        has_maps=read_views(made.attention) is None,
    )
    if not context.ids:
        progress.info("no training image has a true mask that was not trained on: attention and masks are not scored")
        return {}
    if not context.has_maps:
        progress.info("attention is not scored: its maps were not kept (make_attention.keep_maps: false)")
    task, done = "attention and masks" if context.has_maps else "masks", 0
    progress.step(task, done, len(context.ids))
    for count in score_training(context, processes=num_processes(runtime.processes)):
        done += count
        progress.step(task, done, len(context.ids))
    scores = collect_training(context)
    found = len(scores.confusions["masks"].ids)
    if found != len(context.ids):
        raise DamagedFileError(
            f"{context.attention} has attention for {found} of {len(context.ids)} scored images; rebuild make_attention"
        )
    metrics = scores.metrics()
    confusions.update(scores.confusions)
    if metrics:
        curve = scores.curve()
        if curve is not None:
            write_json(out / "sweep.json", curve)
        _warn_if_worse(metrics, progress)
    return metrics


def _warn_if_worse(metrics: Mapping[str, Any], progress: Progress) -> None:
    """Warn when refinement made the masks worse, and name the step that lost most."""
    before, after = metrics["masks.miou_before_crf"], metrics["masks.miou"]
    if after >= before:
        return
    steps = metrics.get("masks.steps", ())
    losses = {late["step"]: early["miou"] - late["miou"] for early, late in itertools.pairwise(steps)}
    worst = max(losses, key=losses.__getitem__, default="")
    blamed, remedy = "", "try another make_masks.crf.preset, unary: labels, or refine: none"
    if len(losses) > 1:
        blamed = f", {worst} lost most ({losses[worst] * 100:.1f} points)"
        remedy = f"leave {worst} out of make_masks.refine, or try other numbers or another threshold"
    progress.warn(
        f"refinement made the pseudo-masks worse: {before:.1%} mIoU before, {after:.1%} after (255 as background)"
        f"{blamed}; {remedy}"
    )


def _evaluate_segmenter(
    config: EvaluateConfig,
    image_set: ImageSet,
    segmenter: Path,
    confusions: dict[str, SparseConfusions],
    out: Path,
    progress: Progress,
    runtime: Runtime,
) -> dict[str, Any]:
    """Predict the splits and score what has true masks, each split apart; adds the counts to ``confusions``."""
    splits = {name: image_set.index.split(name) for name in config.splits}
    for name, records in splits.items():
        unscored = sum(record.mask is None for record in records)
        if unscored:
            progress.info(f"{name}: {unscored} of {len(records)} images are predicted without a score (no true mask)")
    counts = predict_images(
        config,
        image_set,
        [record for records in splits.values() for record in records],
        segmenter=segmenter,
        scored=frozenset(record.id for records in splits.values() for record in records if record.mask is not None),
        out=out,
        progress=progress,
        runtime=runtime,
        masks=config.predictions,
    )
    metrics: dict[str, Any] = {}
    for split, name in _SCORES.items():
        found = _of_images(counts, {record.id for record in splits.get(split, ())}, name)
        confusions.update(found)
        metrics |= _segmenter_metrics(found, name, image_set.index.classes.names_with_background)
    return metrics


def _of_images(counts: Mapping[str, SparseConfusions], ids: Collection[str], name: str) -> dict[str, SparseConfusions]:
    """The part of ``counts`` that is of ``ids``, with ``name`` in the place of ``segmenter``; empty where none is."""
    found: dict[str, SparseConfusions] = {}
    for thing, value in counts.items():
        kept = [(image_id, value.matrix(place)) for place, image_id in enumerate(value.ids) if image_id in ids]
        if kept:
            found[name + thing.removeprefix("segmenter")] = SparseConfusions.from_matrices(value.num_classes, kept)
    return found


def _segmenter_metrics(confusions: Mapping[str, SparseConfusions], name: str, names: Sequence[str]) -> dict[str, Any]:
    """The scores under ``name``; none where no pixel was counted."""
    if name not in confusions or not confusions[name].count.any():
        return {}
    single = confusions[name].total()
    metrics: dict[str, Any] = {
        f"{name}.miou": mean_iou(single),
        f"{name}.pixel_accuracy": pixel_accuracy(single),
        f"{name}.iou": {
            name: float(value) for name, value in zip(names, iou(single), strict=True) if not np.isnan(value)
        },
    }
    for suffix in filter(None, SCORE_SUFFIXES.values()):
        if name + suffix in confusions:
            metrics[f"{name}.miou{suffix}"] = mean_iou(confusions[name + suffix].total())
    return metrics
