"""The pictures of a run: which images are shown, what is painted over them, and all of them in one PNG.

Reads: the image set, attention shards, ``masks/<id>.png`` and ``steps/*/<id>.png``, ``predictions/<id>.png`` and
``confusions.npz``.  Presentation only: nothing here enters a score.
Images are chosen by score alone: training images evenly spaced from the best to the worst pseudo-mask, validation
images the best and the worst; so a page never shows only what went well.
Masks are outlines and a tint over the photo, so that a reader sees whether a shape fits.
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

from pipeline.report.colours import ERRORS, VIRIDIS, Palette, colour_css, safe_palette
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
    write_atomic,
)
from stages.errors import WsssError
from stages.masks.mask_files import read_steps
from stages.ops.metrics.confusion import SparseConfusions, read_confusions

NUM_TRAINING_EXAMPLES = 8
NUM_SCORED_EXAMPLES = 6
PICTURE_PX = 240
"""Longest side of a picture on the page; keeps a report of 500-pixel photos under 2 MB."""
QUALITY = 82
"""Of WebP, in percent."""
OUTLINE_PX = 2
TINT_ALPHA = 90
"""Of 255: how much of the class's colour lies inside the outline."""
HALO = (255, 255, 255, 190)
"""A pixel around each outline, so that it is seen on a photo of its own colour."""
HATCH = (255, 255, 255, 150)
"""Void and unsure pixels are hatched."""


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

    @property
    def result(self) -> NDArray[np.uint8] | None:
        """The mask that the score is of."""
        return self.pseudo_mask if self.prediction is None else self.prediction


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
    predictions: str,
    palette: Palette,
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
            shown["training"] = _show(found, images.index.classes, palette)
        if images and "evaluate" in artifacts:
            scores = score_images(confusions, predictions)
            found = load_scored_examples(images, artifacts["evaluate"], scores, NUM_SCORED_EXAMPLES)
            shown |= {
                part: _show(examples, images.index.classes, palette)
                for part, examples in zip(("best", "worst"), found, strict=True)
            }
    except (WsssError, zipfile.BadZipFile) as error:
        shown, why = {}, f"the pictures could not be read: {error}"
        missing |= {"training": why, "best": why}
    return {part: {"examples": (), "scored": False, "missing": why} for part, why in missing.items()} | shown


def _show(examples: Sequence[Example], classes: ClassList, palette: Palette) -> Mapping[str, Any]:
    shown = []
    for example in examples:
        photo = fit(example.image, PICTURE_PX)
        masks = {
            **{step_label(name): mask for name, mask in example.steps.items()},
            "pseudo-mask": example.pseudo_mask,
            "prediction": example.prediction,
            "truth": example.truth,
        }
        pictures = {"image": photo} if example.heat is None else {"image": photo, "attention": example.heat}
        pictures |= {title: outline(photo, mask, palette) for title, mask in masks.items() if mask is not None}
        if example.truth is not None and example.result is not None:
            errors = paint_errors(fit(example.truth, PICTURE_PX), fit(example.result, PICTURE_PX))
            pictures["errors"] = lay_over(_to_grey(photo), errors)
        score = None if example.miou is None else f"{example.miou * 100:.1f} %"
        shown.append(figure(example.id, pictures, example.classes, classes, palette, score))
    is_scored = any(example.miou is not None for example in examples)
    return {"examples": shown, "scored": is_scored, "missing": "there are no images to show."}


def figure(
    image_id: str,
    pictures: Mapping[str, NDArray[np.uint8]],
    present: Sequence[int],
    classes: ClassList,
    palette: Palette,
    score: str | None = None,
) -> dict[str, Any]:
    """What the template's ``example`` draws: RGB pictures (H, W, 3) by title, and the classes that are ``present``."""
    tiles = [{"title": t, "uri": picture_uri(encode_picture(fit(p, PICTURE_PX)))} for t, p in pictures.items()]
    names = [{"name": classes.names_with_background[i], "colour": colour_css(palette[i])} for i in present]
    return {"id": image_id, "score": score, "classes": names, "tiles": tiles}


