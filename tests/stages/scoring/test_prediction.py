"""The CRF of predictions: a batch on a CUDA device gets what each image gets alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from stages.contracts import ImageRecord
from stages.ops.crf.dense_crf import CrfConfig
from stages.scoring import prediction
from stages.scoring.prediction import PredictionConfig, _Context, _refine_on_cuda, refine_prediction, refine_predictions

SMALL = CrfConfig(backend="torch", bilateral_sxy_px=20, bilateral_srgb=10, iterations=3)


def _batch(count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images of two colours, and probabilities (B, C, H, W) of which the third class is never likely."""
    rng = np.random.default_rng(0)
    images = np.full((count, 24, 30, 3), 40, np.uint8)
    images[:, :, 15:] = 200
    probabilities = rng.dirichlet((3, 2, 0.001), (count, 24, 30)).astype(np.float32).transpose(0, 3, 1, 2)
    probabilities = np.minimum(probabilities, [[[[1]], [[1]], [[0.005]]]]).astype(np.float32)
    return images, probabilities / probabilities.sum(axis=1, keepdims=True)


def test_a_batch_is_refined_as_each_image_alone() -> None:
    images, probabilities = _batch()
    probabilities[1] = np.array([0.001, 0.998, 0.001], np.float32)[:, None, None]  # one likely class: nothing to change
    together = refine_predictions([*images], [*probabilities], SMALL)
    for image, share, mask in zip(images, probabilities, together, strict=True):
        alone = refine_prediction(image, share, SMALL)
        assert mask.dtype == np.uint8
        assert (mask == alone).mean() > 0.999
    assert (together[1] == 1).all()
    assert (together[0] != probabilities[0].argmax(axis=0)).mean() > 0.1, "the CRF must have something to do"


def test_on_cuda_the_scored_images_of_a_batch_are_refined_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    sizes: list[int] = []

    def refine(
        images: list[np.ndarray], probabilities: list[np.ndarray], config: CrfConfig, *, device: str
    ) -> list[int]:
        assert device == "cuda:0"
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("too much")
        return [int(probabilities[0][0, 0, 0])]

    monkeypatch.setattr(prediction, "refine_predictions", refine)
    config = PredictionConfig(crf=True, crf_config=SMALL)
    scored = frozenset({"a", "c", "d"})
    context = _Context(config, cast(Any, None), scored, Path(), Path(), device="cuda:0")
    records = [ImageRecord(id=name, image=name, size=(2, 2)) for name in "abcd"]
    images = np.zeros((4, 2, 2, 3), np.uint8)
    multi = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 2, 2), np.float32)
    assert _refine_on_cuda(context, records, images, multi) == {0: 0, 2: 2, 3: 3}
    assert sizes == [3, 1, 2, 1, 1], "what does not fit goes in halves"
    written = replace(context, masks="multi_scale_crf")
    assert _refine_on_cuda(written, records, images, multi) == {0: 0, 1: 1, 2: 2, 3: 3}, "its mask is written too"
    assert _refine_on_cuda(replace(context, device="cpu"), records, images, multi) == {}
