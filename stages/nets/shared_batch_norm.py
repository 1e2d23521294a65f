"""BatchNorm over a batch that lies on several devices: statistics of the whole batch, as on one device.

Pure network code; reads and writes nothing.  torch's own SyncBatchNorm does the same on CUDA only, and its class would
stand in the place of BatchNorm's; here the layers stay what they are, and so do the names of their tensors.
Shapes: B images of this device, D channels, n devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.ops.collectives import num_devices, sum_over_devices


@contextlib.contextmanager
def share_batch_norm(model: nn.Module) -> Iterator[None]:
    """Let every BatchNorm of ``model`` in training mode measure the batch of all devices inside the block.

    A layer in evaluation mode is left alone.  One exchange per layer and pass, with one device none and no change.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)] if num_devices() > 1 else []
    for layer in layers:
        layer.forward = partial(_normalise, layer)  # pyright: ignore[reportAttributeAccessIssue] - by position only
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _normalise(layer: _BatchNorm, features: Tensor) -> Tensor:
    """What BatchNorm makes of features (B, D, …) in training mode, with the statistics of all devices."""
    if not layer.training:
        return type(layer).forward(layer, features)
    count, mean, variance = batch_statistics(features)
    _update_running(layer, count, mean, variance)
    scale = torch.rsqrt(variance + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight
    shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
    shape = (1, -1, *[1] * (features.ndim - 2))
    return (features.float() * scale.view(shape) + shift.view(shape)).to(features.dtype)


def batch_statistics(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count of values per channel, mean (D,) and biased variance (D,) of all devices' features (B, D, …), float32.

    Each device's own mean and variance are combined, which loses no digits where the mean is far from zero.
    """
    axes = [0, *range(2, features.ndim)]
    variance, mean = torch.var_mean(features.float(), dim=axes, correction=0)
    own = torch.cat([mean.new_tensor([features.numel() / features.shape[1]]), mean, variance])
    # each device writes its own row: the sum is a gather that has a gradient
    place = own.new_zeros(num_devices())
    place[distributed.get_rank()] = 1
    rows = sum_over_devices(place[:, None] * own)
    counts, means, variances = rows[:, :1], *rows[:, 1:].chunk(2, dim=1)
    total = counts.sum()
    shares = counts / total
    mean = (shares * means).sum(dim=0)
    return total, mean, (shares * (variances + (means - mean).square())).sum(dim=0)


@torch.no_grad()
def _update_running(layer: _BatchNorm, count: Tensor, mean: Tensor, variance: Tensor) -> None:
    """The running statistics as BatchNorm keeps them: the variance unbiased; equal on all devices."""
    if layer.running_mean is None or layer.running_var is None or layer.num_batches_tracked is None:
        return
    layer.num_batches_tracked.add_(1)
    momentum = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean, momentum)
    layer.running_var.lerp_(variance * (count / (count - 1)), momentum)
