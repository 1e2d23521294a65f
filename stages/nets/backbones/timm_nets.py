"""Networks of timm, which can lower their output stride by themselves; timm is imported inside functions."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from stages.nets.backbones.spec import BackboneSpec, PublicWeights

if TYPE_CHECKING:
    from stages.nets.backbones.network import Backbone


def build_timm(output_stride: int, *, name: str, num_channels: int, half_normalised: bool = False) -> Backbone:
    """A network of timm whose feature part is a chain of its children."""
    import timm

    from stages.nets.backbones.network import Backbone

    plain = timm.create_model(name, pretrained=False, num_classes=0, output_stride=output_stride)
    return Backbone(plain, num_channels=num_channels, output_stride=output_stride, half_normalised=half_normalised)


SERESNET50 = BackboneSpec(
    "seresnet50",
    (8, 16, 32),
    partial(build_timm, name="seresnet50", num_channels=2048),
    public=PublicWeights(
        "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-rsb-weights/"
        "seresnet50_a1_0-ffa00869.pth",
        "ffa00869",
    ),
)
MOBILENETV1_100 = BackboneSpec(
    "mobilenetv1_100",
    (8, 16, 32),
    partial(build_timm, name="mobilenetv1_100", num_channels=1024, half_normalised=True),
    public=PublicWeights(
        "https://huggingface.co/timm/mobilenetv1_100.ra4_e3600_r224_in1k/resolve/main/model.safetensors", None
    ),
)
