"""Measure on val how well the attention maps of the true labels point at the objects.

Called by ``evaluate`` alone, which may read true masks.  A case is an image of val with one of its labels that has a
true box: from the data set's box list or, where there is none, around each connected component of the class in the true
mask.  The network works in this process, the boxes of its maps over processes meanwhile.
Reads: images, their labels, boxes and true masks; the trained classifier.
Writes: ``localization.json`` and, for every ``_CHUNK`` images, their counts under ``partial/``, so that a stopped
evaluation continues.
Source: ``stages/ops/metrics/box_accuracy.py`` names the papers.  Differs: with several labels in an image each is a
case of its own, and the classifier's answer is right where its highest logit is that label: at most one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.contracts import (
    AttentionRecord,
    ClassList,
    ImageRecord,
    ImageSet,
    Progress,
    Runtime,
    SilentProgress,
    StageConfig,
    read_json,
    write_json,
)
from stages.errors import DamagedFileError
from stages.masks.label_rules import cut_byte
from stages.ops.metrics.box_accuracy import NUM_CUTS, BoxAccuracy, PixelPrecision, cut_overlaps
from stages.ops.metrics.boxes import boxes_of_class
from stages.ops.pool import map_ordered, num_processes

if TYPE_CHECKING:
    from stages.masks.extraction import AttentionExtractor
    from stages.nets.classifier import Classifier

_CHUNK = 64
"""Images whose counts are kept together: what a stopped run loses at most."""

_IMAGES_PER_PROCESS = 32
"""Images that make one more process worth its start-up, about."""


class LocalizationConfig(StageConfig):
    """How attention maps become boxes, and how well these must fit."""

    normalisation: Literal["minmax", "max"] = "minmax"
    """How a map gets its values 0 … 1.  minmax: class scores, negative ones too, from their minimum to their maximum;
    max: the attention, which is 0 where a score is negative, divided by its maximum.
    Source: wsolevaluation, minmax.  Differs: Grad-CAM, GAIN and ACoL have no negative values that minmax could keep."""
    threshold: float = Field(default=0.2, ge=0, lt=1)
    """Fraction of a map's maximum above which it says object, for GT-known Loc and Top-1 Loc.  Source: Zhou et al."""
    iou: float = Field(default=0.5, gt=0, le=1)
    """The box of the largest contour is right from this overlap with a true box on."""
    iou_thresholds: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=(0.3, 0.5, 0.7), min_length=1)
    """Overlaps that MaxBoxAccV2 averages over."""
    scales: tuple[Annotated[float, Field(ge=0.1, le=4.0)], ...] = Field(default=(1.0,), min_length=1)
    """Sizes, relative to the image (or to ``short_side_px``), that the maps are averaged over."""
    flip: bool = False
    """Look at the mirrored image too, at every scale."""
    short_side_px: int | None = Field(default=None, ge=16, le=4096)
    """Resize the image's shorter side to this before the scales, and for the label; None keeps the file's size."""


@dataclass
class _Counts:
    """What was counted of some images."""

    boxes: BoxAccuracy
    pixels: PixelPrecision
    num_images: int
    """Images with a case."""

    @classmethod
    def empty(cls, config: LocalizationConfig) -> Self:
        boxes = BoxAccuracy.empty(iou=config.iou, iou_thresholds=config.iou_thresholds, cut=cut_byte(config.threshold))
        return cls(boxes, PixelPrecision.empty(), 0)

    def merge(self, other: _Counts) -> None:
        self.boxes.merge(other.boxes)
        self.pixels.merge(other.pixels)
        self.num_images += other.num_images

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        for part in ("boxes", "pixels"):
            fields[part] = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields[part].items()}
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        boxes, pixels = fields["boxes"], fields["pixels"]
        arrays = {name: np.array(boxes[name], dtype=np.int64) for name in ("largest", "best")}
        found = BoxAccuracy(**{**boxes, **arrays, "iou_thresholds": tuple(boxes["iou_thresholds"])})
        levels = {name: np.array(values, dtype=np.int64) for name, values in pixels.items()}
        return cls(found, PixelPrecision(**levels), fields["num_images"])


@dataclass(frozen=True)
class _Context:
    """What all images of one run share."""

    config: LocalizationConfig
    images: ImageSet


