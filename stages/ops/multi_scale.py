"""Class scores of whole images from a segmenter: one scale, or the mean over several scales and their mirror images.

Pure torch; reads and writes no file.
Shapes: B images of one size, C classes with background, H W image pixels, h w the network's cells.
Source: the protocol of DeepLab's and ToCo's test scripts: probabilities averaged over scales and flips at image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.contracts import LEAST_INPUT_PX
from stages.ops.devices import Precision, autocast

_Result = TypeVar("_Result")


def network_size(size: tuple[int, int], short_side_px: int | None, scale: float = 1.0) -> tuple[int, int]:
    """The (height, width) at which the network sees an image; no side falls below ``LEAST_INPUT_PX``.

    Args:
        size: Of the image, (height, width).
        short_side_px: What its shorter side becomes before ``scale``; None keeps the size.
        scale: Of a multi-scale test.
    """
    factor = scale if short_side_px is None else scale * short_side_px / min(size)
    return max(LEAST_INPUT_PX, round(size[0] * factor)), max(LEAST_INPUT_PX, round(size[1] * factor))


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, ·, H, W) bilinearly, averaging where it shrinks (as the training's resizing does)."""
    if tuple(images.shape[-2:]) == size:
        return images
    return functional.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def predict_logits(
    model: nn.Module,
    images: Tensor,
    *,
    short_side_px: int | None = None,
    scale: float = 1.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Logits at the size of the images.

    Args:
        model: A segmenter in evaluation mode: (B, 3, H, W) to (B, C, h, w).
        images: Normalised, float32 (B, 3, H, W).
        short_side_px: Shorter side of what the network sees; None for the images' own size.
        scale: Further factor on that.
        precision: Of the forward pass.

    Returns:
        float32 (B, C, H, W).
    """
    size = (images.shape[-2], images.shape[-1])
    seen = resize(images, network_size(size, short_side_px, scale))
    with autocast(images.device.type, precision):
        logits: Tensor = model(seen)
    return functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def multi_scale_probabilities(
    model: nn.Module,
    images: Tensor,
    *,
    scales: Sequence[float],
    flip: bool,
    short_side_px: int | None = None,
    single_scale: Tensor | None = None,
    precision: Precision = "fp32",
) -> Tensor:
    """Mean of the class probabilities over scales, and over mirror images.

    Args:
        model: As in ``predict_logits``.
        images: Normalised, float32 (B, 3, H, W).
        scales: Factors on the network's input size.
        flip: Whether each scale also sees the mirror image.
        short_side_px: As in ``predict_logits``.
        single_scale: The logits at scale 1 where the caller has them already.
        precision: As in ``predict_logits``.

    Returns:
        float32 (B, C, H, W), summing to 1 over C.
    """
    total: Tensor | None = None
    for scale in scales:
        for is_mirrored in (False, True) if flip else (False,):
            if scale == 1 and not is_mirrored and single_scale is not None:
                logits = single_scale
            else:
                seen = images.flip(-1) if is_mirrored else images
                logits = predict_logits(model, seen, short_side_px=short_side_px, scale=scale, precision=precision)
            probabilities = torch.softmax(logits.flip(-1) if is_mirrored else logits, dim=1)
            total = probabilities if total is None else total.add_(probabilities)
    if total is None:
        raise ValueError("scales must name at least one scale, got none")
    return total / (len(scales) * (2 if flip else 1))


def in_fitting_batches(function: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor) -> tuple[Tensor, ...]:
    """``function(images)``, in ever smaller halves where the accelerator's memory does not hold the whole batch.

    Args:
        function: Works on each image by itself: (B, …) to some tensors (B, …).
        images: (B, …).

    Returns:
        The results on the CPU, in order.
    """
    found = in_fitting_parts(lambda part: [result.cpu() for result in function(images[part])], slice(0, len(images)))
    # a whole batch is not copied
    return tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*found, strict=True))


def in_fitting_parts(function: Callable[[slice], _Result], part: slice) -> list[_Result]:
    """``function(part)``, in ever smaller halves where the accelerator's memory does not hold the whole.

    Args:
        function: Works on the items from the slice's start to its stop.
        part: All items, at least one.

    Returns:
        The result of each part, in order; one where nothing had to be halved.
    """
    try:
        return [function(part)]
    except torch.OutOfMemoryError:
        if part.stop - part.start == 1:
            raise
    torch.cuda.empty_cache()  # here, where what the failed call held is free
    middle = (part.start + part.stop) // 2
    halves = (slice(part.start, middle), slice(middle, part.stop))
    return [result for half in halves for result in in_fitting_parts(function, half)]
