"""SqueezeNet 1.1; torch is imported inside functions.

Source: Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", 2016;
torchvision's version 1.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.nets.backbones.cell_rules import CellRule
from stages.nets.backbones.spec import BackboneSpec, torchvision_file

if TYPE_CHECKING:
    from stages.nets.backbones.network import Backbone


def _build(output_stride: int) -> Backbone:
    """Its pools round up (ceil_mode) and its first convolution has no padding: maps lose up to a cell."""
    from torchvision import models

    from stages.nets.backbones.network import Backbone, limit_stride

    plain = models.squeezenet1_1(weights=None)
    limit_stride(plain.features.modules(), output_stride)
    return Backbone(plain, num_channels=512, output_stride=output_stride)


SQUEEZENET1_1 = BackboneSpec(
    "squeezenet1_1",
    (4, 8, 16),
    _build,
    public=torchvision_file("squeezenet1_1-b8a52dc0.pth"),
    largefov_head={"dilation": 6, "batch_norm": True, "fc7": False, "channels": 256, "dropout": 0.1},
    cells=CellRule.UNPADDED_KERNELS,
)
