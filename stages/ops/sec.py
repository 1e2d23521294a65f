"""SEC's three losses: seed, expand, constrain to boundary.

Pure functions on tensors; float32 also under autocast.  Each is a mean over the images of the batch, so that the means
of slices on several devices, weighed by their images, are those of the whole batch.
Shapes: B images, K foreground classes, C = K + 1, h w the network's cells, H W image pixels.
Source: Kolesnikov and Lampert, "Seed, Expand and Constrain: Three Principles for Weakly-Supervised Image Segmentation",
ECCV 2016, §3, and its public code (kolesman/SEC, ``pylayers/pylayers.py``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX
from stages.ops.crf.dense_crf import CrfConfig, open_crf_batch, probability_unary

PROBABILITY_FLOOR = 1e-4
"""No probability falls below it, so that no logarithm is large.  Source: the code, ``min_prob``."""

FOREGROUND_DECAY = 0.996
"""Weight of each next best cell of a present class, of ``DECAY_CELLS``.  Source: §3.2, the code's ``q_fg``."""

BACKGROUND_DECAY = 0.999
"""The same of background, which fills more of an image.  Source: §3.2, the code's ``q_bg``."""

DECAY_CELLS = 41 * 41
"""Cells of an image that the decays are for: those of SEC's network."""


def floored_softmax(logits: Tensor) -> Tensor:
    """Probabilities (B, C, h, w) of logits, floored at ``PROBABILITY_FLOOR`` and brought to sum 1 again."""
    probabilities = torch.softmax(logits.float(), dim=1) + PROBABILITY_FLOOR
    return probabilities / probabilities.sum(dim=1, keepdim=True)


def seeding_loss(probabilities: Tensor, cues: Tensor) -> Tensor:
    """Mean over images of the mean cross-entropy of the cells that are cues.

    Args:
        probabilities: Floored, (B, C, h, w).
        cues: Class indices (B, h, w), 255 where nothing is known; any integer dtype.

    Returns:
        Scalar; an image without cues adds 0.

    Source:
        §3.1, equation 2, as its code divides: foreground and background cells together.
    """
    if cues.shape != (probabilities.shape[0], *probabilities.shape[2:]):
        raise ValueError(f"expected cues of the cells {tuple(probabilities.shape)}, got {tuple(cues.shape)}")
    losses = functional.nll_loss(probabilities.log(), cues.to(torch.int64), ignore_index=IGNORE_INDEX, reduction="none")
    counts = (cues != IGNORE_INDEX).sum(dim=(1, 2)).clamp(min=1)
    return (losses.sum(dim=(1, 2)) / counts).mean()


def expansion_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean over images: present classes fill a part of the image, absent ones no cell, background most of it.

    A present class and background are judged by the weighted mean of their cells in descending order (global weighted
    rank pooling), an absent class by its best cell.

    Args:
        probabilities: Floored, (B, C, h, w).
        labels: (B, K) 1 where the image has the class, 0 where it has not.

    Returns:
        Scalar; an image without labels, or with all, lacks the term that has no class.

    Source:
        §3.2, equations 3 and 4.  Differs: with another number of cells than ``DECAY_CELLS`` the decays are for the same
        part of the image (15 % for classes, 48 % for background), not for as many cells.
    """
    if labels.shape != (probabilities.shape[0], probabilities.shape[1] - 1):
        raise ValueError(
            f"expected labels (B, K) = {(probabilities.shape[0], probabilities.shape[1] - 1)}, got "
            f"{tuple(labels.shape)}"
        )
    is_present = labels > 0.5
    cells = probabilities.flatten(2)
    foreground = _rank_pool(cells[:, 1:], FOREGROUND_DECAY).log()
    absent = torch.log1p(-cells[:, 1:].amax(dim=2))
    background = _rank_pool(cells[:, :1], BACKGROUND_DECAY)[:, 0].log()
    losses = _mean_where(foreground, is_present) + _mean_where(absent, ~is_present) + background
    return -losses.mean()


def _rank_pool(cells: Tensor, decay: float) -> Tensor:
    """Means (B, ·) of (B, ·, cells), of whose order from the largest down ``decay`` weighs ``DECAY_CELLS`` ranks."""
    ranks = torch.arange(cells.shape[2], dtype=torch.float32, device=cells.device)
    weights = decay ** (ranks * (DECAY_CELLS / cells.shape[2]))
    return (cells.sort(dim=2, descending=True).values * weights).sum(dim=2) / weights.sum()


def _mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """Row means (B,) of (B, K) over ``counted``; 0 where a row has none."""
    return (values * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def constrain_loss(probabilities: Tensor, refined: Tensor) -> Tensor:
    """Mean over images and cells of KL(refined ‖ probabilities).

    Args:
        probabilities: Floored, (B, C, h, w).
        refined: The same after a CRF that sees the image (``refine_cells``); learns nothing.

    Returns:
        Scalar ≥ 0, zero where the network agrees with its CRF.

    Source:
        §3.3, equation 6.  Differs: the CRF's answer is a constant here, as in the ports to TensorFlow and PyTorch; the
        paper's Caffe layer also sends the loss' gradient by the refined probabilities, and keeps the quotient of the
        two within 0.05 … 20.
    """
    target = refined.detach()
    return (target * (target.log() - probabilities.log())).sum(dim=1).mean()


def refine_cells(probabilities: Tensor, images: Tensor, config: CrfConfig, *, shrink: float) -> Tensor:
    """The floored probabilities of all classes after a CRF on the images shrunk to the network's cells.

    Args:
        probabilities: Floored, (B, C, h, w).
        images: RGB uint8 (B, H, W, 3) on the same device; shrunk by averaging.
        config: Numbers for an image of H × W.
        shrink: What the widths in pixels are divided by at the cells.

    Returns:
        Floored, float32 (B, C, h, w), on the device of ``probabilities``, without gradient; the probabilities
        themselves where some are NaN, so that the loss is NaN too and the training says so.

    Source:
        The code's CRF layer: 10 iterations on the image at 41 × 41, widths divided by 12 (80 / 12 and 3 / 12).
        Differs: there the image is sampled at the cells instead of averaged.
    """
    own = probabilities.detach().float().cpu().numpy()
    if not np.isfinite(own).all():
        return probabilities.detach().float()
    numbers = config.numbers()
    narrowed = config.model_copy(
        update={
            "bilateral_sxy_px": max(numbers.bilateral_sxy_px / shrink, 0.1),
            "gaussian_sxy_px": max(numbers.gaussian_sxy_px / shrink, 0.1),
        }
    )
    pixels = images.permute(0, 3, 1, 2).float()
    cells = functional.interpolate(pixels, size=probabilities.shape[2:], mode="area").round().to(torch.uint8)
    small = list(cells.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    batch = open_crf_batch(small, [probabilities.shape[1]] * len(small), narrowed, device=str(probabilities.device))
    unaries = [probability_unary(each) for each in own]
    refined = torch.from_numpy(np.stack(batch.infer(unaries, config.iterations))).to(probabilities.device)
    floored = refined + PROBABILITY_FLOOR
    return floored / floored.sum(dim=1, keepdim=True)


def has_class(cues: Tensor, num_foreground: int) -> Tensor:
    """Whether each image's cues hold each class, bool (B, K): what is left of its labels after a crop."""
    classes = torch.arange(num_foreground, device=cues.device) + BACKGROUND_INDEX + 1
    return (cues.flatten(1)[:, None, :] == classes[None, :, None]).any(dim=2)
