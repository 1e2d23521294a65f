"""VGG16 without its final pool; torch is imported inside functions.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from stages.nets.backbones.cell_rules import CellRule
from stages.nets.backbones.spec import BackboneSpec, torchvision_file

if TYPE_CHECKING:
    from stages.nets.backbones.network import Backbone


def _build(output_stride: int) -> Backbone:
    """The plain stride is 16; at 8 conv5 has dilation 2, at 4 conv4 has too."""
    from torch import nn
    from torchvision.models import vgg

    from stages.nets.backbones.network import Backbone, limit_stride

    features = vgg.make_layers(vgg.cfgs["D"])[:-1]
    for layer in features:
        if isinstance(layer, nn.Conv2d):  # as torchvision starts it
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(nn.Parameter, layer.bias))
    limit_stride(features, output_stride)
    return Backbone(nn.ModuleDict({"features": features}), num_channels=512, output_stride=output_stride)


VGG16 = BackboneSpec(
    "vgg16",
    (4, 8, 16),
    _build,
    public=torchvision_file("vgg16-397923af.pth"),
    largefov_head={},
    cells=CellRule.EVEN_POOLS,
    has_vgg_pools=True,
)
