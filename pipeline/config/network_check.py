"""Build a run's networks once, with their weights, before hours of work end at what does not fit.

Runs in a child process (it needs torch); reads weight files and corrected masks, downloads public weights; writes
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from pipeline.config.run_config import RunConfig
from stages.contracts import ClassList, Progress
from stages.data.corrected import check_corrected_listed
from stages.data.listing import list_data
from stages.errors import ConfigError, InputError
from stages.methods.classifier_files import START, ClassifierDescription, build_classifier
from stages.nets.segmenters.config import DeepLabConfig, pretrained_name
from stages.ops.devices import Precision


def needs_check(run: RunConfig, stages: Collection[str]) -> bool:
    """Whether building ``stages`` would train a network before it finds out that a later one cannot be used.

    A classifier that cannot be built, and a segmenter that is trained first, are refused by their own stage at once;
    but layers that a user names, a number of devices, and masks that a person has corrected are looked at before the
    data are prepared.
    """
    is_named = run.train_classifier.method.names_layers or _walked_layer(run) is not None
    config = run.train_segmenter
    is_late = {"train_classifier", "train_segmenter"} <= set(stages)
    is_tu = isinstance(config.net, DeepLabConfig) and config.net.encoder.startswith("tu-")
    later = [name for name in RunConfig.model_fields if name in stages][1:]
    is_half = any(value == "fp16" and name.partition(".")[0] in later for name, value in _precisions(run).items())
    is_fetched = pretrained_name(config.net, config.init) is not None
    is_corrected = config.corrected_masks is not None and {"train_segmenter"} < set(stages) - {"evaluate"}
    is_spread = run.runtime.devices not in (1, "auto") and bool({"train_classifier", "train_segmenter"} & set(stages))
    is_unfit = is_late and (is_tu or is_fetched)
    return ("train_classifier" in stages and is_named) or is_spread or is_half or is_corrected or is_unfit


def check_networks(run: RunConfig, progress: Progress) -> None:
    """Build both networks with the method's layers, load their weights; look whether the device knows their precision.

    Raises:
        InputError: the networks that cannot be built or trained, and the corrected masks that cannot be learned, each
            with its reason.
        EnvironmentFailure: the device is not there, or there are fewer than were asked for.
    """
    from stages.nets.segmenters.build import build_segmenter
    from stages.ops.devices import check_precision
    from stages.training.distributed import resolve_devices

    resolve_devices(run.runtime, run.train_classifier.max_devices)
    segmenter = run.train_segmenter
    # a start from the classifier needs no file, and its fit is checked in preflight
    init = segmenter.init if segmenter.init in ("imagenet", "coco") else "random"
    checks: dict[str, Callable[[], object]] = {"train_classifier": lambda: _build_classifier(run)}
    if run.evaluate.segmentation:
        checks["train_segmenter"] = lambda: build_segmenter(segmenter.net, 2, init=init, weights=run.weights)
        if (folder := segmenter.corrected_masks) is not None:
            checks["train_segmenter.corrected_masks"] = lambda: check_corrected_listed(folder, list_data(run.data))
    for name, value in _precisions(run).items():
        checks[name] = partial(check_precision, value, run.runtime, "precision")
    errors: dict[str, InputError] = {}
    for stage, build in checks.items():
        try:
            build()
        except InputError as error:
            errors[stage] = error
    if errors:
        problems = [f"{stage}: {line}" for stage, error in errors.items() for line in (error.message, *error.problems)]
        kinds = {type(error) for error in errors.values()}
        kind = kinds.pop() if len(kinds) == 1 else InputError
        raise kind("this run would fail at a later stage", problems)
    progress.info("the networks can be built and their weights fit")


def _precisions(run: RunConfig) -> dict[str, Precision]:
    """Of the networks of each section that is run, in the order of the stages."""
    found: dict[str, Precision] = {"train_classifier.training": run.train_classifier.training.precision}
    if run.evaluate.segmentation and run.train_segmenter.supervision == "weak":
        found["make_attention"] = run.make_attention.precision
    if run.evaluate.segmentation:
        found["train_segmenter.training"] = run.train_segmenter.training.precision
        found["evaluate"] = run.evaluate.precision
    return found


def _build_classifier(run: RunConfig) -> None:
    """The classifier, and a look for the layer over whose features the masks' random walk goes."""
    from stages.nets.layers import find_layer

    config = run.train_classifier
    # how many classes there are matters only to the weights of a trained classifier
    classes = list_data(run.data).classes if START in run.weights else ClassList(names=("any",))
    options = {"backbone": config.backbone, "head": config.head, "method": config.method}
    classifier, _ = build_classifier(ClassifierDescription(**options, classes=classes), run.weights)
    if (layer := _walked_layer(run)) is not None:
        try:
            find_layer(classifier.backbone, layer)
        except ConfigError as error:
            raise ConfigError(f"make_masks.random_walk.layer: {error.message}", error.problems) from error


def _walked_layer(run: RunConfig) -> str | None:
    """The layer that ``make_masks.random_walk`` names, where masks are made by it."""
    is_used = run.train_segmenter.supervision == "weak" and run.evaluate.segmentation
    return run.make_masks.random_walk.layer if is_used and "random_walk" in run.make_masks.chain else None
