"""Score a classifier's labels on images that it was not trained on.

Reads images and their labels, never a mask.  Shapes: N images, K foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from stages.contracts import ClassList, ImageRecord, ImageSet, Progress, Runtime
from stages.data.transforms import to_network_input
from stages.data.whole_images import batches_of_one_size, prefetch, read_checked, resize_image, scaled_size
from stages.ops.metrics.multilabel import (
    dead_classes,
    label_accuracy,
    leads,
    mean_average_precision,
    multi_hot,
    top1_accuracy,
)

if TYPE_CHECKING:
    from stages.nets.classifier import Classifier

BATCH_PX = 1 << 21
"""Pixels of one batch, whose images have one size, so that none is padded."""

MAX_BATCH_IMAGES = 64
"""Images of one batch, however small they are."""


def score_classifier(
    classifier: Classifier,
    image_set: ImageSet,
    split: Literal["val", "holdout"],
    short_side_px: int | None,
    progress: Progress,
    runtime: Runtime,
) -> dict[str, float]:
    """Label metrics on images that were not trained on; warns of classes that are never predicted.

    Args:
        classifier: In evaluation mode, on the device to use.
        image_set: The data.
        split: Whose images count, those with known labels.
        short_side_px: Resize the shorter side to this first; None keeps the file's size.
        progress: Hears of every batch.
        runtime: Threads that read ahead.

    Returns:
        ``classifier.label_accuracy`` and ``classifier.map``, where the classes exclude each other also
        ``classifier.top1_accuracy``; nothing without labelled images.  There an image's answer is yes for its highest
        logit alone, and ``map`` ranks the images of a class by how far it leads.
    """
    records = [record for record in image_set.index.split(split) if record.labels is not None]
    if not records:
        return {}
    classes = image_set.index.classes
    labels = np.stack([multi_hot(record.labels or (), classes.num_foreground) for record in records]) > 0
    task = f"classifier on {split}"
    logits = predict_logits(classifier, image_set, records, short_side_px, progress, runtime, task=task)
    metrics = {"classifier.top1_accuracy": top1_accuracy(logits, labels)} if classifier.is_exclusive else {}
    if classifier.is_exclusive:
        logits = leads(logits)
    _warn_of_dead(dead_classes(logits, labels), classes, f"{len(records)} images of {split}", progress)
    metrics["classifier.label_accuracy"] = label_accuracy(logits, labels)
    if labels.any():
        metrics["classifier.map"] = mean_average_precision(logits, labels)
    return metrics


def predict_logits(
    classifier: Classifier,
    image_set: ImageSet,
    records: Sequence[ImageRecord],
    short_side_px: int | None,
    progress: Progress,
    runtime: Runtime,
    *,
    task: str = "classifier",
) -> NDArray[np.float32]:
    """Logits of whole images, float32 (N, K) in the order of ``records``.

    A logit is a spatial mean, into which padding would enter: so only images of one size share a batch.
    Arguments as in ``score_classifier``; ``task`` is what ``progress`` hears.
    """
    device = next(classifier.parameters()).device
    sizes = [scaled_size(record.size, short_side_px=short_side_px) for record in records]

    def load(batch: list[int]) -> NDArray[np.uint8]:
        return np.stack([resize_image(read_checked(image_set, records[i]), sizes[i]) for i in batch])

    logits = np.zeros((len(records), image_set.index.classes.num_foreground), dtype=np.float32)
    batches = batches_of_one_size(enumerate(sizes), most_images=MAX_BATCH_IMAGES, most_px=BATCH_PX)
    done = 0
    progress.step(task, done, len(records))
    for batch, pixels in prefetch(load, batches, workers=runtime.workers):
        with torch.inference_mode():
            found = classifier(to_network_input(torch.from_numpy(pixels), device)).logits
        logits[batch] = found.float().cpu().numpy()
        done += len(batch)
        progress.step(task, done, len(records))
    return logits


def _warn_of_dead(dead: Sequence[int], classes: ClassList, where: str, progress: Progress) -> None:
    if dead:
        names = ", ".join(classes.names[index] for index in dead)
        progress.warn(
            f"classifier: never predicts {names} on the {where}, though they are there; their attention means little. "
            "Train longer, change the learning rate, or give these classes more images"
        )
