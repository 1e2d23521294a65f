"""Build a run's networks once, with their weights, before hours of training end at a file that does not fit.

Runs in a child process (it needs torch); reads weight files, downloads public ones; writes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from pipeline.config import RunConfig
from stages.contracts import Progress
from stages.errors import InputError, WeightsError
from stages.nets.segmenters import DeepLabConfig, pretrained_name


def needs_check(run: RunConfig, stages: Collection[str]) -> bool:
    """Whether building ``stages`` would train a classifier before it finds out that the segmenter cannot be built.

    A classifier that cannot be built, and a segmenter that is trained first, are refused by their own stage at once.
    """
    config = run.train_segmenter
    is_late = {"train_classifier", "train_segmenter"} <= set(stages)
    is_tu = isinstance(config.net, DeepLabConfig) and config.net.encoder.startswith("tu-")
    return is_late and (is_tu or pretrained_name(config.net, config.init) is not None)


def check_networks(run: RunConfig, progress: Progress) -> None:
    """Build both networks and load their weights.

    Raises:
        InputError: the networks that cannot be built, each with its reason.
    """
    from stages.nets.backbone_builders import build_backbone
    from stages.nets.segmenters import build_segmenter

    segmenter = run.train_segmenter
    # a start from the classifier needs no file, and its fit is checked in preflight
    init = "imagenet" if segmenter.init == "imagenet" else "random"
    checks: dict[str, Callable[[], object]] = {
        "train_classifier": lambda: build_backbone(run.train_classifier.backbone, run.weights),
        "train_segmenter": lambda: build_segmenter(segmenter.net, 2, init=init, weights=run.weights),
    }
    errors: dict[str, InputError] = {}
    for stage, build in checks.items():
        try:
            build()
        except InputError as error:
            errors[stage] = error
    if errors:
        problems = [f"{stage}: {line}" for stage, error in errors.items() for line in (error.message, *error.problems)]
        kinds = {type(error) for error in errors.values()}
        raise (kinds.pop() if len(kinds) == 1 else WeightsError)("a network of this run cannot be built", problems)
    progress.info("the networks can be built and their weights fit")
