"""GAIN's arithmetic: normalise attention, erase what it covers from an image, average over classes and images.

Pure tensor code, no I/O, no config.
Shapes: B images, K foreground classes, P (image, class) pairs, H W image pixels, h w cells of a map.
Source: Li et al., "Tell Me Where to Look: Guided Attention Inference Network", CVPR 2018 (arXiv 1802.10171); Kweon et
al., "Unlocking the Potential of Ordinary Classifier: Class-Specific Adversarial Erasing Framework for Weakly Supervised
Semantic Segmentation", ICCV 2021 (OC-CSE).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stages.contracts import IGNORE_INDEX, ClassList
from stages.ops.cells import CellGrid, pixels_to_cells

EPSILON = 1e-6
"""Keeps a map without any evidence at zero instead of NaN."""

Norm = Literal["max", "minmax"]
NormGradient = Literal["detached", "full"]


def normalise_maps(maps: Tensor, norm: Norm, gradient: NormGradient) -> Tensor:
    """Bring each map to [0, 1] by its own peak, or by its own smallest and largest value.

    Args:
        maps: (P, H, W) ≥ 0.
        norm: ``max`` divides by the peak; ``minmax`` first takes the smallest value off.
        gradient: ``detached`` holds both values constant in the backward pass; ``full`` differentiates through them,
            so that a common factor of the features changes nothing and has no gradient.

    Returns:
        (P, H, W); a map without evidence stays zero.

    Source:
        GAIN gives no normalisation, and raw Grad-CAM has any scale.  Per map and min-max is that of two public
        re-implementations (alokwhitewolf cd1cb0a, ilyak93 d67855b), of which the first detaches the denominators.
    """
    high = maps.amax(dim=(1, 2), keepdim=True)
    low = maps.amin(dim=(1, 2), keepdim=True) if norm == "minmax" else torch.zeros_like(high)
    if gradient == "detached":
        high, low = high.detach(), low.detach()
    return (maps - low) / (high - low + EPSILON)


def soft_mask(attention: Tensor, *, sigma: float, omega: float) -> Tensor:
    """T(A) = sigmoid(ω (A - σ)): near 1 where the attention is above σ; same shape.

    Source:
        GAIN eq. 4.
    """
    return torch.sigmoid(omega * (attention - sigma))


def erase(images: Tensor, mask: Tensor) -> Tensor:
    """I* = I - T(A) ⊙ I: the image with what is attended taken out.

    Args:
        images: (P, 3, H, W), normalised: zero is the mean colour, which is what an erased pixel becomes.
        mask: (P, H, W) in [0, 1].

    Source:
        GAIN eq. 3.
    """
    return images * (1 - mask)[:, None].to(images.dtype)


def mean_over_images(values: Tensor, image: Tensor, num_images: int) -> Tensor:
    """Mean over the batch's images of the mean over an image's pairs, so that rich images weigh no more.

    Args:
        values: (P,) one value a pair.
        image: (P,) image of each pair.
        num_images: B; an image without pairs counts as 0.

    Returns:
        Scalar; zero with zero gradients where there is no pair.

    Source:
        GAIN eq. 5: L_am = 1/n Σ_c s^c(I*c), and eq. 7, of one image; its batch is one image.
    """
    counts = torch.bincount(image, minlength=num_images).to(values.dtype)
    return (values / counts[image]).sum() / num_images


def class_pixels(masks: Tensor, image: Tensor, label: Tensor) -> Tensor:
    """How many pixels of each pair's mask are of its class, (P,).

    Args:
        masks: (B, H, W) class indices and 255.
        image: (P,).
        label: (P,) label indices.
    """
    return (masks[image] == _class_indices(label)).sum(dim=(1, 2))


def pixel_targets(
    masks: Tensor, image: Tensor, label: Tensor, size: tuple[int, int], cells: CellGrid
) -> tuple[Tensor, Tensor]:
    """True masks on the grid of the maps: in each cell the share of its known pixels that are of the class.

    Args:
        masks: (B, H, W) class indices and 255.
        image: (P,) image of each pair.
        label: (P,) label index of each pair.
        size: (h, w).
        cells: Where these cells look.

    Returns:
        H^c (P, h, w) in [0, 1], and whether the cell has any known pixel, float 0/1 (P, h, w).
    """
    chosen = masks[image]
    known = pixels_to_cells(chosen != IGNORE_INDEX, size, cells)
    share = pixels_to_cells(chosen == _class_indices(label), size, cells)
    return share / known.clamp(min=EPSILON), (known > 0).float()


def _class_indices(label: Tensor) -> Tensor:
    """Label indices (P,) as mask values (P, 1, 1)."""
    values = [ClassList.class_index(value) for value in label.tolist()]
    return torch.tensor(values, device=label.device, dtype=torch.long)[:, None, None]


def squared_error(attention: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Mean of (A - H)² over the known cells of each pair, (P,); zero where no cell is known.

    Source:
        GAIN eq. 7.  Differs: cells without a known pixel are left out.
    """
    error = (attention - target).square() * known
    return error.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp(min=1)
