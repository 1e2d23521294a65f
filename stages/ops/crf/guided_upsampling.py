"""From half resolution back to full: values that follow the edges of the full image, by the fast guided filter.

Reads and writes no file; numpy alone.
Shapes: H W image pixels, h w = H/2 W/2 rounded up, L maps of values.
Source: He and Sun, "Fast Guided Filter", arXiv 1505.00996, 2015; the filter with a colour guide is He, Sun and Tang,
"Guided Image Filtering", PAMI 2013, equations 19 to 21.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def halve(values: NDArray[Any]) -> Floats:
    """Means over blocks of 2 × 2: (…, H, W) to float32 (…, h, w); an odd last row or column is taken twice."""
    odd = [(0, 0)] * (values.ndim - 2) + [(0, size % 2) for size in values.shape[-2:]]
    even = np.pad(values, odd, mode="edge").astype(np.float32)
    rows = even[..., 0::2, :] + even[..., 1::2, :]
    return np.multiply(rows[..., 0::2] + rows[..., 1::2], 0.25, dtype=np.float32)


def double(values: Floats, size: tuple[int, int]) -> Floats:
    """Bilinear interpolation to twice the size, cropped: float32 (…, h, w) to (…, H, W); undoes ``halve`` of a ramp.

    Args:
        values: At half size.
        size: H, W as they went into ``halve``.
    """
    rows = np.swapaxes(_double_last(np.swapaxes(values, -1, -2)), -1, -2)
    return _double_last(rows[..., : size[0], :])[..., : size[1]]


def _double_last(values: Floats) -> Floats:
    """Along the last axis: the new samples lie a quarter of the old ones' distance from them."""
    padded = np.concatenate([values[..., :1], values, values[..., -1:]], axis=-1)
    near, far = np.float32(0.75), np.float32(0.25)
    doubled = np.empty((*values.shape[:-1], 2 * values.shape[-1]), dtype=np.float32)
    doubled[..., 0::2] = near * values + far * padded[..., :-2]
    doubled[..., 1::2] = near * values + far * padded[..., 2:]
    return doubled


def _box_mean(values: Floats, radius_px: int) -> Floats:
    """Mean over windows of 2·radius + 1 rows and columns; the border is repeated outwards."""
    for axis in (-2, -1):
        border = [(0, 0)] * values.ndim
        border[axis] = (radius_px, radius_px)
        padded = np.moveaxis(np.pad(values, border, mode="edge"), axis, 0)
        count = values.shape[axis]
        total = padded[:count].copy()
        for start in range(1, 2 * radius_px + 1):
            total += padded[start : start + count]
        values = np.moveaxis(total * np.float32(1 / (2 * radius_px + 1)), 0, axis)
    return values


class GuidedUpsampler:
    """The guide of one image, made once for any number of values."""

    def __init__(self, image: NDArray[np.uint8], *, radius_px: int = 2, epsilon: float = 1e-4) -> None:
        """Prepare the guide.

        Args:
            image: RGB, uint8 (H, W, 3).
            radius_px: Of the windows in which values are taken as linear in the colours, in pixels of half size.
            epsilon: Variance of a colour (of 0 … 1) below which a window is taken as flat: its values stay smooth.
        """
        self._size = image.shape[0], image.shape[1]
        self._radius_px = radius_px
        self._guide = np.moveaxis(image, -1, 0).astype(np.float32) / np.float32(255)
        self._coarse = halve(self._guide)
        self._mean = _box_mean(self._coarse, radius_px)
        self._inverse = self._inverse_covariance(epsilon)

    def _inverse_covariance(self, epsilon: float) -> Floats:
        """Of the colours in each window: (3, 3, h, w)."""
        products = self._coarse[:, None] * self._coarse[None]
        covariance = _box_mean(products, self._radius_px) - self._mean[:, None] * self._mean[None]
        covariance += np.float32(epsilon) * np.eye(3, dtype=np.float32)[:, :, None, None]
        cofactors = np.stack([np.cross(covariance[i - 2], covariance[i - 1], axis=0) for i in range(3)])
        return cofactors / (covariance[0] * cofactors[0]).sum(axis=0)

    def __call__(self, values: Floats) -> Floats:
        """Values float32 (L, h, w) at full size, (L, H, W); their sum over L stays what it was where it is constant."""
        mean = _box_mean(values, self._radius_px)
        covariance = _box_mean(self._coarse * values[:, None], self._radius_px) - self._mean * mean[:, None]
        slope = np.einsum("ijhw,ljhw->lihw", self._inverse, covariance)
        offset = mean - (slope * self._mean).sum(axis=1)
        model = _box_mean(np.concatenate([slope, offset[:, None]], axis=1), self._radius_px)
        model = double(model, self._size)
        return (model[:, :3] * self._guide).sum(axis=1) + model[:, 3]
