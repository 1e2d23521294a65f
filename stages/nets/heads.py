"""VGG16's own head for the classifier: pool5, fc6 and fc7 as they are, and a last layer for our classes.

Reads weight files through ``stages.nets.weights``; writes nothing.
Shapes: B images, K foreground classes, D feature channels, h w cells.
Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, §2.1
(configuration D, torchvision's layout); with only the last layer replaced it is the classifier of Li et al., "Tell Me
Where to Look: Guided Attention Inference Network", CVPR 2018, §4.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from stages.errors import WeightsError
from stages.nets.backbones.network import Backbone
from stages.nets.weights import WeightsReport, load_tensors, read_tensors

GRID = 7
"""fc6 sees GRID × GRID cells, which is what pool5 leaves of 224 × 224 pixels."""

FC_CHANNELS = 4096
"""Channels of fc6 and fc7."""

POOL5_PX = 32
"""Pixels per cell behind pool5, in each direction."""


class FcHead(nn.Module):
    """pool5 → 7 × 7 cells → fc6 → fc7 → fc8; ReLU and dropout of one half behind fc6 and fc7.

    pool5 is the maximum over the same 32 × 32 pixels at every output stride: 2 × 2 cells at stride 16 (the plain net's
    pool), 4 × 4 at 8, 8 × 8 at 4, so that 224 × 224 pixels always leave 7 × 7 cells.  What other sizes leave is
    averaged to 7 × 7 cells, as torchvision does.
    """

    def __init__(self, num_channels: int, output_stride: int, num_foreground: int) -> None:
        """Make the layers at a random start (torchvision's: weights of deviation 0.01, no bias).

        Args:
            num_channels: D; VGG16 has 512.
            output_stride: Pixels per cell of the features; divides 32.
            num_foreground: K.
        """
        super().__init__()
        self.pool5_cells = POOL5_PX // output_stride
        self.fc6 = _linear(num_channels * GRID**2, FC_CHANNELS)
        self.fc7 = _linear(FC_CHANNELS, FC_CHANNELS)
        self.fc8 = _linear(FC_CHANNELS, num_foreground)
        self.dropout = nn.Dropout(0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Class scores (B, K, 1, 1) of features (B, D, h, w); fewer cells than pool5 takes are pooled to one."""
        pool5 = [min(self.pool5_cells, side) for side in features.shape[2:]]
        cells = average_to_grid(max_pool2d(features, pool5))
        hidden = self.dropout(self.fc6(cells.flatten(1)).relu())
        hidden = self.dropout(self.fc7(hidden).relu())
        return self.fc8(hidden)[:, :, None, None]

    @property
    def plain_layers(self) -> tuple[nn.Module, ...]:
        """The layers that public weights exist for; they learn as fast as the backbone."""
        return self.fc6, self.fc7


def _linear(in_channels: int, out_channels: int) -> nn.Linear:
    layer = cast(nn.Linear, nn.utils.skip_init(nn.Linear, in_channels, out_channels))
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def average_to_grid(features: Tensor, grid: int = GRID) -> Tensor:
    """Adaptive average pooling of (B, D, h, w) to (B, D, grid, grid); cells that are there already stay as they are.

    Two matrix products, since the gradient of torch's own adaptive pooling differs from run to run on a GPU.
    """
    height, width = features.shape[2:]
    if height != grid:
        features = _averages(height, grid).to(features) @ features
    if width != grid:
        features = features @ _averages(width, grid).to(features).T
    return features


def _averages(size: int, grid: int) -> Tensor:
    """(grid, size): row i averages the cells floor(i · size / grid) … ceil((i + 1) · size / grid) - 1."""
    rows = torch.zeros(grid, size)
    for row in range(grid):
        start, stop = row * size // grid, -(-(row + 1) * size // grid)
        rows[row, start:stop] = 1 / (stop - start)
    return rows


def load_vgg16(backbone: Backbone, head: FcHead, path: Path) -> WeightsReport:
    """Load torchvision's vgg16 into the backbone and into fc6 and fc7; fc8 has no ImageNet weights.

    Returns:
        What matched, by the file's names.

    Raises:
        WeightsError: the file is not readable, lacks tensors or does not fit; the tensors are named.
    """
    source = f"vgg16 with fc6 and fc7 from {path.name}"
    layers = nn.ModuleDict({"classifier": nn.ModuleDict({"0": head.fc6, "3": head.fc7})})  # their names in the file
    wanted = tuple(layers.state_dict())
    tensors = read_tensors(path, (*backbone.state_dict(), *wanted))
    features = load_tensors(backbone, tensors, source=source)
    lacking = [f"{name}: missing in the file" for name in wanted if name not in tensors]
    if lacking:
        raise WeightsError(
            f"{source}: head: fc starts at VGG16's own fc6 and fc7, of which the file lacks {len(lacking)} tensors; "
            "give the whole vgg16 file of torchvision, or write head: gap or pretrained: false",
            lacking,
        )
    load_tensors(layers, {name: tensors[name] for name in wanted}, source=source)
    unused = tuple(name for name in features.unexpected if name not in wanted)
    return WeightsReport(source, (*features.matched, *wanted), features.missing, unused)
