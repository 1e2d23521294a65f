"""DeepLab v2: a sum of dilated classifiers (ASPP) on any of our backbones, at several scales of the image (MSC).

Pure network code; reads and writes nothing.
Shapes: B images, C classes with background, H W pixels, h w cells.
Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
Connected CRFs", 2017, §3.2 and §4.1.2; deeplab-pytorch (4219467) libs/models/deeplabv2.py and msc.py.
Differs: torchvision's ResNet (stride in the 3×3 convolution), whose public weights exist, instead of Caffe's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.nets.backbones.network import Backbone
from stages.nets.segmenters.segmenter import Segmenter


class DeepLabV2(Segmenter):
    """backbone → sum of 3×3 classifiers of several dilations, without a hidden layer (the paper's ResNet-101)."""

    def __init__(
        self,
        backbone: Backbone,
        pool5: nn.Module,
        num_classes: int,
        *,
        dilations: Sequence[int],
        scales: Sequence[float],
    ) -> None:
        """Put classifiers at a random start behind ``pool5`` behind ``backbone``; options as in ``DeepLabV2Config``."""
        super().__init__()
        self.num_classes = num_classes
        self.scales = scales
        self.backbone = backbone
        self.pool5 = pool5
        if backbone.freeze_bn:
            keep_batch_norm(backbone)
        self.aspp = nn.ModuleList(_classifier(backbone.num_channels, num_classes, dilation) for dilation in dilations)

    @property
    def trunk(self) -> Backbone:
        """The backbone."""
        return self.backbone

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, h, w) at the backbone's stride: the largest over the scales."""
        return self._views(images)[-1]

    def training_logits(self, images: Tensor) -> list[Tensor]:
        """Logits of the whole image, of each further scale at its own size, and their maximum (B, C, h, w)."""
        return self._views(images)

    def _views(self, images: Tensor) -> list[Tensor]:
        whole = self._score(images)
        if not self.scales:
            return [whole]
        scaled = [self._score(_resize(images, scale)) for scale in self.scales]
        size = whole.shape[-2:]
        same = [functional.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in scaled]
        return [whole, *scaled, torch.stack([whole, *same]).amax(dim=0)]

    def _score(self, images: Tensor) -> Tensor:
        features = self.pool5(self.backbone(images))
        first, *others = self.aspp
        scores: Tensor = first(features)
        for classify in others:
            scores = scores + classify(features)
        return scores


def _classifier(in_channels: int, num_classes: int, dilation: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, num_classes, 3, padding=dilation, dilation=dilation)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type] - a Conv2d made with a bias has one
    return conv


def _resize(images: Tensor, scale: float) -> Tensor:
    return functional.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)


def keep_batch_norm(module: nn.Module) -> None:
    """Let no scale and offset of a BatchNorm learn; its statistics are kept by ``freeze_bn``."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.requires_grad_(False)
