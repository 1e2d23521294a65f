"""Turn images, attention maps and masks into pictures for people: heat overlays, palette masks, a grid as one PNG.

Presentation only: nothing here enters a score.  Reads arrays, writes data URIs and one PNG.
Shapes: H W image pixels, h w map cells, n labels of one image.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stages.contracts import AttentionRecord, voc_palette, write_atomic

JPEG_QUALITY = 84
PALETTE = voc_palette()
HEAT_COLOURS = np.array(
    [(48, 18, 59), (70, 107, 227), (40, 188, 235), (50, 242, 152), (164, 252, 60), (238, 207, 58), (251, 126, 33),
     (208, 47, 5), (122, 4, 3)],
    dtype=np.float32,
)  # fmt: skip
"""Nine even samples of the Turbo colour map.

Source: A. Mikhailov, "Turbo, An Improved Rainbow Colormap", 2019.
"""


def overlay_heat(image: NDArray[np.uint8], record: AttentionRecord) -> NDArray[np.uint8]:
    """Lay the strongest attention of any label over a grey copy of the image.

    Args:
        image: RGB (H, W, 3).
        record: The n maps of the image; their maximum is drawn, cold without evidence and red at each map's peak.

    Returns:
        RGB (H, W, 3); where there is no evidence the grey image shows through.
    """
    height, width = image.shape[:2]
    strongest = record.maps.max(axis=0) if len(record.maps) else np.zeros((1, 1), dtype=np.uint8)
    resized = Image.fromarray(strongest).resize((width, height), Image.Resampling.BILINEAR)  # PIL wants (W, H)
    heat = np.asarray(resized, dtype=np.float32)[..., None] / 255.0
    stops = np.linspace(0.0, 1.0, len(HEAT_COLOURS))
    colour = np.concatenate([np.interp(heat, stops, HEAT_COLOURS[:, channel]) for channel in range(3)], axis=-1)
    grey = image.astype(np.float32).mean(axis=-1, keepdims=True)
    opacity = 0.35 + 0.4 * heat
    return np.clip(grey * (1.0 - opacity) + colour * opacity, 0, 255).astype(np.uint8)


def colour_mask(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Class indices (H, W) in VOC's colours, RGB (H, W, 3)."""
    return PALETTE[mask]


def shrink(picture: Image.Image, longest_px: int, *, smooth: bool) -> Image.Image:
    """Make the longer side at most ``longest_px``; never enlarge. Masks are resized by nearest neighbour."""
    factor = longest_px / max(picture.size)
    if factor >= 1.0:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def photo_uri(image: NDArray[np.uint8], longest_px: int) -> str:
    """RGB (H, W, 3) as a JPEG data URI."""
    return _data_uri(shrink(Image.fromarray(image), longest_px, smooth=True), "jpeg", quality=JPEG_QUALITY)


def mask_uri(mask: NDArray[np.uint8], longest_px: int) -> str:
    """Class indices (H, W) as a palette PNG data URI: small, and in exactly the legend's colours."""
    picture = shrink(Image.fromarray(mask), longest_px, smooth=False)
    picture.putpalette(PALETTE.tobytes())
    return _data_uri(picture, "png", optimize=True)


def colour_css(class_index: int) -> str:
    """The palette's colour of a mask value as ``#rrggbb``."""
    red, green, blue = PALETTE[class_index % len(PALETTE)].tolist()
    return f"#{red:02x}{green:02x}{blue:02x}"


def _data_uri(picture: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


# ---------------------------------------------------------------------------------------------------------------------
# One PNG
# ---------------------------------------------------------------------------------------------------------------------

GAP_PX = 6
TITLE_PX = 24
PAPER = (255, 255, 255)
INK = (36, 41, 47)

Block = tuple[Sequence[str], Sequence[Sequence[NDArray[np.uint8] | None]]]
"""Column titles, and rows with one picture for each title: RGB (H, W, 3), or class indices (H, W), or nothing."""


def draw_grid(blocks: Sequence[Block], legend: Mapping[str, int], tile_px: int = 128) -> Image.Image:
    """Draw blocks of picture rows side by side, titles above the columns and the class colours below.

    Args:
        blocks: Groups of columns, separated by a wide gap; missing rows at a block's end stay paper.
        legend: Mask value of each class name.
        tile_px: Side of the square that each picture is fitted into.

    Returns:
        RGB picture.
    """
    num_columns = sum(len(titles) for titles, _ in blocks)
    num_rows = max(len(rows) for _, rows in blocks)
    width = num_columns * (tile_px + GAP_PX) + GAP_PX + 2 * GAP_PX * (len(blocks) - 1)
    top = TITLE_PX + num_rows * (tile_px + GAP_PX)
    entries = _place_legend(legend, width)
    canvas = Image.new("RGB", (width, top + entries[-1][1] + TITLE_PX if entries else top), PAPER)
    draw = ImageDraw.Draw(canvas)
    left = GAP_PX
    for titles, rows in blocks:
        for column, title in enumerate(titles):
            x = left + column * (tile_px + GAP_PX)
            draw.text((x + tile_px / 2, TITLE_PX / 2), title, fill=INK, font=_font(), anchor="mm")
            for row, pictures in enumerate(rows):
                picture = pictures[column]
                if picture is not None:
                    _paste(canvas, picture, x, TITLE_PX + row * (tile_px + GAP_PX), tile_px)
        left += len(titles) * (tile_px + GAP_PX) + 2 * GAP_PX
    for (name, class_index), (x, y) in zip(legend.items(), entries, strict=True):
        colour = tuple(PALETTE[class_index % len(PALETTE)].tolist())
        draw.rectangle((x, top + y + 6, x + 12, top + y + 18), fill=colour, outline=INK)
        draw.text((x + 18, top + y + TITLE_PX / 2), name, fill=INK, font=_font(), anchor="lm")
    return canvas


def write_png(picture: Image.Image, path: Path) -> Path:
    """Write ``picture`` as PNG, atomically."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_atomic(path, buffer.getvalue())
    return path


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13)


def _place_legend(legend: Mapping[str, int], width: int) -> list[tuple[int, int]]:
    """(x, y) of each entry under the tiles, wrapped at ``width``."""
    places: list[tuple[int, int]] = []
    x, y = GAP_PX, 0
    for name in legend:
        entry_px = 18 + round(_font().getlength(name)) + 14
        if x > GAP_PX and x + entry_px > width:
            x, y = GAP_PX, y + TITLE_PX
        places.append((x, y))
        x += entry_px
    return places


def _paste(canvas: Image.Image, picture: NDArray[np.uint8], x: int, y: int, tile_px: int) -> None:
    """Fit ``picture`` into the tile at (x, y), centred; masks are coloured and never blurred."""
    is_mask = picture.ndim == 2
    tile = Image.fromarray(colour_mask(picture) if is_mask else picture)
    factor = tile_px / max(tile.size)
    size = (max(1, round(tile.width * factor)), max(1, round(tile.height * factor)))
    tile = tile.resize(size, Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS)
    canvas.paste(tile, (x + (tile_px - size[0]) // 2, y + (tile_px - size[1]) // 2))
