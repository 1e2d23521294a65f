"""Draw the embedded benchmark and write it in VOC's layout.

Writes: one JPEG, one palette PNG and one annotation XML per picture, and the lists.  Colours are floats in 0-255 until
the end.
Shapes: S the picture's side; u v pixels along and across an object's axis, p q the same in units of its half length.
Lengths are stated for a side of 96 px and scale with it, so that a larger picture shows the same scene.
"""

from __future__ import annotations

import colorsys
import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import ClassList, is_journalled, note_files, read_json, voc_palette, write_atomic, write_json
from stages.data.adapters.synthetic import (
    GENERATOR_VERSION,
    LISTS,
    Split,
    SyntheticConfig,
    image_generator,
    image_id,
    image_labels,
    val_group,
)
from stages.errors import DataError

Floats = NDArray[np.floating]
Mask = NDArray[np.bool_]

_REFERENCE_PX = 96
_NOISE_LEVELS = 6.0
_HEAD_AT = 0.75  # along the axis, in half lengths
_TEXTURE_RADIANS = (0.35, 0.60, 0.95)  # per pixel at 96 px: periods of 18, 10.5 and 6.6 px
_CONTEXT_COLOUR = (70.0, 120.0, 165.0)


# Bodies: negative inside, as a function of p and q.  A shape says nothing of the class.
_BODIES: tuple[Callable[[Floats, Floats], Floats], ...] = (
    lambda p, q: p**2 + (q / 0.55) ** 2 - 1,  # ellipse
    lambda p, q: (p**2) ** 2 + ((q / 0.50) ** 2) ** 2 - 1,  # rounded box
    lambda p, q: p**2 + (q / (0.56 - 0.22 * p)) ** 2 - 1,  # pear, thin towards the head
    lambda p, q: p**2 + ((q - _bend(p)) / 0.48) ** 2 - 1,  # bean
    lambda p, q: np.hypot(p, q / 0.55) - 1 - 0.14 * np.sin(3 * np.arctan2(q, p)),  # lobed
)
_BEAN = 3


def _bend(p: Floats | float) -> Floats | float:
    """Where the bean's axis runs: bent to one side at both ends."""
    return 0.45 * p**2 - 0.15


@dataclass(frozen=True)
class _Object:
    """One object in its place."""

    label: int
    length_px: float
    """Half length of the body."""
    u: Floats
    v: Floats
    body: Mask
    head: Mask
    eye: Mask

    @property
    def whole(self) -> Mask:
        """Every pixel of the object, hidden or not."""
        return self.body | self.head


