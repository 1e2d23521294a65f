"""The feature part of a plain network at a chosen output stride: what all backbones share.

Changes modules in place where a stride is lowered, and touches no weight.  Reads and writes nothing.
Every backbone keeps the plain network's tensor names (``features.0.weight``, ``layer4.2.conv3.weight`` …) without its
ImageNet classifier, and takes images normalised with ImageNet's mean and deviation, whatever its own weights expect.
Shapes: B images, D feature channels, H W pixels, h w cells.
Source: Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", 2015, §3.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from stages.nets.backbones.cell_rules import CellRule
from stages.ops.cells import CellAxis, CellGrid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

HEADS = frozenset({"classifier", "avgpool", "global_pool", "dropout", "fc", "AuxLogits"})
"""Children of the plain networks that stand behind the features."""


class Backbone(nn.Module):
    """The feature part of a plain network: its children, called one after the other.

    Attributes:
        name: As a config spells it; empty when built without one.
        num_channels: D.
        output_stride: Pixels per cell.
        cell_rule: Where the cells look.
    """

    name: str = ""
    cell_rule: CellRule = CellRule.PADDED_KERNELS

    def __init__(
        self,
        plain: nn.Module,
        *,
        num_channels: int,
        output_stride: int,
        half_normalised: bool = False,
        freeze_bn: bool = False,
    ) -> None:
        """Adopt the children of ``plain`` that make features, under their names.

        Args:
            plain: A network whose feature part is the chain of its children.
            num_channels: D.
            output_stride: Pixels per cell.
            half_normalised: The weights expect (x - 0.5) / 0.5 instead of ImageNet's mean and deviation.
            freeze_bn: Leave the BatchNorm layers in evaluation mode always.
        """
        super().__init__()
        for name, child in plain.named_children():
            if name not in HEADS:
                self.add_module(name, child)
        self.num_channels = num_channels
        self.output_stride = output_stride
        self.freeze_bn = freeze_bn
        self.half_normalised = half_normalised

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D, h, w) of images (B, 3, H, W) that are normalised with ImageNet's mean and deviation."""
        features = renormalise_half(images) if self.half_normalised else images
        for child in self.children():
            features = child(features)
        return features

    def train(self, mode: bool = True) -> Backbone:
        """Switch between training and evaluation; frozen BatchNorm layers stay in evaluation."""
        super().train(mode)
        if self.freeze_bn:
            freeze_batch_norm(self)
        return self

    def cells(self, map_size: Sequence[int], image_size: Sequence[int]) -> CellGrid:
        """Where the cells of a map look, be it of the output or of a layer before it.

        The stride is the one that gives as many cells; a map that no stride gives is taken to span the image evenly.

        Args:
            map_size: (h, w).
            image_size: (H, W) of the network's input.
        """
        rule, stride = self.cell_rule, self.output_stride
        while stride > 1 and any(
            rule.num_cells(stride, side_px) != cells for cells, side_px in zip(map_size, image_size, strict=True)
        ):
            stride //= 2
        if stride == 1 and tuple(map_size) != tuple(image_size):
            return CellGrid.even(map_size, image_size)
        rows, columns = (CellAxis(rule.first_px(stride, side_px), stride) for side_px in image_size)
        return CellGrid(rows, columns)

    def named_layers(self) -> tuple[str, ...]:
        """Names of all layers, in the order of execution; what a config may name as a position."""
        return tuple(name for name, _ in self.named_modules() if name)


def freeze_batch_norm(module: nn.Module) -> None:
    """Put every BatchNorm under ``module`` into evaluation mode: its running statistics stay as they are."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


def renormalise_half(images: Tensor) -> Tensor:
    """Turn images (B, 3, H, W) normalised with ImageNet's mean and deviation into (x - 0.5) / 0.5."""
    std = images.new_tensor(IMAGENET_STD).view(3, 1, 1)
    mean = images.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    return images * (std / 0.5) + (mean - 0.5) / 0.5


def limit_stride(layers: Iterable[nn.Module], output_stride: int) -> None:
    """Lower the stride of a chain of layers in place: late strides become 1, later kernels are dilated.

    The layer that loses its stride keeps the dilation reached so far, the layers behind it are dilated by the stride
    lost, so that each weight still sees the neighbours that it was trained for.  A pool that loses its stride becomes
    3×3 with padding and is not dilated, the paper's way to keep the size of the map.

    Args:
        layers: Modules in the order of execution; convolutions of stride 2 keep their padding "same".
        output_stride: Pixels per cell that are wanted.
    Source: Chen et al., 2015, §3.1.
    """
    stride = dilation = 1
    for layer in layers:
        if not isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            continue
        step = _first(layer.stride)
        loses_stride = step > 1 and stride * step > output_stride
        if isinstance(layer, nn.MaxPool2d):
            if loses_stride:
                layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode = 3, 1, 1, False
        else:
            if loses_stride:
                layer.stride = (1, 1)
            if dilation > 1:
                dilate(layer, dilation)
        if loses_stride:
            dilation *= step
        else:
            stride *= step


def dilate(conv: nn.Conv2d, dilation: int) -> None:
    """Dilate the kernel of ``conv`` and pad so that the map keeps its size; 1-wide kernel sides stay as they are."""
    height, width = conv.kernel_size
    conv.dilation = (dilation if height > 1 else 1, dilation if width > 1 else 1)
    conv.padding = ((height // 2) * conv.dilation[0], (width // 2) * conv.dilation[1])


def _first(value: int | tuple[int, ...]) -> int:
    return value[0] if isinstance(value, tuple) else value
