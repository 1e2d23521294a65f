"""Refuse a run that cannot end well, before its first stage: data lists, weight files, networks, backends.

Reads file names, lists and label files; opens no image and imports no torch.  Writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pipeline.config.idle_options import idle_options
from pipeline.config.model_errors import did_you_mean
from pipeline.config.run_config import RunConfig
from stages.contracts import MAX_MASK_CLASSES
from stages.data.listing import list_data
from stages.data.records import DataListing
from stages.data.subsets import choose_sweep_images, hold_out
from stages.errors import ConfigError, InputError, WeightsError
from stages.make_masks import SWEEP_NEEDS_MAPS
from stages.methods.classifier_files import START
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
    config_problems = [*_config_problems(run), *(_split_problems(run, listing) if listing else [])]
    if config_problems:
        errors.append(ConfigError("the config cannot run as it is", config_problems))
    weight_problems = list(_weight_problems(run))
    if weight_problems:
        errors.append(WeightsError("weights are not usable", weight_problems))
    if listing is None or errors:
        raise _joined(errors)
    return replace(listing, warnings=(*listing.warnings, *config_warnings(run)))


def config_warnings(run: RunConfig) -> list[str]:
    """What can run and is seldom meant: two sizes for one network, options that nothing reads."""
    pairs: list[tuple[str, int | None, str, int | None]] = []
    trained, is_segmented = run.train_classifier.augment.seen_short_side_px, run.evaluate.segmentation
    if is_segmented and run.train_segmenter.supervision == "weak":
        pairs.append(("train_classifier", trained, "make_attention", run.make_attention.short_side_px))
    if run.evaluate.localization is not None:
        used = run.evaluate.localization.short_side_px
        pairs.append(("train_classifier", trained, "evaluate.localization", used))
    if is_segmented:
        seen = run.train_segmenter.augment.seen_short_side_px
        pairs.append(("train_segmenter", seen, "evaluate", run.evaluate.short_side_px))
    sizes = [
        f"{training}.augment.short_side_px is {_pixels(trained)} and {use}.short_side_px is {_pixels(used)}: the "
        "network sees images at another size than it was trained at, which costs accuracy; give both the same"
        for training, trained, use, used in pairs
        if trained != used
    ]
    return sizes + _crf_warnings(run) + idle_options(run)


def _crf_warnings(run: RunConfig) -> list[str]:
    """Where ``auto`` does not mean what it means on most machines: the backend is in the key."""
    makes_masks = run.train_segmenter.supervision == "weak" and "crf" in run.make_masks.chain
    used = {"make_masks.crf": run.make_masks.crf} if makes_masks else {}
    used |= {"evaluate.crf_config": run.evaluate.crf_config} if run.evaluate.crf else {}
    automatic = [name for name, crf in used.items() if crf.backend == "auto"]
    if not run.evaluate.segmentation or not automatic:
        return []
    meant, without_cuda = resolve_crf_backend("auto", run.runtime.device), resolve_crf_backend("auto")
    if meant == "numba":
        return []
    reason = "it works on the CUDA device" if meant != without_cuda else "numba is not installed or does not import"
    return [
        f"{' and '.join(automatic)}.backend: auto means {meant} here ({reason}), and the key says so; to share "
        "artifacts with machines where it means another, name a backend"
    ]


def _pixels(short_side_px: int | None) -> str:
    return "null (the file's size)" if short_side_px is None else f"{short_side_px}"


def _joined(errors: list[InputError]) -> InputError:
    if len(errors) == 1:
        return errors[0]
    lines = [line for error in errors for line in (error.problems or (error.message,))]
    return InputError(f"the run cannot start: {len(lines)} problems", lines)


def _config_problems(run: RunConfig) -> Iterator[str]:
    yield from _device_problems(run)
    if not run.evaluate.segmentation:
        return  # nothing below is run
    segmenter = run.train_segmenter
    for problem in init_problems(segmenter.net, segmenter.init, run.train_classifier.backbone):
        yield f"train_segmenter.{problem}"
    if segmenter.supervision == "weak" and "crf" in run.make_masks.chain:
        yield from _message_of(lambda: resolve_crf_backend(run.make_masks.crf.backend), "make_masks")
    if run.evaluate.crf:
        yield from _message_of(lambda: resolve_crf_backend(run.evaluate.crf_config.backend), "evaluate")


def _device_problems(run: RunConfig) -> Iterator[str]:
    """More devices than there are images in a step; how many this machine has, the network check looks up."""
    trained = {"train_classifier": run.train_classifier.max_devices}
    if run.evaluate.segmentation:
        trained["train_segmenter"] = run.train_segmenter.max_devices
    stages: dict[str, list[str]] = {}
    for stage, most in trained.items():
        for problem in device_problems(run.runtime, most):
            stages.setdefault(problem, []).append(stage)
    yield from (f"{' and '.join(names)}: {problem}" for problem, names in stages.items())


def _message_of(check: Callable[[], object], section: str) -> list[str]:
    """What ``check`` objects to, as a list of one or none."""
    try:
        check()
    except InputError as error:
        return [f"{section}.{error.message}"]
    return []


def _split_problems(run: RunConfig, listing: DataListing) -> Iterator[str]:
    yield from _method_problems(run, listing)
    if run.evaluate.localization is not None:
        yield from _localization_problems(listing)
    if not run.evaluate.segmentation:
        return
    if run.train_segmenter.supervision == "weak":
        yield from _label_rule_problems(run, listing)
    num_classes = listing.classes.num_foreground
    if num_classes > MAX_MASK_CLASSES:
        text = f"evaluate.segmentation: masks can tell apart {MAX_MASK_CLASSES} classes, the data set has {num_classes}"
        yield f"{text}; set evaluate.segmentation=false and evaluate.localization={{}}"
    for split in run.evaluate.splits:
        if not listing.splits.get(split):
            yield f"evaluate.splits: the data set has no images in '{split}'; set data.{split}_list or remove it"
    if run.train_segmenter.supervision == "full":
        images = {image.id: image for image in listing.images}
        masked = [name for name in listing.splits["train"] if images[name].full_mask is not None]
        if not masked:
            yield "train_segmenter.supervision: full needs true masks of training images; the data set has none"


def _method_problems(run: RunConfig, listing: DataListing) -> Iterator[str]:
    """A subset of pixel-labelled images that the data set does not have."""
    kept_out = set(hold_out(listing, run.prepare_data.holdout_ratio))
    try:
        run.train_classifier.method.pixel_labelled(listing.split("train", without=kept_out))
    except ConfigError as error:
        yield from (f"train_classifier.{line}" for line in (error.problems or (error.message,)))


def _label_rule_problems(run: RunConfig, listing: DataListing) -> Iterator[str]:
    """Classes that there are not, a sweep on images that the data set does not have, weights that nobody writes."""
    rule, names = run.make_masks, listing.classes.names
    for name in rule.thresholds:
        if name not in names:
            yield f"make_masks.thresholds.{name}: the data set has no such class{_near_or_all(name, names)}"
    if run.train_segmenter.loss_weighting == "confidence" and not rule.soft:
        yield "train_segmenter.loss_weighting: make_masks writes confidence only with soft: true; set make_masks.soft"
    if rule.sweep is not None and not run.make_attention.keep_maps:
        yield SWEEP_NEEDS_MAPS
    if rule.sweep is not None:
        try:
            choose_sweep_images(rule.sweep, listing.split("train"))
        except ConfigError as error:
            yield from (f"make_masks.{line}" for line in (error.problems or (error.message,)))


def _near_or_all(name: str, allowed: Sequence[str]) -> str:
    """The nearest spelling, or the first of the names where none is near."""
    shown = ", ".join(allowed[:_NAMES_SHOWN]) + (" …" if len(allowed) > _NAMES_SHOWN else "")
    return did_you_mean(name, allowed) or f"; its classes are {shown}"


def _localization_problems(listing: DataListing) -> Iterator[str]:
    """Maps are compared with boxes of known labels, or with the classes of a mask."""
    val = set(listing.splits["val"])
    images = [image for image in listing.images if image.id in val]
    has_cases = any(image.mask is not None or (image.boxes is not None and image.labels) for image in images)
    if not has_cases:
        yield (
            "evaluate.localization: no image of val has a box and a label, or a mask; add boxes or masks to the data "
            "set, or set evaluate.localization=null"
        )


def _weight_problems(run: RunConfig) -> Iterator[str]:
    """Files of weights that this run needs, and names that nothing is called by."""
    backbone = run.train_classifier.backbone
    net = run.train_segmenter.net
    public = backbone.name if backbone.pretrained else None
    start = START if START in run.weights else public  # a trained classifier replaces the public weights
    is_segmented = run.evaluate.segmentation
    needed = [start, pretrained_name(net, run.train_segmenter.init) if is_segmented else None]
    for name in dict.fromkeys(filter(None, needed)):
        for problem in weights_problems(name, run.weights):
            yield problem if problem.startswith("weights") else f"weights.{name}: {problem}"
    known = [*BACKBONES, *DILATABLE_ENCODERS, net.backbone_name, START, *filter(None, needed)]
    for name in run.weights:
        if name not in known:
            yield f"weights.{name}: there is no such backbone{did_you_mean(name, known)}"
