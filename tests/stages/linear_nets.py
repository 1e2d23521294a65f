"""Backbones that only blur: linear for an image ≥ 0, each kernel its own mirror image, so that a cell looks at a point.

Strides, paddings and dilations are the network's own.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from stages.nets.backbones.config import BackboneConfig
from stages.nets.backbones.network import Backbone


def linear_backbone(name: str, output_stride: int, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """The backbone with kernels ≥ 0 of sum 1 that fall off from their middle, and with means for maxima."""
    monkeypatch.setattr(functional, "max_pool2d", _mean_pool)
    with torch.device("meta"):  # nothing is drawn
        backbone = BackboneConfig(name=name, output_stride=output_stride, pretrained=False).build().eval()
    backbone.to_empty(device="cpu")
    backbone.half_normalised = False
    for path, layer in list(backbone.named_modules()):
        if isinstance(layer, nn.Conv2d):
            _blur(layer)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
        elif isinstance(layer, nn.ReLU6) or type(layer).__name__ == "SEModule":  # has a ceiling; sees the whole image
            parent, _, child = path.rpartition(".")
            setattr(backbone.get_submodule(parent), child, nn.Identity())
    return backbone


def _blur(conv: nn.Conv2d) -> None:
    rows, columns = ((torch.arange(side) - (side - 1) / 2).abs() for side in conv.kernel_size)
    weight = torch.exp(-3 * (rows[:, None] + columns)).expand_as(conv.weight)
    conv.weight.data = weight / weight.sum(dim=(1, 2, 3), keepdim=True)
    if conv.bias is not None:
        conv.bias.data.zero_()


def _mean_pool(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    del dilation, return_indices
    return functional.avg_pool2d(x, kernel_size, stride, padding, ceil_mode)
