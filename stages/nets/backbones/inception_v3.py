"""Inception-v3; torch is imported inside functions, the network is in ``stages.nets.backbones.inception_layers``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.nets.backbones.spec import BackboneSpec, torchvision_file

if TYPE_CHECKING:
    from stages.nets.backbones.network import Backbone


def _build(output_stride: int) -> Backbone:
    from stages.nets.backbones.inception_layers import InceptionFeatures
    from stages.nets.backbones.network import Backbone

    plain = InceptionFeatures(output_stride)
    return Backbone(plain, num_channels=2048, output_stride=output_stride, half_normalised=True)


INCEPTION_V3 = BackboneSpec(
    "inception_v3", (8, 16, 32), _build, public=torchvision_file("inception_v3_google-0cc3c7bd.pth")
)
