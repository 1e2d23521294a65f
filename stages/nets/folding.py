"""Fold BatchNorm into the convolutions before it, for a network that is only evaluated.

Changes modules in place; reads and writes nothing.
In evaluation mode BatchNorm is y = (x - mean) · weight / sqrt(variance + eps) + bias, one factor and one offset per
channel, which the convolution before it can have in its own weight and bias: the same function, to the last bits of
float arithmetic.
Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018, §3.2.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norm(network: nn.Module) -> int:
    """Fold each BatchNorm into the convolution that stands right before it among the children of one module.

    In the networks of ``stages.nets.backbones.config`` what stands next is also called next.  BatchNorm layers that do
    more (timm's, which contain the activation), or that stand elsewhere, stay as they are.

    Args:
        network: In evaluation mode; its convolutions change, its folded BatchNorm layers become ``Identity``.

    Returns:
        How many were folded.
    """
    count = 0
    for module in network.modules():
        for (conv_name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and _fit(conv, norm):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
                count += 1
    return count


def _fit(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    is_fixed = not norm.training and norm.running_mean is not None
    return is_fixed and conv.out_channels == norm.num_features and not _is_hooked(conv) and not _is_hooked(norm)


def _is_hooked(layer: nn.Module) -> bool:
    """Whether somebody listens to what the layer makes, which folding changes."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
