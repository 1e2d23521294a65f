"""The colours of the pages: palettes of mask values, the heat of attention, and how readers see them.

Files keep VOC's palette; pages take ``safe`` unless somebody asks for VOC's.  Pure.
Shapes: N colours; colours are sRGB.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.contracts import IGNORE_INDEX, voc_palette

PaletteName = Literal["safe", "voc"]
Palette = NDArray[np.uint8]
"""(256, 3): the colour of each mask value."""

Vision = Literal["normal", "protanopia", "deuteranopia"]
_SEEN: dict[Vision, NDArray[np.float64]] = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
"""Linear RGB as a reader without one kind of cone sees it.

Source: Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency",
IEEE TVCG 2009, table 1, severity 1.0.
"""

_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
"""Linear sRGB in CIE XYZ (IEC 61966-2-1); white is the sum of each row."""

_FIRST = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""Okabe and Ito's "Color Universal Design" (2008) without its black, which shadows have as well."""
_VOID = (255, 255, 255)
"""That of the hatching."""

VIRIDIS = np.array(
    [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
     (170, 220, 50), (253, 231, 37)],
    dtype=np.float32,
)  # fmt: skip
"""Nine even samples of viridis: lightness rises evenly, so that grey print and colour-blind readers keep the order.

Source: N. Smith and S. van der Walt, matplotlib 2015.
"""

ERRORS = {"missed": (255, 255, 255), "found where nothing is": (0, 0, 0), "taken for another class": (255, 176, 0)}
"""What can be wrong with a pixel, and its colour on the grey error map: for every reader, and none of a class."""


def find_palette(name: PaletteName) -> Palette:
    """VOC's palette, or ours that readers with red-green blindness can tell apart."""
    return voc_palette() if name == "voc" else safe_palette()


@cache
def safe_palette() -> Palette:
    """The colours of 254 classes, read-only; each keeps as far as it can from all before it, as three readers see them.

    The first seven are Okabe and Ito's.  Each next one is the colour of a coarse grid, neither nearly grey nor nearly
    black or white, whose smallest distance (CIE 1976, over ``Vision``) to those before is the largest.  No palette of
    twenty is easy for everybody: names stand beside the pictures.
    """
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness, *tint = _lab(grid, "normal").T
    grid = grid[(lightness > 30) & (lightness < 92) & (np.hypot(*tint) > 25)]
    chosen = [np.array(_VOID, np.uint8), *np.array(_FIRST, np.uint8)]
    views = [_lab(grid, vision) for vision in _SEEN]
    nearest = np.full(len(grid), np.inf)
    for number in range(IGNORE_INDEX):
        if number == len(chosen):
            chosen.append(grid[int(np.argmax(nearest))])
        for view, vision in zip(views, _SEEN, strict=True):
            nearest = np.minimum(nearest, np.linalg.norm(view - _lab(chosen[number][None], vision), axis=1))
    palette = np.array([(0, 0, 0), *chosen[1:], _VOID], np.uint8)
    palette.flags.writeable = False
    return palette


def colour_css(colour: NDArray[np.uint8]) -> str:
    """A colour (3,) as ``#rrggbb``."""
    return f"#{colour.tobytes().hex()}"


def _lab(colours: NDArray[np.uint8], vision: Vision) -> NDArray[np.float64]:
    """CIE L*a*b* (N, 3), D65, of ``colours`` (N, 3) as a reader sees them; a distance of 2 is just noticeable."""
    share = colours / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ _SEEN[vision].T, 0, 1) @ _XYZ.T / _XYZ.sum(axis=1)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
