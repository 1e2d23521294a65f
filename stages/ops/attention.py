"""Turn raw class scores into attention maps: normalise, lay several scales and flips over each other, store as bytes.

Pure tensor code, no I/O, no config.
Shapes: B images, K foreground classes, n maps of one image, h w map cells (H W is always image pixels).

Geometry.  A stored map of h × w cells spans its image evenly: the centre of cell i lies at (i + ½) / h of the image's
height, wherever the network's own cells look and whatever padding was to the right of and below the image.
Source: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016 (the maps); Ahn et al., "Weakly
Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019 (scales and flips).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.contracts import IGNORE_INDEX
from stages.ops.cells import CellGrid, resample_maps


def normalise_attention(scores: Tensor) -> Tensor:
    """Scale each class map to [0, 1] by its own peak.

    Negative evidence is clipped first; a map without positive evidence stays zero, never NaN.

    Args:
        scores: (B, K, h, w) class scores before any activation, unitless.

    Returns:
        Attention (B, K, h, w), 0 = no evidence, 1 = the peak; same device and dtype as ``scores``, differentiable.

    Raises:
        ValueError: ``scores`` is not 4-D.

    Source:
        irn (a2ece00) step/make_cam.py.  Differs: irn divides by max + 1e-5, so that its peaks stay below 1 and weak
        maps are damped; here a map is divided by its peak exactly, or stays zero.
    """
    if scores.ndim != 4:
        raise ValueError(f"scores must have shape (B, K, h, w), got {tuple(scores.shape)}; add the batch dimension")
    evidence = scores.relu()
    peaks = evidence.amax(dim=(2, 3), keepdim=True)
    return torch.where(peaks > 0, evidence / torch.where(peaks > 0, peaks, 1.0), 0.0)


def map_size(image_size: tuple[int, int], map_stride: int) -> tuple[int, int]:
    """(h, w) of the stored maps of an image: its size in pixels divided by ``map_stride``, rounded up."""
    return (-(-image_size[0] // map_stride), -(-image_size[1] // map_stride))


class MapMean:
    """Mean of the maps of one image over scales and flips, on evenly spread cells of the stored resolution.

    Memory stays that of one map.

    Source:
        irn (a2ece00) step/make_cam.py: the sum over scales and flips of the ReLU'd maps.  Differs: the mean, so that
        the stored peaks do not depend on the number of scales; divided by the maximum both give the same map.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        """Start empty for maps of ``size`` cells."""
        self.size = size
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, maps: Tensor, *, image_size: tuple[int, int], cells: CellGrid, is_flipped: bool = False) -> None:
        """Add one network input's maps (n, h, w) ≥ 0; the other arguments as in ``resample_maps``."""
        resampled = resample_maps(maps, size=self.size, image_size=image_size, cells=cells, is_flipped=is_flipped)
        self._sum = resampled if self._sum is None else self._sum + resampled
        self._count += 1

    def mean(self) -> Tensor:
        """The mean so far, float32 (n, *size).

        Raises:
            ValueError: nothing was added.
        """
        if self._sum is None:
            raise ValueError("no maps were added; call add() at least once before mean()")
        return self._sum / self._count


def quantise_attention(maps: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Divide each map by its own peak and round to 256 steps.

    Args:
        maps: (n, h, w) attention ≥ 0, unnormalised.

    Returns:
        uint8 (n, h, w) with 255 at each map's peak, all zero where a map has no positive value; the peaks, float32
        (n,).

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not np.isfinite(maps).all():
        raise ValueError("attention maps must be finite, found NaN or infinity")
    evidence = np.maximum(maps.astype(np.float32), 0)
    peaks = evidence.max(axis=(1, 2), initial=0.0)
    scaled = evidence / np.where(peaks > 0, peaks, 1.0)[:, None, None]
    return np.rint(scaled * 255).astype(np.uint8), peaks.astype(np.float32)


def minmax_attention(scores: Tensor) -> Tensor:
    """Scale each class map to [0, 1] by its own smallest and largest value; a constant map becomes zero, never NaN.

    Args:
        scores: (B, K, h, w) class scores of any sign.

    Source:
        wsolevaluation (b5c1e8a) wsol/method/util.py ``normalize_tensor``, which ACoL and SPG normalise with.
    """
    low, high = scores.amin(dim=(2, 3), keepdim=True), scores.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (scores - low) / torch.where(high > low, high - low, 1.0), 0.0)


def labelled_attention(scores: Tensor, labels: Tensor) -> Tensor:
    """The largest value of the min-max normalised maps of an image's classes, cell by cell.

    Args:
        scores: (B, K, h, w).
        labels: (B, K), above 0 for the image's classes.

    Returns:
        (B, 1, h, w) in [0, 1]; zero for an image without a class.
    """
    present = (labels > 0)[:, :, None, None]
    return (minmax_attention(scores) * present).amax(dim=1, keepdim=True)


def fuse_maps(first: Tensor, second: Tensor) -> Tensor:
    """The cell-wise larger of two classifiers' maps, each divided by its peak, on the mean scale of the two.

    Args:
        first: (B, K, h, w) class scores.
        second: (B, K, h, w) class scores.

    Returns:
        (B, K, h, w) ≥ 0 whose peak is the mean of both maps' peaks; zero where neither has positive evidence.

    Source:
        ACoL (CVPR 2018) §3.2: the maps are normalised, then the larger is taken, so that a classifier of large scores
        does not drown the other.
        Differs: negative evidence is clipped instead of min-max normalised, and the maps get a scale of the network's
        own back, so that those of several input sizes can be averaged.
    """
    scale = (first.relu().amax(dim=(2, 3), keepdim=True) + second.relu().amax(dim=(2, 3), keepdim=True)) / 2
    return torch.maximum(normalise_attention(first), normalise_attention(second)) * scale


def sure_pixels(
    attention: Tensor, *, high: float, low: float, min_object_px: int = 30, fallback_ratio: float = 0.7
) -> Tensor:
    """1 where the attention is above ``high``, 0 where it is below ``low``, 255 between.

    Args:
        attention: (B, H, W) in [0, 1].
        high: Sure object above.
        low: Sure background below; it has the last word.
        min_object_px: With fewer sure object pixels, an image takes those above ``fallback_ratio`` of its peak.
        fallback_ratio: In [0, 1].

    Returns:
        (B, H, W) of 0, 1 and 255; same dtype.

    Source:
        SPG (ECCV 2018) §3; wsolevaluation (b5c1e8a) wsol/method/spg.py ``get_mask``.
    """
    found = attention > high
    few = found.sum(dim=(1, 2), keepdim=True) < min_object_px
    brightest = attention > fallback_ratio * attention.amax(dim=(1, 2), keepdim=True)
    mask = torch.where(torch.where(few, brightest, found), 1.0, float(IGNORE_INDEX))
    return torch.where(attention < low, 0.0, mask).to(attention.dtype)