@dataclass(frozen=True)
class _Job:
    """One image on its way from the network to its counts."""

    record: ImageRecord
    """Its labels are those that have a true box."""
    attention: AttentionRecord | None
    """At the image's own size; None where it has no case."""
    first_label: int
    """Label index of the highest logit."""


def score_localization(
    config: LocalizationConfig,
    image_set: ImageSet,
    *,
    classifier: Path,
    out: Path,
    progress: Progress,
    runtime: Runtime,
) -> dict[str, float]:
    """Count every image of val that has true boxes or a true mask, and write ``localization.json``.

    Args:
        config: Threshold, overlaps, views.
        image_set: The data.
        classifier: Output folder of ``train_classifier``.
        out: Where to write; finished chunks of an earlier call are kept.
        progress: Hears of every image.
        runtime: Device, threads that read ahead, and processes for the boxes.

    Returns:
        ``localization.*`` metrics; ``localization.pxap`` only where there are true masks; nothing without a case.

    Raises:
        DataError: an image or a true mask is damaged.
        DamagedFileError: the classifier knows other classes.
        InputError: the classifier gives NaN.
    """
    records = image_set.index.split("val")
    chunks = [records[start : start + _CHUNK] for start in range(0, len(records), _CHUNK)]
    paths = [out / "partial" / f"localization-{number:05d}.json" for number in range(len(chunks))]
    counts = {number: kept for number, path in enumerate(paths) if (kept := _read_counts(path, progress)) is not None}
    missing = [number for number in range(len(chunks)) if number not in counts]
    done = sum(len(chunks[number]) for number in counts)
    progress.step("localization", done, len(records))
    if missing:
        context = _Context(config, image_set)
        network, extractor = _open_classifier(context, classifier, progress, runtime)
        jobs = (job for number in missing for job in _look(context, network, extractor, chunks[number], runtime))
        processes = min(num_processes(runtime.processes), 1 + (len(records) - done) // _IMAGES_PER_PROCESS)
        finished = map_ordered(_count_image, jobs, context=context, processes=processes)
        for number in missing:
            counts[number] = _Counts.empty(config)
            for _ in chunks[number]:
                counts[number].merge(next(finished))
                done += 1
                progress.step("localization", done, len(records))
            write_json(paths[number], counts[number].to_json())
        next(finished, None)  # lets the pool end
    total = _Counts.empty(config)
    for each in counts.values():
        total.merge(each)
    if total.num_images < len(records):
        without = len(records) - total.num_images
        progress.info(f"localization: {without} of {len(records)} images of val have no true box of a label")
    if not total.num_images:
        return {}
    write_json(out / "localization.json", _curves(config, total))
    pxap = total.pixels.compute()
    metrics = total.boxes.compute() | ({} if pxap is None else {"pxap": pxap})
    return {f"localization.{name}": value for name, value in metrics.items()}


def _read_counts(path: Path, progress: Progress) -> _Counts | None:
    """The counts of an earlier run; None where there are none, or damaged ones, which are counted again."""
    if not path.exists():
        return None
    try:
        return _Counts.from_json(read_json(path))
    except (DamagedFileError, KeyError, TypeError, ValueError) as error:
        progress.warn(f"{path} does not read back ({error}): counting these images again")
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The network's side
# ---------------------------------------------------------------------------------------------------------------------


def _look(
    context: _Context,
    network: Classifier,
    extractor: AttentionExtractor,
    chunk: Sequence[ImageRecord],
    runtime: Runtime,
) -> Iterator[_Job]:
    """A job for each image of ``chunk``, in its order: maps of the labels that have true boxes, and the first label."""
    from stages.data.whole_images import prefetch, read_checked
    from stages.masks.extraction import build_inputs, plan_batches
    from stages.scoring.label_scores import predict_logits

    images, views = context.images, extractor.views
    cases = [_with_true_labels(images, record) for record in chunk]
    seen = [record for record in cases if record.labels]

    def load(batch: list[ImageRecord]) -> list[NDArray[np.uint8]]:
        return build_inputs([read_checked(images, record) for record in batch], views)

    found: dict[str, AttentionRecord] = {}
    batches = list(plan_batches(seen, views, extractor.budget_px))
    for batch, inputs in prefetch(load, batches, workers=runtime.workers):
        found.update((record.id, record) for record in extractor.records(batch, inputs))
    logits = predict_logits(network, images, seen, context.config.short_side_px, SilentProgress(), runtime)
    first = {record.id: int(row.argmax()) for record, row in zip(seen, logits, strict=True)}
    for record in cases:
        yield _Job(record, found.get(record.id), first.get(record.id, -1))


def _open_classifier(
    context: _Context, folder: Path, progress: Progress, runtime: Runtime
) -> tuple[Classifier, AttentionExtractor]:
    from stages.masks.extraction import AttentionExtractor, Views
    from stages.methods.classifier_files import load_classifier, read_description
    from stages.ops.devices import resolve_device

    known, wanted = read_description(folder).classes, context.images.index.classes
    if known != wanted:
        raise DamagedFileError(
            f"{folder} was trained on the classes {', '.join(known.names)}; the data has {', '.join(wanted.names)}: "
            "rebuild train_classifier"
        )
    config, device = context.config, resolve_device(runtime)
    network, method = load_classifier(folder, device)
    extractor = AttentionExtractor(
        network,
        method,
        views=Views(config.scales, config.flip, config.short_side_px),
        map_stride=1,  # the maximum that a threshold is a fraction of is that of the map at the image's size
        num_foreground=wanted.num_foreground,
        device=device,
        warn=progress.warn,
        normalisation=config.normalisation,
    )
    return network, extractor


def _with_true_labels(images: ImageSet, record: ImageRecord) -> ImageRecord:
    """``record`` with only those labels that have a true box; where its labels are unknown, those of its mask."""
    found: set[int] = set()
    if record.boxes is not None:
        found = {label for label, _ in record.boxes}
    elif record.mask is not None:
        values = set(np.unique(images.read_mask(record)).tolist())
        labels = range(images.index.classes.num_foreground)
        found = {label for label in labels if ClassList.class_index(label) in values}
    known = found if record.labels is None else found & set(record.labels)
    return record.model_copy(update={"labels": tuple(sorted(known))})


# ---------------------------------------------------------------------------------------------------------------------
# The side of the boxes
# ---------------------------------------------------------------------------------------------------------------------


def _count_image(context: _Context, job: _Job) -> _Counts:
    """Count the cases of one image."""
    counts = _Counts.empty(context.config)
    if job.attention is None:
        return counts
    record = job.record
    mask = None if record.mask is None else context.images.read_mask(record)
    for label, attention in zip(job.attention.labels, job.attention.maps, strict=True):
        overlaps = cut_overlaps(attention, _true_boxes(record, label, mask))
        counts.boxes.accumulate(overlaps, is_top1=label == job.first_label)
        if mask is not None:
            counts.pixels.accumulate(attention, mask, ClassList.class_index(label))
    counts.num_images = 1
    return counts


def _true_boxes(record: ImageRecord, label: int, mask: NDArray[np.uint8] | None) -> NDArray[np.int64]:
    """The boxes (b, 4) of one class; a data set's own list goes before its masks."""
    if record.boxes is not None:
        boxes = [box for own, box in record.boxes if own == label]
    else:
        boxes = [] if mask is None else list(boxes_of_class(mask, ClassList.class_index(label)))
    return np.array(boxes, dtype=np.int64).reshape(-1, 4)


def _curves(config: LocalizationConfig, total: _Counts) -> dict[str, Any]:
    """Accuracy at each of the 256 cuts, for people; precision and recall from the highest level down."""
    boxes = total.boxes
    precision, recall = total.pixels.curve()
    return {
        "split": "val",
        "images": total.num_images,
        "cases": boxes.num_cases,
        "configured": config.threshold,
        "iou": config.iou,
        "thresholds": [cut / (NUM_CUTS - 1) for cut in range(NUM_CUTS)],
        "box_acc": (boxes.largest / boxes.num_cases).tolist(),
        "box_acc_v2": {
            str(iou): (row / boxes.num_cases).tolist()
            for iou, row in zip(config.iou_thresholds, boxes.best, strict=True)
        },
        "precision": precision.tolist() if total.pixels.positive.any() else [],
        "recall": recall.tolist() if total.pixels.positive.any() else [],
    }
