"""Where the affinity head reads a backbone, and on which grid."""

from __future__ import annotations

import pytest
import torch

from stages.nets.affinity import AffinityHead, find_levels, read_levels
from stages.nets.backbones.config import BackboneConfig

CASES: list[tuple[str, int, list[tuple[str, int]]]] = [
    ("small", 4, [("features", 64)]),
    ("squeezenet1_1", 8, [("features.4", 128), ("features", 512)]),
    ("tf_efficientnet_lite0", 16, [("blocks.1", 24), ("blocks.2", 40), ("bn2", 1280)]),
    ("resnet50", 16, [("layer1", 256), ("layer2", 512), ("layer4", 2048)]),
]


@pytest.mark.parametrize(("name", "stride", "levels"), CASES, ids=[name for name, *_ in CASES])
def test_the_last_layer_of_each_resolution_is_a_level(name: str, stride: int, levels: list[tuple[str, int]]) -> None:
    with torch.random.fork_rng(devices=[]):
        config = BackboneConfig.model_validate({"name": name, "output_stride": stride, "pretrained": False})
        backbone = config.build().eval()
    assert find_levels(backbone) == levels


def test_levels_stand_on_one_grid_and_carry_no_gradient() -> None:
    torch.manual_seed(0)
    backbone = BackboneConfig(name="squeezenet1_1", output_stride=8, pretrained=False).build().eval()
    levels = find_levels(backbone)
    found = read_levels(backbone, [name for name, _ in levels], torch.rand(2, 3, 64, 96), 8)
    assert [tuple(level.shape) for level in found] == [(2, channels, 8, 12) for _, channels in levels]
    head = AffinityHead([channels for _, channels in levels], 8)
    embedding = head(found)
    assert embedding.shape == (2, 8, 8, 12)
    embedding.sum().backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert not any(layer._forward_hooks for layer in backbone.modules()), "hooks stay behind"
