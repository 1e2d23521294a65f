"""MobileNetV2; torch is imported inside functions.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018; torchvision's module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.nets.backbones.spec import BackboneSpec, torchvision_file

if TYPE_CHECKING:
    from stages.nets.backbones.network import Backbone


def _build(output_stride: int) -> Backbone:
    from torchvision import models

    from stages.nets.backbones.network import Backbone, limit_stride

    plain = models.mobilenet_v2(weights=None)
    limit_stride(plain.features.modules(), output_stride)
    return Backbone(plain, num_channels=1280, output_stride=output_stride)


MOBILENET_V2 = BackboneSpec(
    "mobilenet_v2", (4, 8, 16, 32), _build, public=torchvision_file("mobilenet_v2-b0353104.pth")
)
