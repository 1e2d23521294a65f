"""Halving and doubling are each other's inverse on ramps, and upsampled values follow the edges of the guide."""

from __future__ import annotations

import numpy as np
import pytest

from stages.ops.crf.guided_upsampling import GuidedUpsampler, _box_mean, double, halve


def test_halve_is_the_mean_of_each_block_and_takes_an_odd_border_twice() -> None:
    values = np.array([[0, 4, 10], [8, 12, 30], [2, 6, 5]], np.uint8)
    np.testing.assert_array_equal(halve(values), [[6, 20], [4, 5]])


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 1), (2, 1)])
def test_double_gives_the_size_back(size: tuple[int, int]) -> None:
    assert double(halve(np.ones((3, *size), np.float32)), size).shape == (3, *size)


def test_double_undoes_halve_of_a_ramp_but_for_the_border() -> None:
    ramp = (np.arange(12)[:, None] + 3.0 * np.arange(10)).astype(np.float32)
    np.testing.assert_allclose(double(halve(ramp), ramp.shape)[1:-1, 1:-1], ramp[1:-1, 1:-1], rtol=1e-6)


@pytest.mark.parametrize("radius_px", [0, 1, 3])
def test_box_mean_is_the_plain_mean_of_each_window(radius_px: int) -> None:
    values = np.random.default_rng(0).random((2, 6, 5)).astype(np.float32)
    padded = np.pad(values, ((0, 0), (radius_px,) * 2, (radius_px,) * 2), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius_px + 1,) * 2, axis=(1, 2))
    np.testing.assert_allclose(_box_mean(values, radius_px), windows.mean((-2, -1)), rtol=1e-5)


def _disc(height: int = 61, width: int = 83) -> tuple[np.ndarray, np.ndarray]:
    """A slightly noisy two-coloured image, and which of its pixels are of the second colour."""
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - 28) ** 2 + (columns - 37) ** 2 < 20**2
    colours = np.where(inside[..., None], (200, 80, 60), (40, 90, 150))
    noisy = colours + np.random.default_rng(0).normal(0, 3, colours.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), inside


def test_a_half_resolution_mask_gets_the_full_images_edge_back() -> None:
    image, inside = _disc()
    coarse = halve(inside[None].astype(np.float32)).round()
    guided = GuidedUpsampler(image)(coarse)[0] > 0.5
    plain = double(coarse, inside.shape)[0] > 0.5
    assert (guided != inside).sum() < 0.25 * (plain != inside).sum()


def test_the_sum_over_labels_is_kept() -> None:
    image, _ = _disc()
    shares = np.random.default_rng(1).dirichlet(np.ones(4), (31, 42)).astype(np.float32)
    np.testing.assert_allclose(GuidedUpsampler(image)(np.moveaxis(shares, -1, 0)).sum(axis=0), 1, atol=1e-4)


def test_a_flat_image_smooths() -> None:
    values = np.random.default_rng(2).random((1, 10, 10)).astype(np.float32)
    flat = GuidedUpsampler(np.full((20, 20, 3), 77, np.uint8))(values)
    np.testing.assert_allclose(flat, double(_box_mean(_box_mean(values, 2), 2), (20, 20)), atol=1e-5)
