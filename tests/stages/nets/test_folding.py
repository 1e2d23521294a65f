"""A folded network is the same function, whatever the backbone; what cannot be folded is left alone."""

import pytest
import torch
from torch import nn

from stages.nets.backbones.config import BACKBONES, BackboneConfig
from stages.nets.folding import fold_batch_norm

FOLDED = {"small": 6, "resnet50": 53, "resnet101": 104, "inception_v3": 94, "mobilenet_v2": 52}
"""BatchNorm layers of the plain nets; none in VGG16 and SqueezeNet, and timm's contain the activation."""


def _with_statistics(network: nn.Module) -> nn.Module:
    """Means, variances, factors and offsets as after a training; fresh ones would make folding trivial."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.6, 1.2)
            nn.init.normal_(layer.bias, std=0.2)
    return network.eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_folded_backbone_gives_the_same_features(name):
    torch.manual_seed(0)
    config = BackboneConfig(name=name, output_stride=BACKBONES[name].output_strides[-1], pretrained=False)
    backbone = _with_statistics(config.build())
    images = torch.randn(2, 3, 80, 96)
    with torch.inference_mode():
        before = backbone(images)
        count = fold_batch_norm(backbone)
        after = backbone(images)
    plain = sum(type(layer) is nn.BatchNorm2d for layer in backbone.modules())
    assert count == FOLDED.get(name, count)
    assert plain == 0 or name not in FOLDED
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()


def test_only_what_stands_right_behind_a_convolution_is_folded():
    heard = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    heard[0].register_forward_hook(lambda *_: None)
    for network in (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        heard,
    ):
        assert fold_batch_norm(network.eval()) == 0
    training = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert fold_batch_norm(training) == 0, "its statistics still move"
    assert fold_batch_norm(training.eval()) == 1
