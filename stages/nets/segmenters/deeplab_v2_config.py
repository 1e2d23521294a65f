"""The options of DeepLab v2; torch-free, the net is in ``stages.nets.segmenters.deeplab_v2``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from stages.nets.backbones.config import BackboneConfig
from stages.nets.segmenters.base import SegmenterBase

if TYPE_CHECKING:
    from stages.nets.segmenters.deeplab_v2 import DeepLabV2


class DeepLabV2Config(SegmenterBase):
    """DeepLab v2: atrous spatial pyramid pooling, a sum of dilated 3×3 classifiers, on a backbone, over several scales.

    Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
    Fully Connected CRFs", 2017; numbers and scales as in deeplab-pytorch (4219467).
    """

    name: Literal["deeplabv2"]
    backbone: BackboneConfig
    """The backbone; the paper's is resnet101 with ``output_stride: 8`` and ``freeze_bn: true``, which here also keeps
    BatchNorm's scales and offsets."""
    dilations: tuple[int, ...] = Field(default=(6, 12, 18, 24), min_length=1, max_length=8)
    """Dilations of the classifiers in cells."""
    scales: tuple[float, ...] = Field(default=(0.5, 0.75), max_length=4)
    """Scales at which the net sees an image beside its own size.  In training each has a loss of its own and so has the
    maximum of all (MSC); in use the maximum is what counts.  ``[]`` sees one size alone."""

    @field_validator("dilations")
    @classmethod
    def _check_dilations(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError(f"dilations are at least 1 cell, found {value}")
        return value

    @field_validator("scales")
    @classmethod
    def _check_scales(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0.25 <= scale <= 2 or scale == 1 for scale in value):
            raise ValueError(f"scales lie within 0.25 … 2 and are not 1, which is always there, found {value}")
        return value

    @property
    def backbone_name(self) -> str:
        """The backbone's name."""
        return self.backbone.name

    @property
    def may_be_pretrained(self) -> bool:
        """What the backbone says."""
        return self.backbone.pretrained

    def build(self, num_classes: int) -> DeepLabV2:
        """The net at a random start."""
        from stages.nets.segmenters.deeplab_v2 import DeepLabV2
        from stages.nets.segmenters.segmenter import deeplab_backbone

        backbone, pool5 = deeplab_backbone(self.backbone)
        return DeepLabV2(backbone, pool5, num_classes, dilations=self.dilations, scales=self.scales)
