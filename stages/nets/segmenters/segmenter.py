"""What all segmenters have in common, and the backbone as DeepLab takes it.

Network code; reads weight files through ``stages.nets.weights``, writes nothing.
Shapes: B images, C classes with background, H W pixels, h w cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stages.contracts import Progress
from stages.nets.backbones.cell_rules import CellRule
from stages.nets.backbones.config import BackboneConfig
from stages.nets.backbones.network import Backbone
from stages.nets.layers import parameter_groups
from stages.nets.weights import WeightsReport, load_pretrained


class Segmenter(nn.Module):
    """A network that scores C classes per cell; ``trunk`` is the part that pretrained weights go into."""

    num_classes: int

    @property
    def trunk(self) -> nn.Module:
        """The backbone or encoder, with the plain network's tensor names."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, h, w) of normalised images (B, 3, H, W); the caller resizes them to (H, W)."""
        raise NotImplementedError

    def training_logits(self, images: Tensor) -> list[Tensor]:
        """Logits (B, C, h, w) that each have a loss in training, the whole image's first; mostly one."""
        return [self(images)]

    def load_imagenet(self, name: str, path: Path | None, progress: Progress | None) -> list[WeightsReport]:
        """Start from the ImageNet weights ``name``, of the user's file or the public one; what was loaded.

        Raises:
            WeightsError: weights are missing or do not fit; the tensors are named.
        """
        return [load_pretrained(self.trunk, name, path, progress=progress)]

    def parameter_groups(self, head_lr_factor: float = 10.0) -> list[dict[str, Any]]:
        """All parameters for the optimiser, each once: the trunk at factor 1, the head faster.

        Args:
            head_lr_factor: The head's learning rate as a multiple of the trunk's.

        Returns:
            Dicts with ``params`` and ``lr_factor``.
        """
        return parameter_groups(self, self.trunk, head_lr_factor)


def deeplab_backbone(config: BackboneConfig) -> tuple[Backbone, nn.Module]:
    """A backbone as DeepLab takes it, and what stands right behind it.

    Of VGG16 the 2×2 pools become 3×3 with padding 1 (321 px give 161, 81 and 41 cells), and pool5 and pool5a follow: a
    3×3 maximum and a 3×3 mean, both at stride 1 and the same size.  Other backbones stay as they are.
    Differs: at the rim the mean is that of the cells that are there; Caffe counts its padding as zeros.
    """
    backbone = config.build()
    if not config.spec.has_vgg_pools:
        return backbone, nn.Identity()
    backbone.cell_rule = CellRule.PADDED_KERNELS
    for layer in backbone.modules():
        if isinstance(layer, nn.MaxPool2d):
            layer.kernel_size, layer.padding = 3, layer.dilation
    pool5 = nn.MaxPool2d(3, stride=1, padding=1)
    return backbone, nn.Sequential(pool5, nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False))
