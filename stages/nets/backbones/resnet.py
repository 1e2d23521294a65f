"""ResNet-50 and ResNet-101; torch is imported inside functions.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; torchvision has the stride in the 3×3
convolution.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from stages.nets.backbones.spec import BackboneSpec, torchvision_file

if TYPE_CHECKING:
    from stages.nets.backbones.network import Backbone


def _build(output_stride: int, *, name: str) -> Backbone:
    from torchvision import models

    from stages.nets.backbones.network import Backbone

    dilations = [output_stride < stride for stride in (8, 16, 32)]
    plain = models.get_model(name, weights=None, replace_stride_with_dilation=dilations)
    return Backbone(plain, num_channels=2048, output_stride=output_stride)


RESNET50 = BackboneSpec(
    "resnet50",
    (4, 8, 16, 32),
    partial(_build, name="resnet50"),
    public=torchvision_file("resnet50-0676ba61.pth"),
    coco=torchvision_file("deeplabv3_resnet50_coco-cd0a2569.pth"),
)
RESNET101 = BackboneSpec(
    "resnet101",
    (4, 8, 16, 32),
    partial(_build, name="resnet101"),
    public=torchvision_file("resnet101-63fe2227.pth"),
    coco=torchvision_file("deeplabv3_resnet101_coco-586e9e4e.pth"),
)
