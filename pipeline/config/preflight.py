"""Refuse a run that cannot end well, before its first stage: data lists, weight files, networks, backends.

Reads file names, lists and label files; opens no image and imports no torch.  Writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pipeline.config.advice import config_warnings
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_models import did_you_mean
from stages.contracts import MAX_MASK_CLASSES
from stages.data.listing import list_data
from stages.data.records import DataListing, ListedImage
from stages.data.subsets import choose_sweep_images, hold_out
from stages.errors import ConfigError, InputError, WeightsError
from stages.make_masks import SWEEP_NEEDS_MAPS
from stages.methods.classifier_files import START, check_start
from stages.nets.backbones.config import BACKBONES
from stages.nets.segmenters.config import DILATABLE_ENCODERS, init_problems, pretrained_name
from stages.nets.weights import weights_problems
from stages.ops.crf.dense_crf import resolve_crf_backend
from stages.training.distributed import device_problems

_NAMES_SHOWN = 20
"""Class names that a message lists."""


def preflight(run: RunConfig) -> DataListing:
    """Check everything that can be checked without decoding an image or building a network.

    Returns:
        The data set's lists, which were read on the way; their warnings end with the config's.

    Raises:
        ConfigError: a choice in the config contradicts another or is not available here.
        DataError: the data set's lists, labels or files.
        WeightsError: a weight file is missing or of no known kind.
        InputError: problems of several of these kinds; all are listed.
    """
    errors: list[InputError] = []
    listing: DataListing | None = None
    try:
        listing = list_data(run.data)
    except InputError as error:
        errors.append(error)
    if config_problems := [*_config_problems(run), *(_split_problems(run, listing) if listing else [])]:
        errors.append(ConfigError("the config cannot run as it is", config_problems))
    if weight_problems := list(_weight_problems(run)):
        errors.append(WeightsError("weights are not usable", weight_problems))
    if listing is not None and not errors:
        return replace(listing, warnings=(*listing.warnings, *config_warnings(run)))
    if len(errors) == 1:
        raise errors[0]
    lines = [line for error in errors for line in (error.problems or (error.message,))]
    raise InputError(f"the run cannot start: {len(lines)} problems", lines)


def _problems_of(check: Callable[[], object], section: str) -> list[str]:
    """What ``check`` objects to, each line under ``section``."""
    try:
        check()
    except InputError as error:
        return [f"{section}.{line}" for line in (error.problems or (error.message,))]
    return []


def _config_problems(run: RunConfig) -> Iterator[str]:
    segmenter, trained = run.train_segmenter, {"train_classifier": run.train_classifier.max_devices}
    if run.evaluate.segmentation:
        trained["train_segmenter"] = segmenter.max_devices
    # more devices than there are images in a step; how many this machine has, the network check looks up
    stages: dict[str, list[str]] = {}
    for stage, most in trained.items():
        for problem in device_problems(run.runtime, most):
            stages.setdefault(problem, []).append(stage)
    yield from (f"{' and '.join(names)}: {problem}" for problem, names in stages.items())
    if not run.evaluate.segmentation:
        return  # nothing below is run
    for problem in init_problems(segmenter.net, segmenter.init, run.train_classifier.backbone):
        yield f"train_segmenter.{problem}"
    if segmenter.supervision == "weak" and run.make_masks.uses_crf:
        yield from _problems_of(lambda: resolve_crf_backend(run.make_masks.crf.backend), "make_masks")
    if run.evaluate.crf:
        yield from _problems_of(lambda: resolve_crf_backend(run.evaluate.crf_config.backend), "evaluate")


def _split_problems(run: RunConfig, listing: DataListing) -> Iterator[str]:
    images = {image.id: image for image in listing.images}
    train = [images[name] for name in listing.splits["train"]]
    seen = listing.split("train", without=hold_out(listing, run.prepare_data.holdout_ratio))
    for check in (run.train_classifier.check_labels, run.train_classifier.method.pixel_labelled):
        yield from _problems_of(lambda check=check: check(seen), "train_classifier")
    if run.evaluate.localization is not None:
        # maps are compared with boxes of known labels, or with the classes of a mask
        val = [images[name] for name in listing.splits["val"]]
        if not any(image.mask is not None or (image.boxes is not None and image.labels) for image in val):
            yield (
                "evaluate.localization: no image of val has a box and a label, or a mask; add boxes or masks to the "
                "data set, or set evaluate.localization=null"
            )
    if not run.evaluate.segmentation:
        return
    if run.train_segmenter.supervision == "weak":
        yield from _mask_problems(run, listing, train)
    num_classes = listing.classes.num_foreground
    if num_classes > MAX_MASK_CLASSES:
        text = f"evaluate.segmentation: masks can tell apart {MAX_MASK_CLASSES} classes, the data set has {num_classes}"
        yield f"{text}; set evaluate.segmentation=false and evaluate.localization={{}}"
    for split in run.evaluate.splits:
        if not listing.splits.get(split):
            yield f"evaluate.splits: the data set has no images in '{split}'; set data.{split}_list or remove it"
    if run.train_segmenter.supervision == "full" and all(image.full_mask is None for image in train):
        yield "train_segmenter.supervision: full needs true masks of training images; the data set has none"


def _mask_problems(run: RunConfig, listing: DataListing, train: Sequence[ListedImage]) -> Iterator[str]:
    """Unknown classes, a sweep or corrections of images that there are not, weights that no stage writes."""
    rule, names = run.make_masks, listing.classes.names
    shown = ", ".join(names[:_NAMES_SHOWN]) + (" …" if len(names) > _NAMES_SHOWN else "")
    for name in rule.thresholds:
        if name not in names:
            hint = did_you_mean(name, names) or f"; its classes are {shown}"
            yield f"make_masks.thresholds.{name}: the data set has no such class{hint}"
    ids = listing.splits["train"]
    yield from _problems_of(lambda: run.train_segmenter.find_corrected(ids), "train_segmenter")
    if run.train_segmenter.loss_weighting == "confidence" and not rule.soft:
        yield "train_segmenter.loss_weighting: make_masks writes confidence only with soft: true; set make_masks.soft"
    if (sweep := rule.sweep) is not None:
        if not run.make_attention.keep_maps:
            yield SWEEP_NEEDS_MAPS
        yield from _problems_of(lambda: choose_sweep_images(sweep, train), "make_masks")


def _weight_problems(run: RunConfig) -> Iterator[str]:
    """Files of weights that this run needs, and names that nothing is called by."""
    backbone, net = run.train_classifier.backbone, run.train_segmenter.net
    public = backbone.name if backbone.pretrained else None
    start = START if START in run.weights else public  # a trained classifier replaces the public weights
    needed = [start, pretrained_name(net, run.train_segmenter.init) if run.evaluate.segmentation else None]
    for name in dict.fromkeys(filter(None, needed)):
        for problem in weights_problems(name, run.weights):
            yield problem if problem.startswith("weights") else f"weights.{name}: {problem}"
    known = [*BACKBONES, *DILATABLE_ENCODERS, net.backbone_name, START, *filter(None, needed)]
    yield from _problems_of(lambda: check_start(run.train_classifier.method, run.weights), "train_classifier")
    for name in run.weights:
        if name not in known:
            yield f"weights.{name}: there is no such backbone{did_you_mean(name, known)}"
