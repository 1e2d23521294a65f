"""Which segmenters there are, and where they may start; torch-free.

Reads and writes nothing.  ``largefov`` and ``deeplabv2`` are ours and stand on any of our backbones; ``deeplabv3`` and
``deeplabv3plus`` come from segmentation-models-pytorch.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stages.nets.backbones.config import BACKBONES, BackboneConfig
from stages.nets.downloads import COCO_WEIGHTS, coco_name
from stages.nets.segmenters.base import Init
from stages.nets.segmenters.deeplab_config import DILATABLE_ENCODERS, DeepLabConfig, check_encoder
from stages.nets.segmenters.deeplab_v2_config import DeepLabV2Config
from stages.nets.segmenters.largefov_config import LargeFovConfig

__all__ = [
    "DILATABLE_ENCODERS",
    "AnySegmenterConfig",
    "DeepLabConfig",
    "DeepLabV2Config",
    "Init",
    "LargeFovConfig",
    "SegmenterConfig",
    "check_encoder",
    "init_problems",
    "pretrained_name",
]

AnySegmenterConfig = LargeFovConfig | DeepLabV2Config | DeepLabConfig
"""The segmenters; a new one's config goes in here."""

SegmenterConfig = Annotated[AnySegmenterConfig, Field(discriminator="name")]
"""Any segmenter, told apart by ``name``."""


def pretrained_name(config: AnySegmenterConfig, init: Init) -> str | None:
    """The entry of ``weights:`` whose public weights enter this segmenter, or None: what a cache key has to know."""
    if init == "coco":
        return coco_name(config.backbone_name)
    return config.backbone_name if init == "imagenet" else None


def init_problems(config: AnySegmenterConfig, init: Init, classifier: BackboneConfig | None) -> list[str]:
    """Why this segmenter cannot start from ``init``; empty when it can.  Torch-free, for the check before a run.

    Args:
        config: The segmenter.
        init: Where its backbone starts.
        classifier: The backbone of the run's classifier, where there is one.
    """
    name = config.backbone_name
    if init == "imagenet" and name in BACKBONES and BACKBONES[name].public is None:
        return [f"init: imagenet, but {name} has no public weights; write init: classifier or init: random"]
    if init == "coco" and coco_name(name) not in COCO_WEIGHTS:
        known = ", ".join(known.removesuffix("_coco") for known in COCO_WEIGHTS)
        return [f"init: coco, but no public weights of {name} on COCO are known, only of {known}; write init: imagenet"]
    if init in ("imagenet", "coco") and not config.may_be_pretrained:
        return [f"init: {init} contradicts the net's pretrained: false; change one of them"]
    problems = config.init_problems(init)
    if problems:
        return problems
    if init == "classifier" and (classifier is None or classifier.name != name):
        found = "there is no classifier" if classifier is None else f"the classifier's backbone is {classifier.name}"
        return [f"init: classifier needs a classifier on {name}, but {found}; use one backbone or init: imagenet"]
    return []
