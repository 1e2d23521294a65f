"""Losses of both trainings: image labels for the classifier, index masks for the segmenter.

Pure tensor code, no I/O, no config.  Every loss is computed in float32, also under autocast, and is finite where there
is nothing to learn from (a batch whose pixels are all 255 gives zero with zero gradients, never NaN).
On several devices the mean of a loss over the devices, weighed by their images, is the loss of the whole batch
(``stages.ops.collectives``).
Shapes: B images, K foreground classes, C = K + 1, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX
from stages.ops.collectives import mean_divisor, sum_over_devices


def multilabel_soft_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean sigmoid cross-entropy over images and classes: every class is a yes/no question of its own.

    Args:
        logits: (B, K) class scores before any activation.
        labels: (B, K) 1 where the image has the class, 0 where it has not.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the shapes differ.

    Source:
        GAIN (arXiv 1802.10171) §4: L_cl is the multi-label soft margin loss; irn and AdvCAM train with the same.
    """
    _check_pairs(logits, labels)
    return functional.multilabel_soft_margin_loss(logits.float(), labels.float())


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean softmax cross-entropy over images: the classes compete for being the one class of the image.

    Args:
        logits: (B, K) class scores before any activation.
        labels: (B, K) shares of the classes, which sum to 1: one of them is 1, or two images are mixed.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the shapes differ.

    Source:
        wsolevaluation (96f4b88) wsol/method: ``CrossEntropyLoss`` for every method on CUB and ImageNet.
    """
    _check_pairs(logits, labels)
    return functional.cross_entropy(logits.float(), labels.float())


def _check_pairs(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise ValueError(f"logits and labels must both be (B, K), got {tuple(logits.shape)} and {tuple(labels.shape)}")


def segmentation_cross_entropy(logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the labelled pixels of the batch; pixels of 255 count neither above nor below the line.

    Args:
        logits: (B, C, H, W) class scores at the masks' resolution.
        masks: (B, H, W) class indices 0 … K and 255; any integer dtype.
        weights: (B, H, W) in [0, 1], how much each labelled pixel counts; the sum is divided by their sum (by 1 where
            they sum to less), and None counts all alike.

    Returns:
        Scalar, float32; zero with zero gradients when no pixel is labelled.

    Raises:
        ValueError: the sizes differ.
    """
    losses = _pixel_losses(logits, masks)
    return _weighted_mean(losses, masks != IGNORE_INDEX, weights)


def balanced_segmentation_cross_entropy(logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Half the mean loss of the background pixels plus half the mean loss of the foreground pixels of the batch.

    Background, which fills most of a pseudo-mask, then weighs no more than the objects.  Where a batch has only one of
    the two, the loss is that one's mean.

    Args:
        logits: (B, C, H, W) class scores at the masks' resolution.
        masks: (B, H, W) class indices 0 … K and 255; any integer dtype.
        weights: (B, H, W) in [0, 1] as in ``segmentation_cross_entropy``; each side is divided by its own sum.

    Returns:
        Scalar, float32, on the scale of the plain cross-entropy; zero with zero gradients when no pixel is labelled.

    Raises:
        ValueError: the sizes differ.

    Source:
        Huang et al., "Weakly-Supervised Semantic Segmentation Network with Deep Seeded Region Growing", CVPR 2018
        (its balanced seeding loss); the batch-wide mean with the half in front is what later DeepLabv2 trainings use.
        Differs: DSRG sums the two means image by image; a missing side is NaN in the public ports and left out here.
    """
    losses = _pixel_losses(logits, masks)
    background = masks == BACKGROUND_INDEX
    foreground = (masks != BACKGROUND_INDEX) & (masks != IGNORE_INDEX)
    counts = torch.stack([background.sum(), foreground.sum()])
    sides = [_weighted_mean(losses, side, weights) for side in (background, foreground)]
    num_sides = (sum_over_devices(counts) > 0).float().sum()
    return (sides[0] + sides[1]) / num_sides.clamp(min=1)


def bootstrapped_cross_entropy(
    logits: Tensor, masks: Tensor, weights: Tensor | None = None, *, trust: float = 0.8
) -> Tensor:
    """Cross-entropy of which ``1 - trust`` is against the network's own most probable class, for noisy masks.

    Args:
        logits: (B, C, H, W) class scores at the masks' resolution.
        masks: (B, H, W) class indices 0 … K and 255; any integer dtype.
        weights: (B, H, W) in [0, 1] as in ``segmentation_cross_entropy``.
        trust: Share of the mask's label in the target, in [0, 1].

    Returns:
        Scalar, float32; zero with zero gradients when no pixel is labelled.

    Source:
        Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping", ICLR 2015 workshop, §3.3
        (hard bootstrapping, β = 0.8).
    """
    own = torch.where(masks == IGNORE_INDEX, IGNORE_INDEX, logits.argmax(dim=1))
    losses = trust * _pixel_losses(logits, masks) + (1 - trust) * _pixel_losses(logits, own)
    return _weighted_mean(losses, masks != IGNORE_INDEX, weights)


def smoothed_cross_entropy(
    logits: Tensor, masks: Tensor, weights: Tensor | None = None, *, smoothing: float = 0.1
) -> Tensor:
    """Cross-entropy against targets of which ``smoothing`` is spread evenly over all classes.

    Args:
        logits: (B, C, H, W) class scores at the masks' resolution.
        masks: (B, H, W) class indices 0 … K and 255; any integer dtype.
        weights: (B, H, W) in [0, 1] as in ``segmentation_cross_entropy``.
        smoothing: In [0, 1).

    Returns:
        Scalar, float32; zero with zero gradients when no pixel is labelled.

    Source:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, §7.
    """
    losses = _pixel_losses(logits, masks, smoothing)
    return _weighted_mean(losses, masks != IGNORE_INDEX, weights)


def _weighted_mean(losses: Tensor, counted: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of ``losses`` (B, H, W) over the pixels in ``counted``, by ``weights`` where there are some."""
    if weights is None:
        return (losses * counted).sum() / mean_divisor(counted.sum(), len(losses))
    if weights.shape != losses.shape:
        raise ValueError(f"expected weights {tuple(losses.shape)} as the masks, got {tuple(weights.shape)}")
    share = weights.float() * counted
    return (losses * share).sum() / mean_divisor(share.sum(), len(losses))


def _pixel_losses(logits: Tensor, masks: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every pixel, float32 (B, H, W); 0 where the mask is 255."""
    if logits.ndim != 4 or masks.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"expected logits (B, C, H, W) and masks (B, H, W) of one size, got {tuple(logits.shape)} and "
            f"{tuple(masks.shape)}; upsample the logits to the masks first"
        )
    target = masks.to(torch.int64)
    return functional.cross_entropy(
        logits.float(), target, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing
    )


def object_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean sigmoid cross-entropy over the batch's pixels of 0 and 1; zero with zero gradients where all are 255.

    Args:
        logits: (B, H, W).
        mask: (B, H, W) of 0, 1 and 255.

    Returns:
        Scalar, float32.

    Source:
        SPG (ECCV 2018) §3; wsolevaluation (b5c1e8a) wsol/method/spg.py ``loss_attention``.  Differs: there a batch
        without a known pixel gives NaN.
    """
    known = (mask != IGNORE_INDEX).float()
    losses = functional.binary_cross_entropy_with_logits(logits.float(), mask.float() * known, reduction="none")
    return (losses * known).sum() / mean_divisor(known.sum(), len(mask))