# ---------------------------------------------------------------------------------------------------------------------
# Painting
# ---------------------------------------------------------------------------------------------------------------------


def overlay_heat(image: NDArray[np.uint8], record: AttentionRecord) -> NDArray[np.uint8]:
    """Lay the strongest attention of any label over a grey copy of the image, RGB (H, W, 3).

    It is yellow at each map's peak and violet without evidence, where the grey image shows through.
    """
    height, width = image.shape[:2]
    strongest = record.maps.max(axis=0) if len(record.maps) else np.zeros((1, 1), dtype=np.uint8)
    resized = Image.fromarray(strongest).resize((width, height), Image.Resampling.BILINEAR)  # PIL wants (W, H)
    heat = np.asarray(resized, dtype=np.float32)[..., None] / 255.0
    stops = np.linspace(0.0, 1.0, len(VIRIDIS))
    colour = np.concatenate([np.interp(heat, stops, VIRIDIS[:, channel]) for channel in range(3)], axis=-1)
    grey = image.astype(np.float32).mean(axis=-1, keepdims=True)
    opacity = 0.4 + 0.4 * heat
    return np.clip(grey * (1.0 - opacity) + colour * opacity, 0, 255).astype(np.uint8)


def paint_mask(mask: NDArray[np.uint8], palette: Palette) -> NDArray[np.uint8]:
    """Class indices (H, W) as a layer for the photo, RGBA (H, W, 4): an outline, a tint inside it, a halo around it.

    Background is clear, void and unsure pixels are hatched.
    """
    is_void = mask == IGNORE_INDEX
    is_object = (mask != BACKGROUND_INDEX) & ~is_void
    inner = is_object
    for _ in range(OUTLINE_PX):
        inner = inner & _has_equal_neighbours(np.where(inner, mask, BACKGROUND_INDEX))
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[is_object, :3] = palette[mask[is_object]]
    layer[is_object, 3] = 255
    layer[inner, 3] = TINT_ALPHA
    layer[~is_object & ~_has_equal_neighbours(np.where(is_object, mask, BACKGROUND_INDEX))] = HALO
    diagonal = np.arange(mask.shape[0])[:, None] + np.arange(mask.shape[1])
    layer[is_void & (diagonal % 6 < 2)] = HATCH
    return layer


def outline(photo: NDArray[np.uint8], mask: NDArray[np.uint8], palette: Palette) -> NDArray[np.uint8]:
    """``photo`` RGB (H, W, 3) with a mask (h, w) of the whole image painted over it, RGB (H, W, 3)."""
    return lay_over(photo, paint_mask(fit(mask, max(photo.shape[:2])), palette))


def paint_errors(truth: NDArray[np.uint8], result: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What is wrong in ``result``, both class indices (H, W), in the colours of ``ERRORS``, as a layer RGBA (H, W, 4).

    As in the scores: void of the truth counts nowhere, unsure pixels of the result are background.
    """
    found = np.where(result == IGNORE_INDEX, BACKGROUND_INDEX, result)
    wrong = (truth != found) & (truth != IGNORE_INDEX)
    kinds = (wrong & (found == BACKGROUND_INDEX), wrong & (truth == BACKGROUND_INDEX))
    layer = np.zeros((*truth.shape, 4), np.uint8)
    for places, colour in zip((*kinds, wrong & ~kinds[0] & ~kinds[1]), ERRORS.values(), strict=True):
        layer[places] = (*colour, 230)
    return layer


def _has_equal_neighbours(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether the pixels left, right, above and below have the same value, (H, W); outside the image they do."""
    framed = np.pad(mask, 1, mode="edge")
    around = (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:])
    return np.logical_and.reduce([side == mask for side in around])


