"""Which backbones there are, and how a config asks for one; torch-free.

Reads and writes nothing.  The modules themselves are made in ``stages.nets.backbones.builders``.
A backbone turns images (B, 3, H, W) into features (B, D, h, w) with h = H / output stride, up to one cell.
The output stride is lowered without touching a weight: late strides become 1 and the convolutions behind them are
dilated, so public ImageNet weights fit at every stride.
Source: Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", 2015, §3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import model_validator

from stages.contracts import StageConfig

BackboneName = Literal[
    "small",
    "vgg16",
    "resnet50",
    "resnet101",
    "squeezenet1_1",
    "inception_v3",
    "mobilenet_v2",
    "seresnet50",
    "mobilenetv1_100",
]

BACKBONE_NAMES: tuple[str, ...] = get_args(BackboneName)

OUTPUT_STRIDES: Mapping[str, tuple[int, ...]] = {
    "small": (4,),
    "vgg16": (4, 8, 16),
    "resnet50": (4, 8, 16, 32),
    "resnet101": (4, 8, 16, 32),
    "squeezenet1_1": (4, 8, 16),
    "inception_v3": (8, 16, 32),
    "mobilenet_v2": (4, 8, 16, 32),
    "seresnet50": (8, 16, 32),
    "mobilenetv1_100": (8, 16, 32),
}
"""Allowed output strides by backbone; the last one is the plain net's own (VGG16 without its final pool: 16)."""

HeadName = Literal["gap", "fc"]
"""What stands on the classifier's backbone: ``gap``, a 1×1 convolution whose score maps are averaged to the logits;
``fc``, VGG16's own fc6 and fc7 with a last layer for our classes, which has no score maps."""

UNTRAINED: frozenset[str] = frozenset({"small"})
"""Backbones that no public weights exist for: they train from scratch."""


class BackboneConfig(StageConfig):
    """A backbone: its name, how fine its feature map is, and where its weights start."""

    name: BackboneName
    """Which network; ``docs/weights.md`` says whose layout its weight files have."""
    output_stride: Literal[4, 8, 16, 32] = 8
    """Pixels of the image per cell of the feature map; ``small`` has only 4, which is then the default."""
    pretrained: bool = True
    """Start from ImageNet weights (``weights.<name>: FILE``, else the public download); ``small`` has none."""
    freeze_bn: bool = False
    """Keep the running statistics of BatchNorm as they were loaded (batches too small to measure them)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the user wrote
        """Defaults that depend on the name, so that ``{name: small}`` alone is a complete config."""
        if isinstance(values, dict) and values.get("name") in UNTRAINED:
            return {"output_stride": OUTPUT_STRIDES[values["name"]][0], "pretrained": False, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> BackboneConfig:
        problems = backbone_problems(self.name, self.output_stride, pretrained=self.pretrained)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def backbone_problems(name: str, output_stride: int, *, pretrained: bool) -> list[str]:
    """What is wrong with this choice of a known backbone; empty when it can be built.

    Args:
        name: One of ``BACKBONE_NAMES``.
        output_stride: Pixels per feature cell.
        pretrained: Whether ImageNet weights are asked for.
    """
    problems = []
    if output_stride not in OUTPUT_STRIDES[name]:
        allowed = ", ".join(map(str, OUTPUT_STRIDES[name]))
        problems.append(f"{name} has no output_stride {output_stride}; choose one of: {allowed}")
    if pretrained and name in UNTRAINED:
        problems.append(f"{name} has no public weights; write pretrained: false")
    return problems
