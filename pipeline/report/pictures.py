"""The pictures of a run: which images are shown, heat overlays and palette masks, and all of them in one PNG.

Reads: the image set, attention shards, ``masks/<id>.png`` and ``steps/*/<id>.png``, ``predictions/<id>.png`` and
``confusions.npz``.  Presentation only: nothing here enters a score.
Images are chosen by score alone: training images evenly spaced from the best to the worst pseudo-mask, validation
images the best and the worst; so a page never shows only what went well.
Shapes: H W image pixels, h w map cells, n labels of one image.
"""

from __future__ import annotations

import base64
import io
import math
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.report.tables import step_label
from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    AttentionRecord,
    ClassList,
    ImageRecord,
    ImageSet,
    iter_attention,
    open_image_set,
    read_index_mask,
    voc_palette,
    write_atomic,
)
from stages.errors import WsssError
from stages.masks.mask_files import read_steps
from stages.ops.metrics.confusion import SparseConfusions, read_confusions

NUM_TRAINING_EXAMPLES = 8
NUM_SCORED_EXAMPLES = 6
PICTURE_PX = 240
"""Longest side of a picture on the page; keeps a report of 500-pixel photos under 2 MB."""
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


@dataclass(frozen=True)
class Example:
    """One image with everything that the run made of it; None where there is no such thing."""

    id: str
    image: NDArray[np.uint8]
    """RGB (H, W, 3)."""
    classes: tuple[int, ...]
    """Class indices (1 … K) in the truth, or of the labels where there is no truth."""
    miou: float | None = None
    """Mean IoU over the classes in this image's truth or result."""
    heat: NDArray[np.uint8] | None = None
    """The attention laid over the image, RGB (H, W, 3)."""
    steps: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """The masks between the steps to the pseudo-mask, by step in order."""
    pseudo_mask: NDArray[np.uint8] | None = None
    prediction: NDArray[np.uint8] | None = None
    truth: NDArray[np.uint8] | None = None


def load_confusions(artifacts: Mapping[str, Path]) -> dict[str, SparseConfusions]:
    """The counts of everything that evaluate scored, by name; empty where it did not run."""
    path = artifacts["evaluate"] / "confusions.npz" if "evaluate" in artifacts else None
    return read_confusions(path) if path is not None and path.is_file() else {}


def score_images(confusions: Mapping[str, SparseConfusions], thing: str) -> dict[str, float]:
    """Mean IoU of each image alone, by id; without images that have no counted pixel, empty where nothing counted."""
    scores = confusions[thing].mean_iou_by_image() if thing in confusions else {}
    return {image_id: score for image_id, score in scores.items() if math.isfinite(score)}


def load_training_examples(
    images: ImageSet, artifacts: Mapping[str, Path], scores: Mapping[str, float], count: int
) -> list[Example]:
    """Load ``count`` training images from the best to the worst pseudo-mask by ``scores`` (id to mean IoU).

    They are evenly spaced by rank; where there are no scores, in the list.
    """
    records: Sequence[ImageRecord] = images.index.split("train_score") or images.index.split("train")
    if scores:
        records = sorted((r for r in records if r.id in scores), key=lambda r: (-scores[r.id], r.id))
    chosen, masks = _spread(records, count), artifacts.get("make_masks")
    attention = find_attention(artifacts.get("make_attention"), [record.id for record in chosen])
    return [_load(images, r, scores, attention=attention.get(r.id), masks=masks) for r in chosen]


def load_scored_examples(
    images: ImageSet, evaluate: Path, scores: Mapping[str, float], count: int
) -> tuple[list[Example], list[Example]]:
    """Load the ``count`` best and the ``count`` worst predictions by ``scores`` (id to mean IoU); none is in both.

    Where there are no scores, the first list holds evenly spaced images of val, or else of test; the second none.
    """
    ranked = sorted(scores, key=lambda image_id: (-scores[image_id], image_id))
    best = [images.index.record(image_id) for image_id in ranked[:count]]
    worst = [images.index.record(image_id) for image_id in ranked[len(best) :][-count:][::-1]]
    if not scores:
        best = _spread(images.index.split("val") or images.index.split("test"), count)
    good, bad = ([_load(images, record, scores, predictions=evaluate) for record in part] for part in (best, worst))
    return good, bad


def find_attention(folder: Path | None, ids: Collection[str]) -> dict[str, AttentionRecord]:
    """The attention of ``ids`` by id; empty where nothing was made."""
    return {} if folder is None else {record.id: record for record in iter_attention(folder, ids)}