def lay_over(photo: NDArray[np.uint8], layer: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``layer`` RGBA (H, W, 4) over ``photo`` RGB (H, W, 3), RGB."""
    alpha = layer[..., 3:].astype(np.uint16)
    return ((photo * (255 - alpha) + layer[..., :3] * alpha + 127) // 255).astype(np.uint8)


def _to_grey(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A grey copy of low contrast, on which black and white stand out."""
    return np.repeat((photo.mean(axis=-1, keepdims=True) * 0.4 + 90).astype(np.uint8), 3, axis=-1)


def fit(picture: NDArray[np.uint8], longest_px: int) -> NDArray[np.uint8]:
    """Resize RGB (H, W, 3) or class indices (H, W), which gain no value, to this longest side."""
    height, width = picture.shape[:2]
    if max(height, width) == longest_px:
        return picture
    scale = longest_px / max(height, width)
    method = Image.Resampling.NEAREST if picture.ndim == 2 else Image.Resampling.LANCZOS
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, method, reducing_gap=2.0 if picture.ndim == 3 else None))


def encode_picture(picture: NDArray[np.uint8], quality: int = QUALITY) -> bytes:
    """RGB (H, W, 3) as a WebP of ``quality`` percent, a layer RGBA (H, W, 4) without loss."""
    buffer = io.BytesIO()
    is_layer = picture.shape[-1] == 4
    Image.fromarray(picture).save(buffer, format="WebP", quality=0 if is_layer else quality, lossless=is_layer)
    return buffer.getvalue()


def picture_uri(webp: bytes) -> str:
    """An encoded picture as a data URI."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode('ascii')}"


GAP_PX = 6
TITLE_PX = 24
INK = (36, 41, 47)
Columns = Mapping[str, Sequence[NDArray[np.uint8] | None]]
"""Pictures from top to bottom by the column's title: RGB (H, W, 3) or nothing."""


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
    palette = safe_palette()

    def show(example: Example, mask: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
        return None if mask is None else outline(fit(example.image, tile_px), mask, palette)

    images = open_image_set(artifacts["prepare_data"], data_root)
    confusions = load_confusions(artifacts)
    sides: list[Columns] = []
    if "make_masks" in artifacts:
        found = load_training_examples(images, artifacts, score_images(confusions, "masks"), num_rows)
        sides.append(
            {
                "image": [e.image for e in found],
                "attention": [e.heat for e in found],
                "pseudo-mask": [show(e, e.pseudo_mask) for e in found],
                "truth": [show(e, e.truth) for e in found],
            }
        )
    if "evaluate" in artifacts:
        scores = score_images(confusions, predictions)
        num_best = (num_rows + 1) // 2 if scores else num_rows
        best, worst = load_scored_examples(images, artifacts["evaluate"], scores, num_best)
        found = [*best, *worst[: num_rows - len(best)]]
        sides.append(
            {
                "image": [e.image for e in found],
                "prediction": [show(e, e.prediction) for e in found],
                "truth": [show(e, e.truth) for e in found],
            }
        )
    if not sides:
        raise ValueError("a picture grid needs the artifacts of make_masks or evaluate")
    names = images.index.classes.names_with_background
    legend = {name: colour_css(palette[index]) for index, name in enumerate(names) if index != BACKGROUND_INDEX}
    buffer = io.BytesIO()
    _draw_grid(sides, legend, tile_px).save(buffer, format="PNG", optimize=True)
    write_atomic(out, buffer.getvalue())
    return out


def _draw_grid(sides: Sequence[Columns], legend: Mapping[str, str], tile_px: int) -> Image.Image:
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
                    tile = ImageOps.pad(Image.fromarray(picture), (tile_px, tile_px), color="white")
                    canvas.paste(tile, (left, TITLE_PX + row * pitch_px))
            left += pitch_px
        left += 2 * GAP_PX
    for (name, colour), (x, y) in zip(legend.items(), entries, strict=True):
        draw.rectangle((x, top + y + 6, x + 12, top + y + 18), fill=colour, outline=INK)
        draw.text((x + 18, top + y + TITLE_PX / 2), name, fill=INK, font=font, anchor="lm")
    return canvas
