"""Build a run's networks once, with their weights, before hours of work end at what does not fit.

Runs in a child process (it needs torch); reads weight files, downloads public ones; writes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from pipeline.config.run_config import RunConfig
from stages.contracts import ClassList, Progress
from stages.data.listing import list_data
from stages.errors import ConfigError, InputError
from stages.methods.classifier_files import START, ClassifierDescription, build_classifier
from stages.nets.segmenters.config import DeepLabConfig, pretrained_name


def needs_check(run: RunConfig, stages: Collection[str]) -> bool:
    """Whether building ``stages`` would train a classifier before it finds out that the segmenter cannot be trained.

    A classifier that cannot be built, and a segmenter that is trained first, are refused by their own stage at once;
    but layers that a user names, and a number of devices, are looked up before the data are prepared.
    """
    trains_classifier = "train_classifier" in stages
    names_layers = trains_classifier and (run.train_classifier.method.names_layers or _walked_layer(run) is not None)
    config = run.train_segmenter
    is_late = {"train_classifier", "train_segmenter"} <= set(stages)
    is_tu = isinstance(config.net, DeepLabConfig) and config.net.encoder.startswith("tu-")
    is_half = config.training.precision == "fp16"
    is_fetched = pretrained_name(config.net, config.init) is not None
    is_spread = run.runtime.devices not in (1, "auto") and bool({"train_classifier", "train_segmenter"} & set(stages))
    return names_layers or is_spread or (is_late and (is_tu or is_half or is_fetched))


def check_networks(run: RunConfig, progress: Progress) -> None:
    """Build both networks with the method's layers, load their weights; look whether the device knows their precision.

    Raises:
        InputError: the networks that cannot be built or trained, each with its reason.
        EnvironmentFailure: the device is not there, or there are fewer than were asked for.
    """
    from stages.nets.segmenters.build import build_segmenter
    from stages.ops.devices import resolve_device
    from stages.training.distributed import resolve_devices

    resolve_devices(run.runtime, run.train_classifier.max_devices)
    segmenter = run.train_segmenter
    # a start from the classifier needs no file, and its fit is checked in preflight
    init = segmenter.init if segmenter.init in ("imagenet", "coco") else "random"
    checks: dict[str, Callable[[], object]] = {"train_classifier": lambda: _build_classifier(run)}
    if run.evaluate.segmentation:
        checks["train_segmenter"] = lambda: build_segmenter(segmenter.net, 2, init=init, weights=run.weights)
    errors: dict[str, InputError] = {}
    for stage, build in checks.items():
        try:
            build()
        except InputError as error:
            errors[stage] = error
    is_half = {stage: getattr(run, stage).training.precision == "fp16" for stage in checks}
    if any(is_half.values()) and (device := resolve_device(run.runtime)).type != "cuda":
        text = f"training.precision fp16 needs CUDA, found {device.type}; use fp32 or bf16"
        errors |= {stage: ConfigError(text) for stage in checks if is_half[stage] and stage not in errors}
    if errors:
        problems = [f"{stage}: {line}" for stage, error in errors.items() for line in (error.message, *error.problems)]
        kinds = {type(error) for error in errors.values()}
        kind = kinds.pop() if len(kinds) == 1 else InputError
        raise kind("a network of this run cannot be built or trained", problems)
    progress.info("the networks can be built and their weights fit")


def _build_classifier(run: RunConfig) -> None:
    """The classifier, and a look for the layer over whose features the masks' random walk goes."""
    from stages.nets.layers import find_layer

    config = run.train_classifier
    # how many classes there are matters only to the weights of a trained classifier
    classes = list_data(run.data).classes if START in run.weights else ClassList(names=("any",))
    description = ClassifierDescription(
        backbone=config.backbone, head=config.head, method=config.method, classes=classes
    )
    classifier, _ = build_classifier(description, run.weights)
    layer = _walked_layer(run)
    if layer is not None:
        try:
            find_layer(classifier.backbone, layer)
        except ConfigError as error:
            raise ConfigError(f"make_masks.random_walk.layer: {error.message}", error.problems) from error


def _walked_layer(run: RunConfig) -> str | None:
    """The layer that ``make_masks.random_walk`` names, where masks are made by it."""
    is_used = run.train_segmenter.supervision == "weak" and run.evaluate.segmentation
    return run.make_masks.random_walk.layer if is_used and "random_walk" in run.make_masks.chain else None
