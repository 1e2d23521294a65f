"""Which backbones there are, and how a config asks for one; torch-free.

Reads and writes nothing.  A new backbone is one file beside this one and its line in ``BACKBONES``.
A backbone turns images (B, 3, H, W) into features (B, D, h, w) with h = H / output stride, up to one cell.
The output stride is lowered without touching a weight: late strides become 1 and the convolutions behind them are
dilated, so public ImageNet weights fit at every stride.
Source: Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", 2015, §3.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from stages.contracts import StageConfig
from stages.nets.backbones.efficientnet_lite import EFFICIENTNET_LITE0, EFFICIENTNET_LITE2
from stages.nets.backbones.inception_v3 import INCEPTION_V3
from stages.nets.backbones.mobilenet_v2 import MOBILENET_V2
from stages.nets.backbones.resnet import RESNET50, RESNET101
from stages.nets.backbones.small import SMALL
from stages.nets.backbones.spec import BackboneSpec
from stages.nets.backbones.squeezenet import SQUEEZENET1_1
from stages.nets.backbones.timm_nets import MOBILENETV1_100, SERESNET50
from stages.nets.backbones.vgg16 import VGG16

if TYPE_CHECKING:
    from stages.nets.backbones.network import Backbone

BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        SMALL,
        VGG16,
        RESNET50,
        RESNET101,
        SQUEEZENET1_1,
        INCEPTION_V3,
        MOBILENET_V2,
        SERESNET50,
        MOBILENETV1_100,
        EFFICIENTNET_LITE0,
        EFFICIENTNET_LITE2,
    )
}
"""The backbones by name."""

if TYPE_CHECKING:
    BackboneName = str
else:
    BackboneName = Literal[tuple(BACKBONES)]

ClassificationLoss = Literal["multilabel_soft_margin", "cross_entropy"]
"""What a classifier is asked of its logits: ``multilabel_soft_margin``, whether each class is in the image;
``cross_entropy``, which one class it is."""

HeadName = Literal["gap", "fc"]
"""What stands on the classifier's backbone: ``gap``, a 1×1 convolution whose score maps are averaged to the logits;
``fc``, VGG16's own fc6 and fc7 with a last layer for our classes, which has no score maps."""


class BackboneConfig(StageConfig):
    """A backbone: its name, how fine its feature map is, and where its weights start."""

    name: BackboneName
    """Which network; ``docs/weights.md`` says whose layout its weight files have."""
    output_stride: Literal[4, 8, 16, 32] = 8
    """Pixels of the image per cell of the feature map; ``small`` has only 4, which is then the default."""
    pretrained: bool = True
    """Start from ImageNet weights (``weights.<name>: FILE``, else the public ones); ``small`` has none."""
    freeze_bn: bool = False
    """Keep the running statistics of BatchNorm as they were loaded (batches too small to measure them)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the user wrote
        """Defaults that depend on the name, so that ``{name: small}`` alone is a complete config."""
        spec = BACKBONES.get(str(values.get("name"))) if isinstance(values, dict) else None
        if spec is not None and spec.public is None:
            return {"output_stride": spec.output_strides[0], "pretrained": False, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> BackboneConfig:
        problems = []
        if self.output_stride not in self.spec.output_strides:
            allowed = ", ".join(map(str, self.spec.output_strides))
            problems.append(f"{self.name} has no output_stride {self.output_stride}; choose one of: {allowed}")
        if self.pretrained and self.spec.public is None:
            problems.append(f"{self.name} has no public weights; write pretrained: false")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def spec(self) -> BackboneSpec:
        """What is known of this backbone."""
        return BACKBONES[self.name]

    def build(self) -> Backbone:
        """The backbone at a random start, in training mode."""
        backbone = self.spec.build(self.output_stride)
        backbone.name = self.name
        backbone.cell_rule = self.spec.cells
        backbone.freeze_bn = self.freeze_bn
        return backbone.train()
