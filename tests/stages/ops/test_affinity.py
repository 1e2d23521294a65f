"""Learned affinity: the loss against pairs counted by hand, the walk against a matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.ops.affinity import pair_losses, walk_learned
from stages.ops.random_walk import offsets_inside


def _embedding(height: int = 4, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.rand(6, height, width, generator=torch.Generator().manual_seed(seed))


def _by_hand(embedding: np.ndarray, labels: np.ndarray, radius: int) -> dict[str, float]:
    terms: dict[str, list[float]] = {"background": [], "object": [], "between": []}
    cells = list(np.ndindex(labels.shape))
    for place, one in enumerate(cells):
        for other in cells[place + 1 :]:
            if sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) >= radius**2 or 255 in (
                labels[one],
                labels[other],
            ):
                continue
            affinity = np.exp(-np.abs(embedding[(slice(None), *one)] - embedding[(slice(None), *other)]).mean())
            if labels[one] != labels[other]:
                terms["between"].append(-np.log(1 + 1e-5 - affinity))
            else:
                terms["object" if labels[one] else "background"].append(-np.log(affinity + 1e-5))
    return {name: float(np.mean(values)) if values else 0.0 for name, values in terms.items()}


def test_the_loss_counts_each_labelled_pair_within_the_radius_once() -> None:
    embedding = _embedding()
    labels = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 255, 1, 1], [0, 2, 2, 255, 1], [0, 2, 2, 0, 0]])
    found = pair_losses(embedding[None], labels[None], radius=3)
    expected = _by_hand(embedding.double().numpy(), labels.numpy(), 3)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5), name
    assert all(value > 0 for value in expected.values())
    balanced = expected["background"] / 4 + expected["object"] / 4 + expected["between"] / 2
    assert float(found["loss"]) == pytest.approx(balanced, rel=1e-5)


@pytest.mark.parametrize("label", [0, 255])
def test_what_there_are_no_pairs_of_costs_nothing(label: int) -> None:
    embedding = torch.zeros(1, 2, 3, 3, requires_grad=True)
    found = pair_losses(embedding, torch.full((1, 3, 3), label), radius=5)
    found["loss"].backward()
    assert embedding.grad is not None
    assert torch.isfinite(embedding.grad).all()
    means = {name: float(value.detach()) for name, value in found.items()}
    assert means["object"] == means["between"] == 0
    assert means["background"] == pytest.approx(0, abs=1e-4)


def test_the_walk_is_that_of_psa_s_squared_matrix() -> None:
    embedding, radius, beta = _embedding(), 3, 4.0
    maps = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(9))
    flat = embedding.flatten(1).T.double()
    matrix = np.exp(-beta * (flat[:, None] - flat[None]).abs().mean(dim=2).numpy())
    inside = set(offsets_inside(radius))
    for i, j in np.ndindex(20, 20):
        if (j // 5 - i // 5, j % 5 - i % 5) not in inside:
            matrix[i, j] = 0
    matrix /= matrix.sum(axis=1, keepdims=True)
    for _ in range(3):
        matrix = matrix @ matrix
    found = walk_learned(maps, embedding, radius=radius, beta=beta, log2_steps=3)
    np.testing.assert_allclose(found.flatten(1).numpy(), maps.flatten(1).numpy() @ matrix.T, rtol=1e-4)


def test_evidence_stays_inside_an_edge_of_the_embedding() -> None:
    embedding = torch.zeros(1, 6, 8)
    embedding[:, :, 4:] = 9
    maps = torch.zeros(1, 6, 8)
    maps[0, 3, 1] = 1
    found = walk_learned(maps, embedding, radius=3, beta=10, log2_steps=6)[0]
    assert float(found[:, 4:].max()) == pytest.approx(0, abs=1e-6)
    assert float(found[:, :4].min()) > 0.5 * float(found.max())