def draw_picture(config: SyntheticConfig, split: Split, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one picture.

    Returns:
        RGB pixels, uint8 (S, S, 3), and class indices, uint8 (S, S).
    """
    labels, is_context = image_labels(config, split, index)
    rng = image_generator(config, split, index, purpose=1)
    picture = _context(config, rng) if is_context else _background(config, rng)
    mask = np.zeros((config.size_px, config.size_px), dtype=np.uint8)
    for item in _place(config, labels, rng):
        _paint(config, item, picture, rng)
        mask[item.whole] = ClassList.class_index(item.label)
    return np.clip(picture, 0, 255).astype(np.uint8), mask


def _unit(config: SyntheticConfig) -> float:
    """Pixels per pixel of the 96-px reference."""
    return config.size_px / _REFERENCE_PX


def _noise(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return _NOISE_LEVELS * rng.standard_normal(shape, dtype=np.float32)


def _background(config: SyntheticConfig, rng: np.random.Generator) -> NDArray[np.float32]:
    """An ordinary background: one colour, soft clouds, pixel noise; no class has a part in it."""
    from scipy.ndimage import gaussian_filter

    size = config.size_px
    base = rng.uniform(70, 180, 3)
    clouds = gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), rng.uniform(2, 8) * _unit(config))
    clouds *= 25 / (clouds.std() + 1e-6)
    picture = base + clouds[..., None] * rng.uniform(0.4, 1.0, 3)
    return picture.astype(np.float32) + _noise(rng, size, size, 3)


def _context(config: SyntheticConfig, rng: np.random.Generator) -> NDArray[np.float32]:
    """The biased class's own background: blue waves."""
    size, unit = config.size_px, _unit(config)
    y, x = np.mgrid[:size, :size].astype(np.float32) / unit
    waves = 24 * np.sin(0.5 * y + 1.5 * np.sin(0.12 * x + rng.uniform(0, 2 * np.pi)) + rng.uniform(0, 2 * np.pi))
    picture = np.array(_CONTEXT_COLOUR) + rng.uniform(-8, 8, 3) + waves[..., None]
    return picture.astype(np.float32) + _noise(rng, size, size, 3)


def _place(config: SyntheticConfig, labels: tuple[int, ...], rng: np.random.Generator) -> list[_Object]:
    """Put the objects in, later ones in front, so that of every earlier one enough can still be seen.

    Each new object is tried at up to 40 places, a little smaller each time; the first that leaves every earlier body
    half and every earlier head 70 % visible is taken, else the one that leaves most.
    """
    placed: list[_Object] = []
    for label in labels:
        best, most = _try_object(config, label, rng, shrink=1.0), -1.0
        for attempt in range(40 if placed else 0):
            candidate = _try_object(config, label, rng, shrink=0.96**attempt)
            visible = _least_visible(placed, candidate)
            if visible > most:
                best, most = candidate, visible
            if visible >= 1:
                break
        placed.append(best)
    return placed


def _least_visible(placed: list[_Object], front: _Object) -> float:
    """The worst of the earlier objects' visible shares over what is asked of them (≥ 1: good enough)."""
    worst = 1.0
    covered = front.whole
    for position, item in enumerate(placed):
        for later in placed[position + 1 :]:
            covered = covered | later.whole
        for part, wanted in ((item.whole, 0.5), (item.head, 0.7)):
            visible = float((part & ~covered).sum()) / max(1, int(part.sum()))
            worst = min(worst, visible / wanted)
        covered = front.whole
    return worst


def _try_object(config: SyntheticConfig, label: int, rng: np.random.Generator, shrink: float) -> _Object:
    size = config.size_px
    length = shrink * rng.uniform(0.22, 0.38) * size
    centre_y, centre_x = rng.uniform(0.8 * length, size - 0.8 * length, 2)
    angle = rng.uniform(0, 2 * np.pi)
    shape = int(rng.integers(len(_BODIES)))
    y, x = np.mgrid[:size, :size].astype(np.float32)
    y, x = y - centre_y, x - centre_x
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    p, q = u / length, v / length
    head_q = _bend(_HEAD_AT) if shape == _BEAN else 0.0
    to_head = np.hypot(p - _HEAD_AT, q - head_q)
    to_eye = np.hypot(p - _HEAD_AT - 0.3 * config.head_ratio, q - head_q - 0.3 * config.head_ratio)
    return _Object(
        label=label,
        length_px=length,
        u=u,
        v=v,
        body=_BODIES[shape](p, q) < 0,
        head=to_head < config.head_ratio,
        eye=to_eye < 0.25 * config.head_ratio,
    )


def _paint(config: SyntheticConfig, item: _Object, picture: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Body first: a greyish colour of any class with the class's faint texture; then the head in the class's colour."""
    colour = rng.uniform(80, 170) + rng.uniform(-15, 15, 3)
    texture = config.body_contrast * _texture(config, item, rng.uniform(0, 2 * np.pi))[item.body]
    picture[item.body] = colour + texture[:, None] + _noise(rng, int(item.body.sum()), 3)
    hue = item.label / config.num_classes + rng.uniform(-0.15, 0.15) / config.num_classes
    head = 255 * np.array(colorsys.hsv_to_rgb(hue % 1.0, 0.9, 0.95))
    picture[item.head] = head + _noise(rng, int(item.head.sum()), 3)
    picture[item.eye] = 30 + _noise(rng, int(item.eye.sum()), 3)


def _texture(config: SyntheticConfig, item: _Object, phase: float) -> Floats:
    """The class's texture in [-1, 1]: one of four patterns at one of three frequencies, fixed to the object's axis."""
    rate = _TEXTURE_RADIANS[item.label % 3] / _unit(config)
    pattern = item.label // 3
    if pattern == 0:
        return np.sin(rate * item.u + phase)
    if pattern == 1:
        return np.sin(rate * item.v + phase)
    if pattern == 2:
        return np.sin(rate * item.u + phase) * np.sin(rate * item.v + phase)
    return np.sin(rate * np.hypot(item.u, item.v) + phase)


def write_picture(config: SyntheticConfig, split: Split, index: int, out: Path) -> None:
    """Write one picture's JPEG, mask and annotation below ``out``, whose folders exist.

    Neither atomically nor synced one by one, which would take long beside the drawing: a stopped run draws all of them
    anew.
    """
    name = image_id(split, index)
    picture, mask = draw_picture(config, split, index)
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(picture).save(jpeg, format="JPEG", quality=95, subsampling=0)
    image = Image.fromarray(mask)
    image.putpalette(_palette())
    image.save(png, format="PNG")
    files = {
        out / "JPEGImages" / f"{name}.jpg": jpeg.getvalue(),
        out / "SegmentationClass" / f"{name}.png": png.getvalue(),
        out / "Annotations" / f"{name}.xml": _annotation(config, name, mask).encode(),
    }
    note_files({path: [data] for path, data in files.items()})
    for path, data in files.items():
        path.write_bytes(data)


@cache
def _palette() -> bytes:
    """VOC's colours, made once and not for every picture."""
    return voc_palette().tobytes()


def _annotation(config: SyntheticConfig, name: str, mask: NDArray[np.uint8]) -> str:
    """VOC's XML: size, and each object's class and box of visible pixels (1-based, as VOC's are)."""
    text = io.StringIO()
    size = config.size_px
    text.write(f"<annotation>\n<folder>synthetic</folder>\n<filename>{name}.jpg</filename>\n")
    text.write(f"<size><width>{size}</width><height>{size}</height><depth>3</depth></size>\n<segmented>1</segmented>\n")
    for value in np.unique(mask[mask > 0]).tolist():
        rows, columns = np.nonzero(mask == value)
        text.write(f"<object><name>{escape(config.class_names[value - 1])}</name>")
        text.write(f"<bndbox><xmin>{columns.min() + 1}</xmin><ymin>{rows.min() + 1}</ymin>")
        text.write(f"<xmax>{columns.max() + 1}</xmax><ymax>{rows.max() + 1}</ymax></bndbox></object>\n")
    text.write("</annotation>\n")
    return text.getvalue()


def generate_synthetic(config: SyntheticConfig, out: Path) -> None:
    """Draw the data set below ``out`` in VOC's layout; the same config gives the same bytes on one machine.

    Writes JPEGImages/*.jpg, SegmentationClass/*.png, Annotations/*.xml, labels.csv, ImageSets/Segmentation/{train,
    val}.txt (and val_groups.csv under a context bias), and synthetic.json with the config.  Stopped at any instant
    and called again it ends with the same files.

    Raises:
        DataError: ``out`` holds something else; nothing was written.
    """
    _claim(config, out)
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", LISTS):
        (out / folder).mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["image", "labels"])
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        ids = [image_id(split, index) for index in range(config.num_images(split))]
        for index, name in enumerate(ids):
            write_picture(config, split, index, out)
            labels = sorted(image_labels(config, split, index)[0])
            rows.writerow([name, " ".join(config.class_names[label] for label in labels)])
        write_atomic(out / LISTS / f"{split}.txt", "".join(f"{name}\n" for name in ids).encode())
    write_atomic(out / "labels.csv", table.getvalue().encode())
    if config.context_bias > 0:
        _write_val_groups(config, out / LISTS / "val_groups.csv")


def _claim(config: SyntheticConfig, out: Path) -> None:
    """Put the config into an empty folder, or accept a folder that has the same one or is a stage's own work."""
    marker = out / "synthetic.json"
    wanted = {"generator_version": GENERATOR_VERSION, **config.model_dump(mode="json", exclude={"on_bad_image"})}
    if out.is_dir() and any(not path.name.startswith(".tmp-") for path in out.iterdir()):
        if marker.is_file() and read_json(marker) == wanted:
            return
        if not is_journalled(marker):
            raise DataError(f"{out} is not empty and holds no synthetic set of this config; name a new folder")
    try:
        write_json(marker, wanted)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{out}: is a file or lies below one; name a new folder") from error


def _write_val_groups(config: SyntheticConfig, path: Path) -> None:
    lines = [f"{image_id('val', index)},{val_group(config, index)}\n" for index in range(config.num_val)]
    write_atomic(path, ("image,group\n" + "".join(lines)).encode())
