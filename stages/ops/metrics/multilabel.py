"""Scores of image labels: average precision per class, label accuracy, classes that are never predicted.

Logits say yes where they are above 0; those of classes that compete for one label are brought to that by ``leads``.

Pure numpy, no I/O.  Shapes: N images, K foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def multi_hot(labels: Sequence[int], num_foreground: int) -> NDArray[np.float32]:
    """Label indices (0 … K-1) as 0/1, float32 (K,)."""
    hot = np.zeros(num_foreground, dtype=np.float32)
    hot[list(labels)] = 1.0
    return hot


def leads(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """By how much each class's logit exceeds the best other one: above 0 for the image's first class alone.

    Logits that are trained with a softmax mean something only against each other; these differences can be compared
    between images and with 0, as the logits of yes/no questions.

    Args:
        logits: (N, K).

    Returns:
        (N, K); 0 for both of two equal first classes, 1 where there is only one class.
    """
    if logits.shape[1] == 1:
        return np.ones_like(logits)
    second, first = np.partition(logits, -2, axis=1)[:, -2:].T[:, :, None]
    return logits - np.where(logits == first, second, first)


def top1_accuracy(logits: NDArray[np.floating], labels: NDArray[np.bool_]) -> float:
    """Share of the images, in [0, 1], whose highest logit (the first among equals) is a label of theirs."""
    return float(np.mean(labels[np.arange(len(labels)), logits.argmax(axis=1)]))


def average_precision(logits: NDArray[np.floating], labels: NDArray[np.bool_]) -> float:
    """Area under the precision-recall steps of one class; images of equal logit enter together.

    Args:
        logits: (N,) scores of one class, any monotone scale.
        labels: (N,) True where the image has the class.

    Returns:
        Σ (R_i − R_{i−1}) · P_i over the distinct logits from the highest down, in [0, 1]; NaN without a positive image.

    Source:
        VOC devkit 2010 and later, without interpolation; equal to scikit-learn's ``average_precision_score``.
    """
    num_positive = int(labels.sum())
    if num_positive == 0:
        return float("nan")
    order = np.argsort(-logits, kind="stable")
    ordered = logits[order]
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # last image of every run of equal logits
    hits = np.cumsum(labels[order])[ends]
    precision, recall = hits / (ends + 1), hits / num_positive
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def mean_average_precision(logits: NDArray[np.floating], labels: NDArray[np.bool_]) -> float:
    """Mean of ``average_precision`` over the classes that have a positive image; NaN when none has.

    Args:
        logits: (N, K) class scores.
        labels: (N, K) True where the image has the class.
    """
    values = [average_precision(logits[:, k], labels[:, k]) for k in np.flatnonzero(labels.any(axis=0))]
    return float(np.mean(values)) if values else float("nan")


def label_accuracy(logits: NDArray[np.floating], labels: NDArray[np.bool_]) -> float:
    """Share of the N × K yes/no decisions "logit > 0" that are right, in [0, 1]."""
    return float(np.mean((logits > 0) == labels))


def dead_classes(logits: NDArray[np.floating], labels: NDArray[np.bool_]) -> list[int]:
    """Label indices that occur among the N images and are predicted (logit > 0) for none of them."""
    return np.flatnonzero(labels.any(axis=0) & ~(logits > 0).any(axis=0)).tolist()
