"""Choose the images that a report shows, and load what the run made of each.

Reads: the image set, attention shards, ``masks/<id>.png`` and ``steps/*/<id>.png``, ``predictions/<id>.png`` and
``confusions.npz``.
Choice is by score alone: training images evenly spaced from the best to the worst pseudo-mask, validation images the
best and the worst; so a page never shows only what went well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    AttentionRecord,
    ClassList,
    ImageRecord,
    ImageSet,
    iter_attention,
    read_index_mask,
)
from stages.masks.mask_files import read_steps
from stages.ops.metrics.confusion import SparseConfusions


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
    attention: AttentionRecord | None = None
    steps: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """The masks between the steps to the pseudo-mask, by step in order."""
    pseudo_mask: NDArray[np.uint8] | None = None
    prediction: NDArray[np.uint8] | None = None
    truth: NDArray[np.uint8] | None = None


def load_training_examples(
    images: ImageSet, artifacts: Mapping[str, Path], scores: Mapping[str, float], count: int
) -> list[Example]:
    """Load ``count`` training images from the best to the worst pseudo-mask, evenly spaced by rank.

    Args:
        images: The run's images.
        artifacts: Folder of each stage that ran.
        scores: Mean IoU of the pseudo-mask by image id; where there are none, the images are evenly spaced in the list.
        count: Most images to return.
    """
    records = _training_records(images)
    if scores:
        records = sorted((r for r in records if r.id in scores), key=lambda r: (-scores[r.id], r.id))
    chosen = [records[place] for place in _spread(len(records), count)]
    attention = find_attention(artifacts.get("make_attention"), [record.id for record in chosen])
    return [
        _load(images, record, scores, attention=attention.get(record.id), masks=artifacts.get("make_masks"))
        for record in chosen
    ]


def load_scored_examples(
    images: ImageSet, evaluate: Path, scores: Mapping[str, float], count: int
) -> tuple[list[Example], list[Example]]:
    """Load the ``count`` best and the ``count`` worst predictions; no image is in both.

    Where there are no true masks, the first list holds evenly spaced images of val, or else of test; the second none.

    Args:
        images: The run's images.
        evaluate: Folder of the evaluate stage.
        scores: Mean IoU of the prediction by image id.
        count: Most images in each list.
    """
    if not scores:
        records = images.index.split("val") or images.index.split("test")
        chosen = [records[place] for place in _spread(len(records), count)]
        return [_load(images, record, scores, predictions=evaluate) for record in chosen], []
    ranked = sorted(scores, key=lambda image_id: (-scores[image_id], image_id))
    best = ranked[:count]
    worst = ranked[len(best) :][-count:][::-1]

    def load(ids: Sequence[str]) -> list[Example]:
        return [_load(images, images.index.record(image_id), scores, predictions=evaluate) for image_id in ids]

    return load(best), load(worst)


def find_attention(folder: Path | None, ids: Collection[str]) -> dict[str, AttentionRecord]:
    """The attention of ``ids`` by id, reading no shard beyond the last one needed; empty where nothing was made."""
    found: dict[str, AttentionRecord] = {}
    if folder is None or not ids:
        return found
    wanted = set(ids)
    for record in iter_attention(folder):
        if record.id in wanted:
            found[record.id] = record
            if len(found) == len(wanted):
                break
    return found


def score_images(confusions: SparseConfusions) -> dict[str, float]:
    """Mean IoU of each image alone; images without a single counted pixel are left out."""
    return {image_id: score for image_id, score in confusions.mean_iou_by_image().items() if math.isfinite(score)}


def _training_records(images: ImageSet) -> tuple[ImageRecord, ...]:
    return images.index.split("train_score") or images.index.split("train")


def _spread(total: int, count: int) -> list[int]:
    """At most ``count`` evenly spaced places of ``total``, the first and the last among them."""
    if total <= count:
        return list(range(total))
    return [round(place) for place in np.linspace(0, total - 1, count)]


def _load(
    images: ImageSet,
    record: ImageRecord,
    scores: Mapping[str, float],
    *,
    attention: AttentionRecord | None = None,
    masks: Path | None = None,
    predictions: Path | None = None,
) -> Example:
    truth = images.read_mask(record) if record.mask is not None else None
    return Example(
        id=record.id,
        image=images.read_image(record),
        classes=_classes(record, truth),
        miou=scores.get(record.id),
        attention=attention,
        steps={} if masks is None else read_steps(masks, record.id),
        pseudo_mask=_read_optional(masks, "masks", record.id),
        prediction=_read_optional(predictions, "predictions", record.id),
        truth=truth,
    )


def _classes(record: ImageRecord, truth: NDArray[np.uint8] | None) -> tuple[int, ...]:
    if truth is not None:
        return tuple(v for v in np.unique(truth).tolist() if v not in (BACKGROUND_INDEX, IGNORE_INDEX))
    return tuple(ClassList.class_index(label) for label in record.labels or ())


def _read_optional(folder: Path | None, kind: str, image_id: str) -> NDArray[np.uint8] | None:
    """An index mask, or None where the stage did not make one for this image."""
    path = None if folder is None else folder / kind / f"{image_id}.png"
    return read_index_mask(path) if path is not None and path.is_file() else None
