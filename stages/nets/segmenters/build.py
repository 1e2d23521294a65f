"""Make a segmenter of its config and load its start; torch-free at import.

Reads weight files only through ``stages.nets.weights``; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.contracts import Progress
from stages.errors import ConfigError, WeightsError
from stages.nets.segmenters.base import Init
from stages.nets.segmenters.config import AnySegmenterConfig, init_problems, pretrained_name
from stages.nets.weights import load_coco, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from stages.nets.segmenters.segmenter import Segmenter


def build_segmenter(
    config: AnySegmenterConfig,
    num_classes: int,
    *,
    init: Init,
    weights: Mapping[str, Path],
    classifier_backbone: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Segmenter:
    """Make the segmenter and load its start.

    Args:
        config: Which net.
        num_classes: C, background included.
        init: Where the backbone starts; the head starts at random, but for LargeFOV's ``fc_init: decimated``.
        weights: Weight files by backbone name (``weights:`` of the config).
        classifier_backbone: ``state_dict()`` of the trained classifier's backbone; needed by ``init: classifier``.
        progress: Told what was loaded.

    Returns:
        The segmenter on the CPU, in training mode.

    Raises:
        ConfigError: the net cannot be built or cannot start from ``init``.
        WeightsError: weights are missing or do not fit; the tensors are named.
    """
    segmenter = config.build(num_classes)
    if init == "random":
        return segmenter
    if init == "classifier":
        if classifier_backbone is None:
            raise WeightsError("init: classifier needs the trained classifier's backbone; none was given")
        source = f"this run's classifier into {config.backbone_name}"
        reports = [load_tensors(segmenter.trunk, classifier_backbone, source=source)]
    else:
        problems = init_problems(config, init, None)
        if problems:
            raise ConfigError(problems[0])
        name = pretrained_name(config, init)
        assert name is not None
        if init == "coco":
            reports = [load_coco(segmenter.trunk, name, weights.get(name), progress=progress)]
        else:
            reports = segmenter.load_imagenet(name, weights.get(name), progress)
    if progress is not None:
        for report in reports:
            progress.info(report.describe())
    return segmenter
