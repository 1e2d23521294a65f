"""Inception-v3 whose maps align with the image and whose last two reductions may keep the stride.

Pure network code; reads and writes nothing.  Shapes: B images, H W pixels, h w cells.
Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016; torchvision's module.
Differs from torchvision: its unpadded convolutions and pools are padded, so that h = H / stride and small images pass;
the tensors and their names are the same.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import inception

from stages.nets.backbones.network import dilate


class PaddedReduction(nn.Module):
    """Mixin of Inception's two reduction blocks: the pooled branch padded as the convolutions, at a free stride."""

    reduction_stride = 2

    def pool(self, x: Tensor) -> Tensor:
        """The pooled branch (B, D, h, w)."""
        return functional.max_pool2d(x, kernel_size=3, stride=self.reduction_stride, padding=1)


class ReductionB(PaddedReduction, inception.InceptionB):
    """Mixed_6a: stride 8 to 16."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch3x3(x), double, self.pool(x)]


class ReductionD(PaddedReduction, inception.InceptionD):
    """Mixed_7a: stride 16 to 32."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return [branch3x3, branch7x7, self.pool(x)]


class InceptionFeatures(inception.Inception3):
    """Torchvision's Inception-v3 at output stride 8, 16 or 32; it starts at He's scale, as torchvision's other nets."""

    def __init__(self, output_stride: int) -> None:
        """Build the plain network with our reductions, then pad and dilate it."""
        blocks: list[Callable[..., nn.Module]] = [
            inception.BasicConv2d,
            inception.InceptionA,
            ReductionB,
            inception.InceptionC,
            ReductionD,
            inception.InceptionE,
            inception.InceptionAux,
        ]
        super().__init__(aux_logits=False, inception_blocks=blocks, init_weights=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        align_inception(self, output_stride)


def align_inception(plain: nn.Module, output_stride: int) -> None:
    """Pad everything "same"; below stride 32 Mixed_7a keeps its map's size, below 16 Mixed_6a too; dilate the rest."""
    for layer in plain.modules():
        if isinstance(layer, nn.Conv2d):
            dilate(layer, 1)
        elif isinstance(layer, nn.MaxPool2d):
            layer.padding = 1
    dilation = 1
    for name, block in plain.named_children():
        if not name.startswith(("Mixed_6", "Mixed_7")):
            continue
        loses_stride = isinstance(block, PaddedReduction) and output_stride < (16 if name == "Mixed_6a" else 32)
        for layer in block.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1) if loses_stride else layer.stride
                dilate(layer, dilation)
        if isinstance(block, PaddedReduction) and loses_stride:
            block.reduction_stride = 1
            dilation *= 2
