"""Every scored image of a run as a small picture with its layers: result, truth and errors.

Reads what ``evaluate`` counted, the images, their true masks, predictions and pseudo-masks.  The pictures stand in the
page while all of them together are small enough, else in a folder beside it.  The page lists them without a script;
``gallery.js`` filters and sorts them.
Shapes: H W pixels of a small picture.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from pipeline.report.colours import Palette
from pipeline.report.pictures import encode_picture, fit, paint_errors, paint_mask, picture_uri
from pipeline.report.tables import natural_key
from stages.contracts import ImageSet, read_index_mask
from stages.ops.metrics.confusion import SparseConfusions, iou, mean_iou
from stages.ops.pool import num_processes

THUMBNAIL_PX = 144
"""Longest side of a picture in the gallery."""
PHOTO_QUALITY = 45
"""Of WebP, in percent."""
MAX_INLINE_BYTES = 11_500_000
"""The most that the gallery's pictures may weigh within the page; more of them get a folder.

With their markup and the other pictures the page stays below 15 MB.  VOC's 1,449 images of val take 7 MB, and so do the
pseudo-masks of its 1,464 training images: both together get the folder.
"""
LAYERS = ("photo", "result", "truth", "errors")
"""What is kept of each image, from the lowest layer up."""


class ScoredSet(NamedTuple):
    """Images that one score stands on."""

    thing: str
    """What ``evaluate`` calls the counts."""
    title: str
    folder: Path
    """Where the masks that were scored lie, as ``<id>.png``."""


@dataclass(frozen=True)
class Shot:
    """One scored image."""

    id: str
    scored_set: str
    """The title of its set."""
    miou: float
    """Mean IoU of this image alone, a fraction."""
    class_iou: Mapping[int, float]
    """IoU by class index of the classes in this image's truth or result."""
    addresses: tuple[str, ...]
    """Of the pictures, in the order of ``LAYERS``: data URIs, or files relative to the page."""


def scored_sets(
    artifacts: Mapping[str, Path], confusions: Mapping[str, SparseConfusions], predictions: str
) -> list[ScoredSet]:
    """What can be shown of a run: predictions on val and on test, then the pseudo-masks.

    ``predictions`` is the score of the predictions that were written (``EvaluateConfig.written_score``).
    """
    test = predictions.replace("segmenter", "segmenter_test", 1)
    known = [
        (predictions, "predictions, val", "evaluate", "predictions"),
        (test, "predictions, test", "evaluate", "predictions"),
        ("masks", "pseudo-masks, train", "make_masks", "masks"),
    ]
    return [
        ScoredSet(thing, title, artifacts[stage] / kind)
        for thing, title, stage, kind in known
        if stage in artifacts and thing in confusions and confusions[thing].ids
    ]


def make_gallery(
    images: ImageSet,
    sets: Sequence[ScoredSet],
    confusions: Mapping[str, SparseConfusions],
    palette: Palette,
    page: Path,
) -> list[Shot]:
    """All images of ``sets`` that have a counted pixel, the worst of each set first.

    Pictures that do not fit into ``page`` are written to the folder ``<page>-images`` beside it, under names made of
    their bytes, before the page that shows them.

    Raises:
        DataError: an image or a mask does not read back.
        DamagedFileError: the same, of a mask of ours.
    """

    def draw(job: tuple[ScoredSet, str]) -> tuple[bytes, ...]:
        group, image_id = job
        record = images.index.record(image_id)
        photo = fit(images.read_image(record), THUMBNAIL_PX)
        truth = fit(images.read_mask(record), THUMBNAIL_PX)
        result = fit(read_index_mask(group.folder / f"{image_id}.png"), THUMBNAIL_PX)
        layers = (paint_mask(result, palette), paint_mask(truth, palette), paint_errors(truth, result))
        return encode_picture(photo, PHOTO_QUALITY), *(encode_picture(layer) for layer in layers)

    scored = [(group, shot) for group in sets for shot in _rank(confusions[group.thing])]
    with ThreadPoolExecutor(num_processes(0)) as pool:  # Pillow and numpy let others work while they do
        pictures = list(pool.map(draw, ((group, image_id) for group, (image_id, *_) in scored)))
    place = _place_inline if _weigh(pictures) <= MAX_INLINE_BYTES else _place_beside
    addresses = place(pictures, page)
    return [
        Shot(image_id, group.title, miou, classes, where)
        for (group, (image_id, miou, classes)), where in zip(scored, addresses, strict=True)
    ]


def _rank(counts: SparseConfusions) -> Iterator[tuple[str, float, dict[int, float]]]:
    """Id, mean IoU and IoU by class of each image with a counted pixel, the worst first."""
    found = []
    for position, image_id in enumerate(counts.ids):
        matrix = counts.matrix(position)
        by_class = {index: value for index, value in enumerate(iou(matrix).tolist()) if np.isfinite(value)}
        if by_class:
            found.append((image_id, mean_iou(matrix), by_class))
    yield from sorted(found, key=lambda entry: (entry[1], natural_key(entry[0])))


def _weigh(pictures: Sequence[tuple[bytes, ...]]) -> int:
    """Bytes within a page, where three become four letters."""
    return sum(len(picture) for layers in pictures for picture in layers) * 4 // 3


def _place_inline(pictures: Sequence[tuple[bytes, ...]], page: Path) -> list[tuple[str, ...]]:
    _sweep(_folder(page), keep=frozenset())
    return [tuple(picture_uri(picture) for picture in layers) for layers in pictures]


def _place_beside(pictures: Sequence[tuple[bytes, ...]], page: Path) -> list[tuple[str, ...]]:
    folder, addresses, names = _folder(page), [], set()
    folder.mkdir(parents=True, exist_ok=True)
    for layers in pictures:
        here = [f"{hashlib.sha256(picture).hexdigest()[:24]}.webp" for picture in layers]
        for name, picture in zip(here, layers, strict=True):
            (folder / name).write_bytes(picture)
        names.update(here)
        addresses.append(tuple(f"{quote(folder.name)}/{name}" for name in here))
    _sweep(folder, keep=names)
    return addresses


def _folder(page: Path) -> Path:
    return page.with_name(f"{page.stem}-images")


def _sweep(folder: Path, keep: set[str] | frozenset[str]) -> None:
    """Remove the pictures of an earlier page, and the folder where it is empty then; files of others stay."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name not in keep and re.fullmatch(r"[0-9a-f]{24}\.webp", path.name):
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
