"""The random walk: against matrices written by hand, within and across regions, in both forms of affinity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stages.errors import InputError
from stages.ops.random_walk import RandomWalkConfig, walk_maps


def _features(height: int = 4, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.rand(6, height, width, generator=torch.Generator().manual_seed(seed))


def _maps(height: int = 4, width: int = 5) -> torch.Tensor:
    return torch.rand(2, height, width, generator=torch.Generator().manual_seed(9))


def _matrix(features: torch.Tensor, beta: float, radius: int | None) -> np.ndarray:
    """The affinities, pair by pair, in float64."""
    depth, height, width = features.shape
    flat = features.reshape(depth, -1).numpy().astype(np.float64)
    matrix = np.zeros((height * width, height * width))
    for i in range(height * width):
        for j in range(height * width):
            rows, columns = i // width - j // width, i % width - j % width
            if radius is None or rows**2 + columns**2 < radius**2:
                cosine = flat[:, i] @ flat[:, j] / np.linalg.norm(flat[:, i]) / np.linalg.norm(flat[:, j])
                matrix[i, j] = max(cosine, 0) ** beta
    return matrix


@pytest.mark.parametrize("radius", [None, 2, 3])
@pytest.mark.parametrize("sinkhorn", [0, 2])
def test_a_walk_is_a_power_of_the_normalised_matrix(radius: int | None, sinkhorn: int) -> None:
    features, maps = _features(), _maps()
    config = RandomWalkConfig(beta=3, radius_cells=radius, steps=4, sinkhorn=sinkhorn)
    matrix = _matrix(features, 3, radius)
    matrix /= matrix.sum(axis=1, keepdims=True)
    for _ in range(sinkhorn):
        matrix /= matrix.sum(axis=0, keepdims=True)
        matrix /= matrix.sum(axis=1, keepdims=True)
    expected = np.linalg.matrix_power(matrix, 4) @ maps.flatten(1).numpy().T
    np.testing.assert_allclose(walk_maps(maps, features, config).flatten(1), expected.T, atol=1e-5)


def test_a_radius_over_the_whole_map_is_all_pairs() -> None:
    features, maps = _features(), _maps()
    local, dense = (walk_maps(maps, features, RandomWalkConfig(radius_cells=radius)) for radius in (8, None))
    torch.testing.assert_close(local, dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("radius", [None, 5])
def test_evidence_fills_its_region_and_no_other(radius: int | None) -> None:
    """Two halves with features at a right angle: a seed in one becomes even there, and zero stays zero beside it."""
    features = torch.zeros(2, 6, 12)
    features[0, :, :6], features[1, :, 6:] = 1, 1
    maps = torch.zeros(1, 6, 12)
    maps[0, 2, 2] = 1
    found = walk_maps(maps, features, RandomWalkConfig(radius_cells=radius, steps=200))[0]
    assert (found[:, 6:] == 0).all()
    assert found[:, :6].min() > 0.5 * found.max()


def test_cells_without_features_keep_what_they_have() -> None:
    features = _features()
    features[:, 1, 1] = 0
    maps = _maps()
    for radius in (None, 3):
        found = walk_maps(maps, features, RandomWalkConfig(radius_cells=radius, steps=5))
        torch.testing.assert_close(found[:, 1, 1], maps[:, 1, 1])
        assert torch.isfinite(found).all()


def test_no_value_rises_above_the_peak_and_no_step_changes_nothing() -> None:
    features, maps = _features(), _maps()
    found = walk_maps(maps, features, RandomWalkConfig(sinkhorn=3))
    assert (found.amax(dim=(1, 2)) <= maps.amax(dim=(1, 2)) + 1e-6).all()
    torch.testing.assert_close(walk_maps(maps, features, RandomWalkConfig(steps=0)), maps)


def test_only_evidence_in_the_boxes_of_strong_parts_walks() -> None:
    """An L of strong cells has a box of 2 × 3, the weak cell in its corner is inside, the one beside it is not."""
    maps = torch.zeros(1, 4, 5)
    maps[0, 0, 0] = maps[0, 1, 0] = maps[0, 1, 1] = maps[0, 1, 2] = 1.0
    maps[0, 0, 2] = maps[0, 0, 4] = 0.3
    found = walk_maps(maps, _features(), RandomWalkConfig(steps=0, box_threshold=0.4))[0]
    assert found[0, 2] == pytest.approx(0.3)
    assert found[0, 4] == 0
    assert found.sum() == pytest.approx(4.3)


def test_too_many_cells_for_all_pairs_are_refused() -> None:
    features = torch.zeros(1, 129, 128)
    with pytest.raises(InputError, match=r"at most 16384 cells, found 129 × 128; set radius_cells"):
        walk_maps(torch.zeros(1, 129, 128), features, RandomWalkConfig(radius_cells=None))


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"radius_cells": 1}, {"steps": -1}, {"layer": ""}, {"sinkhorn": 101}])
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RandomWalkConfig.model_validate(wrong)
