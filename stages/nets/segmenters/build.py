"""Make a segmenter of its config and load its start.

Reads weight files only through ``stages.nets.weights``; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.contracts import Progress
from stages.errors import ConfigError, WeightsError
from stages.nets.segmenters.config import (
    AnySegmenterConfig,
    DeepLabV2Config,
    Init,
    LargeFovConfig,
    backbone_name,
    init_problems,
    pretrained_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from stages.nets.segmenters.largefov import Segmenter
    from stages.nets.weights import WeightsReport


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
    from stages.nets.weights import load_tensors

    segmenter = _build(config, num_classes)
    if init == "random":
        return segmenter
    if init == "classifier":
        if classifier_backbone is None:
            raise WeightsError("init: classifier needs the trained classifier's backbone; none was given")
        source = f"this run's classifier into {backbone_name(config)}"
        reports = [load_tensors(segmenter.trunk, classifier_backbone, source=source)]
    else:
        problems = init_problems(config, init, None)
        if problems:
            raise ConfigError(problems[0])
        reports = _load_public(segmenter, config, init, weights, progress)
    if progress is not None:
        for report in reports:
            progress.info(report.describe())
    return segmenter


def _build(config: AnySegmenterConfig, num_classes: int) -> Segmenter:
    from stages.nets.segmenters.deeplab import DeepLab
    from stages.nets.segmenters.deeplab_v2 import DeepLabV2
    from stages.nets.segmenters.largefov import LargeFov

    if isinstance(config, LargeFovConfig):
        return LargeFov(config, num_classes)
    return DeepLabV2(config, num_classes) if isinstance(config, DeepLabV2Config) else DeepLab(config, num_classes)


def _load_public(
    segmenter: Segmenter,
    config: AnySegmenterConfig,
    init: Init,
    weights: Mapping[str, Path],
    progress: Progress | None,
) -> list[WeightsReport]:
    """Load public weights into the trunk, and where the config says so into fc6 and fc7."""
    from stages.nets.segmenters.largefov import LargeFov, load_decimated
    from stages.nets.weights import load_coco, load_pretrained

    name = pretrained_name(config, init)
    assert name is not None
    if init == "coco":
        return [load_coco(segmenter.trunk, name, weights.get(name), progress=progress)]
    reports = [load_pretrained(segmenter.trunk, name, weights.get(name), progress=progress)]
    if isinstance(segmenter, LargeFov) and segmenter.is_decimated:
        reports.append(load_decimated(segmenter, weights.get(name), progress=progress))
    return reports
