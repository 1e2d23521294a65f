"""A small network of ours that trains from scratch on a CPU; torch is imported inside functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.nets.backbones.spec import BackboneSpec

if TYPE_CHECKING:
    from stages.nets.backbones.network import Backbone

_WIDTHS = (16, 32, 48, 48, 64, 64)


def _build(output_stride: int) -> Backbone:
    """Six 3×3 convolutions with BatchNorm at stride 4, the first two of stride 2: trains on a CPU in a minute.

    For the embedded synthetic images of about 96 px: 61 million multiplications an image.  A cell sees 39 px.
    """
    from torch import nn

    from stages.nets.backbones.network import Backbone

    layers: list[nn.Module] = []
    channels = 3
    for number, width in enumerate(_WIDTHS):
        layers += [
            nn.Conv2d(channels, width, 3, stride=2 if number < 2 else 1, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    plain = nn.ModuleDict({"features": nn.Sequential(*layers)})
    return Backbone(plain, num_channels=channels, output_stride=output_stride)


SMALL = BackboneSpec(
    "small",
    (4,),
    _build,
    largefov_head={"dilation": 6, "batch_norm": True, "fc7": False, "channels": 96, "dropout": 0.1},
)