def _spread(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """At most ``count`` evenly spaced ones, the first and the last among them."""
    return [records[round(place)] for place in np.linspace(0, len(records) - 1, min(count, len(records)))]


def _load(
    images: ImageSet,
    record: ImageRecord,
    scores: Mapping[str, float],
    *,
    attention: AttentionRecord | None = None,
    masks: Path | None = None,
    predictions: Path | None = None,
) -> Example:
    def read(folder: Path | None, kind: str) -> NDArray[np.uint8] | None:
        path = None if folder is None else folder / kind / f"{record.id}.png"
        return read_index_mask(path) if path is not None and path.is_file() else None

    truth = images.read_mask(record) if record.mask is not None else None
    if truth is None:
        classes = tuple(ClassList.class_index(label) for label in record.labels or ())
    else:
        classes = tuple(v for v in np.unique(truth).tolist() if v not in (BACKGROUND_INDEX, IGNORE_INDEX))
    image = images.read_image(record)
    return Example(
        id=record.id,
        image=image,
        classes=classes,
        miou=scores.get(record.id),
        heat=None if attention is None else overlay_heat(image, attention),
        steps={} if masks is None else read_steps(masks, record.id),
        pseudo_mask=read(masks, "masks"),
        prediction=read(predictions, "predictions"),
        truth=truth,
    )


def show_examples(
    images: ImageSet | None,
    artifacts: Mapping[str, Path],
    confusions: Mapping[str, SparseConfusions],
    predictions: str = "segmenter",
) -> dict[str, Mapping[str, Any]]:
    """The three picture sections; a data root that has moved since the run costs the pictures, not the page.

    ``predictions`` is the score of the predictions that are shown (``EvaluateConfig.written_score``).
    """
    missing = {"training": "this run made no attention maps or pseudo-masks."}
    missing |= {"best": "this run has not evaluated a segmenter.", "worst": ""}
    shown: dict[str, Mapping[str, Any]] = {}
    try:
        if images and "make_attention" in artifacts:
            scores = score_images(confusions, "masks")
            found = load_training_examples(images, artifacts, scores, NUM_TRAINING_EXAMPLES)
            shown["training"] = _show(found, images.index.classes)
        if images and "evaluate" in artifacts:
            scores = score_images(confusions, predictions)
            good, bad = load_scored_examples(images, artifacts["evaluate"], scores, NUM_SCORED_EXAMPLES)
            shown |= {"best": _show(good, images.index.classes), "worst": _show(bad, images.index.classes)}
    except (WsssError, zipfile.BadZipFile) as error:
        shown, why = {}, f"the pictures could not be read: {error}"
        missing |= {"training": why, "best": why}
    return {part: {"examples": (), "scored": False, "missing": why} for part, why in missing.items()} | shown


def _show(examples: Sequence[Example], classes: ClassList) -> Mapping[str, Any]:
    names, shown = classes.names_with_background, []
    for example in examples:
        pictures = {
            "image": example.image,
            "attention": example.heat,
            **{step_label(name): mask for name, mask in example.steps.items()},
            "pseudo-mask": example.pseudo_mask,
            "prediction": example.prediction,
            "truth": example.truth,
        }
        tiles = [
            {"title": title, "uri": picture_uri(picture, PICTURE_PX), "is_mask": picture.ndim == 2}
            for title, picture in pictures.items()
            if picture is not None
        ]
        score = None if example.miou is None else f"{example.miou * 100:.1f} %"
        present = [{"name": names[index], "colour": colour_css(index)} for index in example.classes]
        shown.append({"id": example.id, "score": score, "classes": present, "tiles": tiles})
    is_scored = any(example.miou is not None for example in examples)
    return {"examples": shown, "scored": is_scored, "missing": "there are no images to show."}


def overlay_heat(image: NDArray[np.uint8], record: AttentionRecord) -> NDArray[np.uint8]:
    """Lay the strongest attention of any label over a grey copy of the image, RGB (H, W, 3).

    It is red at each map's peak and cold without evidence, where the grey image shows through.
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


def picture_uri(picture: NDArray[np.uint8], longest_px: int) -> str:
    """RGB (H, W, 3) as a JPEG data URI, class indices (H, W) as a PNG in the legend's colours; never enlarged."""
    image, buffer, is_mask = Image.fromarray(picture), io.BytesIO(), picture.ndim == 2
    method = Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS
    image.thumbnail((longest_px, longest_px), method, reducing_gap=None)
    if is_mask:
        image.putpalette(PALETTE.tobytes())
        image.save(buffer, format="png", optimize=True)
    else:
        image.save(buffer, format="jpeg", quality=JPEG_QUALITY)
    kind = "png" if is_mask else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def colour_css(class_index: int) -> str:
    """The palette's colour of a mask value as ``#rrggbb``."""
    return f"#{PALETTE[class_index].tobytes().hex()}"


GAP_PX = 6
TITLE_PX = 24
INK = (36, 41, 47)
Columns = Mapping[str, Sequence[NDArray[np.uint8] | None]]
"""Pictures from top to bottom by the column's title: RGB (H, W, 3), or class indices (H, W), or nothing."""


def write_picture_grid(
    artifacts: Mapping[str, Path],
    data_root: Path | None,
    out: Path,
    *,
    predictions: str = "segmenter",
    num_rows: int = 4,
    tile_px: int = 128,
) -> Path:
    """Write one PNG: image, attention, pseudo-mask, truth on the left; image, prediction, truth on the right.

    Rows run evenly by rank from good to bad on the left; on the right the first half are the best images, the rest the
    worst.  A side without its stage is left out; the words are those of ``build_report`` and ``show_examples``.
    """
    images = open_image_set(artifacts["prepare_data"], data_root)
    confusions = load_confusions(artifacts)
    sides: list[Columns] = []
    if "make_masks" in artifacts:
        found = load_training_examples(images, artifacts, score_images(confusions, "masks"), num_rows)
        columns = {"attention": [e.heat for e in found], "pseudo-mask": [e.pseudo_mask for e in found]}
        sides.append({"image": [e.image for e in found], **columns, "truth": [e.truth for e in found]})
    if "evaluate" in artifacts:
        scores = score_images(confusions, predictions)
        num_best = (num_rows + 1) // 2 if scores else num_rows
        best, worst = load_scored_examples(images, artifacts["evaluate"], scores, num_best)
        found = [*best, *worst[: num_rows - len(best)]]
        columns = {"prediction": [e.prediction for e in found], "truth": [e.truth for e in found]}
        sides.append({"image": [e.image for e in found], **columns})
    if not sides:
        raise ValueError("a picture grid needs the artifacts of make_masks or evaluate")
    legend = {**{n: i for i, n in enumerate(images.index.classes.names_with_background)}, "void": IGNORE_INDEX}
    buffer = io.BytesIO()
    _draw_grid(sides, legend, tile_px).save(buffer, format="PNG", optimize=True)
    write_atomic(out, buffer.getvalue())
    return out


def _draw_grid(sides: Sequence[Columns], legend: Mapping[str, int], tile_px: int) -> Image.Image:
    """Sides next to each other, titles above their columns, and below the colour of each class by its name."""
    pitch_px = tile_px + GAP_PX
    width = GAP_PX + sum(map(len, sides)) * pitch_px + 2 * GAP_PX * (len(sides) - 1)
    top = TITLE_PX + max(len(pictures) for side in sides for pictures in side.values()) * pitch_px
    font = ImageFont.load_default(13)
    entries: list[tuple[int, int]] = []  # (x, y) of each entry of the legend, wrapped at ``width``
    x, y = GAP_PX, 0
    for name in legend:
        entry_px = 18 + round(font.getlength(name)) + 14
        if x > GAP_PX and x + entry_px > width:
            x, y = GAP_PX, y + TITLE_PX
        entries.append((x, y))
        x += entry_px
    canvas = Image.new("RGB", (width, top + entries[-1][1] + TITLE_PX), "white")
    draw = ImageDraw.Draw(canvas)
    left = GAP_PX
    for side in sides:
        for title, pictures in side.items():
            draw.text((left + tile_px / 2, TITLE_PX / 2), title, fill=INK, font=font, anchor="mm")
            for row, picture in enumerate(pictures):
                if picture is not None:
                    is_mask = picture.ndim == 2  # masks are coloured and never blurred
                    method = Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS
                    tile = Image.fromarray(PALETTE[picture] if is_mask else picture)
                    tile = ImageOps.pad(tile, (tile_px, tile_px), method, color="white")
                    canvas.paste(tile, (left, TITLE_PX + row * pitch_px))
            left += pitch_px
        left += 2 * GAP_PX
    for (name, class_index), (x, y) in zip(legend.items(), entries, strict=True):
        draw.rectangle((x, top + y + 6, x + 12, top + y + 18), fill=colour_css(class_index), outline=INK)
        draw.text((x + 18, top + y + TITLE_PX / 2), name, fill=INK, font=font, anchor="lm")
    return canvas
