"""Lower the output stride of plain networks: late strides become 1, the kernels behind them are dilated.

Changes modules in place and touches no weight.
Source: Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", 2015, §3.1.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


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
