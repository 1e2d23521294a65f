"""Grad-CAM of chosen (image, class) pairs: channel weights, and maps that stay differentiable through the features.

Pure tensor code, no I/O, no config, no hooks.
Shapes: B images, K foreground classes, P (image, class) pairs, D channels, h w cells of the feature map.
Source: Selvaraju et al., "Grad-CAM", ICCV 2017, eq. 1-2; Li et al. (GAIN), CVPR 2018, eq. 1-2.
Differs: the gradient is summed over the cells, not averaged.  The factor h · w is common to a map and goes when the map
is normalised; without it, Grad-CAM of a linear head behind a spatial mean *is* CAM, at every input size alike, and the
maps of several scales can be averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.ops.collectives import largest_over_devices


def label_pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The (image, class) pairs of a batch: all classes that each image has.

    Args:
        labels: (B, K), above 0 where the image has the class.

    Returns:
        Image indices (P,) ascending, and label indices (P,).
    """
    image, label = torch.nonzero(labels > 0, as_tuple=True)
    return image, label


def gradient_weights(
    logits: Tensor,
    features: Tensor,
    image: Tensor,
    label: Tensor,
    *,
    second_order: bool = False,
    loss_scale: float = 1.0,
) -> Tensor:
    """Channel weights of each pair: the gradient of its logit by the features, summed over the cells.

    Takes one backward pass from the logits to the features for as many classes as the richest image has, not one per
    class of the data set; no parameter receives a gradient.  An image's logits must not depend on another image's
    features (BatchNorm in training mode behind the features would make them).

    Args:
        logits: (B, K), computed from ``features``.
        features: (B, D, h, w), part of the graph of ``logits``.
        image: (P,) image of each pair, ascending.
        label: (P,) class of each pair.
        second_order: Keep the graph of the weights, so that a loss of the maps also reaches what is behind the
            features.  False makes them constants, which is the papers' reading.
        loss_scale: Factor on the logits in the backward pass, taken out of the sum over the cells: with float16
            features it keeps the gradient of a mean over many cells from vanishing.

    Returns:
        (P, D).

    Source:
        Grad-CAM eq. 1; GAIN eq. 1 ("this backward must not update parameters").
    """
    rank = torch.arange(len(image), device=image.device) - torch.searchsorted(image, image)  # n-th pair of its image
    weights = features.new_zeros(len(image), features.shape[1])
    # as many passes on every device: behind a BatchNorm that all devices share each pass is an exchange
    for number in range(largest_over_devices(int(rank.max()) + 1 if len(image) else 0)):
        chosen = torch.nonzero(rank == number)[:, 0]
        total = logits[image[chosen], label[chosen]].sum() * loss_scale
        (gradient,) = torch.autograd.grad(total, features, retain_graph=True, create_graph=second_order)
        if loss_scale != 1:
            gradient = gradient.float() / loss_scale
        summed = gradient.sum(dim=(2, 3)).to(weights.dtype)
        weights = weights.index_copy(0, chosen, summed[image[chosen]])
    return weights if second_order else weights.detach()


def linear_weights(head_weight: Tensor, label: Tensor, *, second_order: bool = False) -> Tensor:
    """The same weights in closed form, for a 1×1 convolution whose scores are averaged to the logits.

    s^c = mean over cells of Σ_k W_ck f_k, so ∂s^c/∂f_k sums to W_ck over the cells.

    Args:
        head_weight: (K, D, 1, 1).
        label: (P,).
        second_order: Whether the weights carry a gradient to the head.

    Returns:
        (P, D).
    """
    weights = head_weight[:, :, 0, 0][label]
    return weights if second_order else weights.detach()


def weighted_maps(features: Tensor, weights: Tensor, image: Tensor) -> Tensor:
    """ReLU of the weighted sum of the channels: what speaks for the class, (P, h, w).

    Args:
        features: (B, D, h, w).
        weights: (P, D).
        image: (P,) image of each pair.

    Source:
        Grad-CAM eq. 2; GAIN eq. 2 (as a 1×1 convolution).
    """
    # bmm over pairs: (P, 1, D) × (P, D, h·w); one kernel, and its backward accumulates into the few images
    chosen = features.flatten(2)[image]
    maps = torch.bmm(weights[:, None].to(chosen.dtype), chosen)[:, 0]
    return maps.reshape(len(image), *features.shape[2:]).float().relu()


def scatter_maps(maps: Tensor, image: Tensor, label: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps of pairs (P, h, w) as a batch (B, K, h, w) with zeros for the classes that were not asked for.

    Args:
        maps: (P, h, w).
        image: (P,).
        label: (P,).
        size: (B, K).
    """
    batch = maps.new_zeros(*size, *maps.shape[1:])
    return batch.index_put((image, label), maps)
