"""The head that learns which cells belong together, on the features of a backbone that stays as it is.

Pure network code; reads and writes nothing.
Shapes: B images, H W pixels, h w cells of the head's grid, C_i channels of level i, D numbers of a cell's embedding.
Source: PSA (Ahn and Kwak, CVPR 2018; ``network/resnet38_aff.py``): 1×1 convolutions of several levels, joined, and one
over all.
Differs: any backbone, so the levels are found instead of named; GroupNorm in each projection as in irn (Ahn, Cho and
Kwak, CVPR 2019); the backbone is frozen, PSA trains the whole network.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.nets.backbones.network import Backbone
from stages.nets.layers import capture_output

NORM_GROUPS = 4
"""Groups of a projection's GroupNorm.  Source: irn ``net/resnet50_irn.py``."""

_LEAST_STRIDE_PX = 3
"""Layers with smaller cells see edges of texture, not of objects."""
_PROBE_PX = 64


class AffinityHead(nn.Module):
    """From the levels of a backbone to one embedding of each cell."""

    def __init__(self, level_channels: Sequence[int], channels: int) -> None:
        """One projection for each level's C_i; ``channels`` is D, and the width of each projection."""
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(wide, channels, kernel_size=1, bias=False), nn.GroupNorm(NORM_GROUPS, channels), nn.ReLU()
            )
            for wide in level_channels
        )
        self.embed = nn.Conv2d(channels * len(level_channels), channels, kernel_size=1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Embedding (B, D, h, w) of levels (B, C_i, h, w)."""
        pairs = zip(self.projections, levels, strict=True)
        return self.embed(torch.cat([projection(level) for projection, level in pairs], dim=1))


def find_levels(backbone: Backbone) -> list[tuple[str, int]]:
    """The last layer of each resolution from a quarter of the image's downwards, in order: names and channels C_i.

    Found by looking at an empty image; layers of the two upper heights of the tree are named (``blocks.2``).
    """
    found: dict[tuple[int, ...], tuple[str, int]] = {}

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * _LEAST_STRIDE_PX <= _PROBE_PX:
            found[tuple(output.shape[2:])] = (name, output.shape[1])

    with ExitStack() as hooks, torch.inference_mode():
        for name, layer in backbone.named_modules():
            if name and name.count(".") <= 1:
                handle = layer.register_forward_hook(lambda _m, _i, output, name=name: note(name, output))
                hooks.callback(handle.remove)
        parameter = next(backbone.parameters())
        backbone(parameter.new_zeros(1, 3, _PROBE_PX, _PROBE_PX))
    return list(found.values())


def read_levels(backbone: Backbone, names: Sequence[str], images: Tensor, stride_px: int) -> list[Tensor]:
    """What some layers make of normalised images (B, 3, H, W), on cells of ``stride_px``, bilinearly; no gradient."""
    size = [max(1, round(side / stride_px)) for side in images.shape[2:]]
    with torch.no_grad(), ExitStack() as stack:
        captured = [stack.enter_context(capture_output(backbone, name)) for name in names]
        backbone(images)
        return [
            functional.interpolate(each.output.float(), size, mode="bilinear", align_corners=False) for each in captured
        ]
