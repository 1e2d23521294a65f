"""Sums over the devices of a training, so that what n devices compute together is what one would compute alone.

Pure tensor code, no I/O, no config.  Every device has a slice of each batch and calls the same functions in the same
order: a call that one of them leaves out makes the others wait for ever.  With one device nothing is sent and every
function gives back what it was given, to the last bit.

The convention: an objective returns means over the images of its slice, and the loop weighs each slice by its share of
the batch's images.  A mean over something else (labelled pixels, images that have a class) divides by ``mean_divisor``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, distributed, nn

BUCKET_ELEMENTS = 1 << 23
"""Gradients that are sent at once: 32 MB of float32."""


def num_devices() -> int:
    """Devices that train together now; 1 outside such a training."""
    is_joined = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_joined else 1


class _Sum(torch.autograd.Function):
    """All-reduce; the gradient of what every device made of the sum is the sum of their gradients."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        del ctx
        return sum_over_devices(gradients[0])


def sum_over_devices(value: Tensor) -> Tensor:
    """The elementwise sum of all devices' tensors of one shape; differentiable, also twice."""
    return value if num_devices() == 1 else _Sum.apply(value)  # pyright: ignore[reportReturnType] - apply is untyped


def largest_over_devices(value: int) -> int:
    """The largest of all devices' numbers."""
    if num_devices() == 1:
        return value
    found = torch.tensor(value)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def mean_divisor(count: Tensor, num_images: int) -> Tensor:
    """What a slice divides its sum by, so that the slices' means, weighed by images, give the mean over the batch.

    Args:
        count: Scalar number of things that the slice's sum is over, no gradient.
        num_images: B, images of the slice.

    Returns:
        Scalar: ``count``, at least 1; with several devices their total count, at least 1, times this slice's share of
        the batch's images.
    """
    if num_devices() == 1:
        return count.clamp(min=1)
    total = sum_over_devices(torch.stack([count, torch.full_like(count, num_images)]))
    return total[0].clamp(min=1) * (num_images / total[1])


# ---------------------------------------------------------------------------------------------------------------------
# What the training loop exchanges
# ---------------------------------------------------------------------------------------------------------------------


def sum_losses(losses: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The batch's losses from those of the slices, each weighed by its ``share`` of the images; same names everywhere.

    Differs: what is logged beside the loss and is no mean over images (a maximum, a share of pairs) is averaged, too.
    """
    if num_devices() == 1:
        return dict(losses)
    device = losses["loss"].device  # what is only logged may lie elsewhere
    total = torch.stack([value.to(device, torch.float32) for value in losses.values()]) * share
    distributed.all_reduce(total)
    return dict(zip(losses, total.unbind(), strict=True))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every device the sum of all devices' gradients.

    A parameter without a gradient on some devices counts there as zero; without one on all of them it keeps none.
    """
    if num_devices() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # On the CPU: whether a gradient is there is known before an accelerator has computed it.
    present = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
    distributed.all_reduce(present)
    gradients = []
    for parameter, count in zip(trained, present.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        total = _flatten(bucket)
        distributed.all_reduce(total)
        _write_back(total, bucket)


def copy_from_first(model: nn.Module) -> None:
    """Give every device the first one's parameters and buffers."""
    if num_devices() == 1:
        return
    with torch.no_grad():
        for bucket in _buckets(list(chain(model.parameters(), model.buffers()))):
            values = _flatten(bucket)
            distributed.broadcast(values, src=0)
            _write_back(values, bucket)


def wait_for_all() -> None:
    """Return when every device has come here."""
    if num_devices() > 1:
        distributed.barrier()


def _buckets(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Neighbours of one dtype together, up to BUCKET_ELEMENTS where one tensor is not larger itself."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _write_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))
