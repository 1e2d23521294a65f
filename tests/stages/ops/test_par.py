"""Pixel-adaptive refinement: against loops written from the formula, at edges, in batches, at the config's bounds."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stages.ops.par import ParBatch, ParConfig, ParRefinement

SMALL = ParConfig(dilations=(1, 3), iterations=2, shrink=1)


def _image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _probabilities(labels: int, height: int, width: int, seed: int = 1) -> np.ndarray:
    raw = np.random.default_rng(seed).random((labels, height, width))
    return (raw / raw.sum(axis=0)).astype(np.float32)


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def _by_hand(image: np.ndarray, probabilities: np.ndarray, config: ParConfig) -> np.ndarray:
    """AFA's formula pixel by pixel in float64: colours and distances over the deviation of the neighbourhood."""
    height, width = image.shape[:2]
    steps = [(r * d, c * d) for d in config.dilations for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]
    distance = np.array([np.sqrt(r**2 + c**2) for r, c in steps])
    near = _softmax(-((distance / distance.std(ddof=1) / config.colour_width) ** 2))
    values = probabilities.astype(np.float64)
    for _ in range(config.iterations):
        after = np.zeros_like(values)
        for row in range(height):
            for column in range(width):
                places = [(min(max(row + r, 0), height - 1), min(max(column + c, 0), width - 1)) for r, c in steps]
                colours = np.array([image[place] for place in places], dtype=np.float64)
                scaled = np.abs(colours - image[row, column]) / (colours.std(axis=0, ddof=1) + 1e-8)
                like = _softmax(-((scaled / config.colour_width) ** 2).mean(axis=1))
                weights = (like + config.position_weight * near) / (1 + config.position_weight)
                after[:, row, column] = sum(w * values[:, p[0], p[1]] for w, p in zip(weights, places, strict=True))
        values = after
    return values


@pytest.mark.parametrize("position_weight", [0.01, 1.0])
def test_it_is_the_formula(position_weight: float) -> None:
    config = SMALL.model_copy(update={"position_weight": position_weight})
    image, probabilities = _image(6, 7), _probabilities(3, 6, 7)
    found = ParBatch([image], config).refine([probabilities])[0]
    np.testing.assert_allclose(found, _by_hand(image, probabilities, config), atol=2e-6)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-6)


def test_probabilities_stop_at_an_edge_and_flow_within_a_colour() -> None:
    """A seed on part of a disc fills the disc and does not leave it."""
    rows, columns = np.mgrid[:40, :56]
    disc = (rows - 20) ** 2 + (columns - 28) ** 2 < 15**2
    image = np.where(disc[..., None], np.uint8([200, 40, 40]), np.uint8([60, 90, 60])).astype(np.uint8)
    seed = disc & (columns < 34)
    foreground = np.where(seed, 0.9, 0.2)
    probabilities = np.stack([1 - foreground, foreground]).astype(np.float32)
    mask = ParBatch([image], ParConfig(shrink=1)).refine([probabilities])[0].argmax(axis=0)
    assert ((mask == 1) & ~disc).sum() <= 0.01 * disc.sum()
    assert ((mask == 0) & disc).sum() < 0.25 * (disc & ~seed).sum()


def test_a_flat_image_is_blurred_evenly_and_stays_finite() -> None:
    image = np.full((9, 9, 3), 77, np.uint8)
    start = np.zeros((2, 9, 9), np.float32)
    start[0] = 1
    start[:, 4, 4] = (0, 1)
    found = ParBatch([image], ParConfig(dilations=(1,), iterations=1, position_weight=0, shrink=1)).refine([start])[0]
    np.testing.assert_allclose(found[1, 3:6, 3:6], [[1 / 8] * 3, [1 / 8, 0, 1 / 8], [1 / 8] * 3], atol=1e-6)
    assert found[1].sum() == pytest.approx(1)


@pytest.mark.parametrize("shrink", [1, 2, 4])
def test_images_of_a_batch_do_not_see_each_other(shrink: int) -> None:
    """Three sizes, two of one size with different numbers of labels: an image gets what it gets alone."""
    config = SMALL.model_copy(update={"shrink": shrink})
    images = [_image(12, 17, 3), _image(9, 8, 4), _image(12, 17, 5)]
    starts = [_probabilities(2, 12, 17), _probabilities(3, 9, 8), _probabilities(4, 12, 17)]
    together = ParBatch(images, config).refine(starts)
    for image, start, found in zip(images, starts, together, strict=True):
        assert found.shape == start.shape
        np.testing.assert_allclose(found, ParBatch([image], config).refine([start])[0], atol=1e-6)
        np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)


def test_no_iteration_gives_the_probabilities_back() -> None:
    start = _probabilities(3, 10, 11)
    found = ParBatch([_image(10, 11)], ParConfig(iterations=0, shrink=1)).refine([start])[0]
    np.testing.assert_array_equal(found, start)


def test_the_range_of_the_colours_does_not_matter() -> None:
    """Differences are measured in deviations of the neighbourhood: bytes and fractions give one result."""
    pixels = torch.from_numpy(_image(10, 11)).permute(2, 0, 1)[None].float()
    start = torch.from_numpy(_probabilities(3, 10, 11))[None]
    bytes_, fractions = (ParRefinement(pixels * scale, SMALL).refine(start) for scale in (1, 1 / 255))
    torch.testing.assert_close(bytes_, fractions, atol=1e-4, rtol=0)


@pytest.mark.parametrize("wrong", [{"dilations": []}, {"dilations": [0]}, {"iterations": -1}, {"colour_width": 0}])
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ParConfig.model_validate(wrong)


def test_options_need_no_torch() -> None:
    code = "import sys, stages.ops.par as p, stages.ops.random_walk as r; p.ParConfig(); r.RandomWalkConfig(); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
