import math

import numpy as np
import pytest
import torch

from stages.ops.crf.dense_crf import CrfConfig
from stages.ops.sec import (
    BACKGROUND_DECAY,
    DECAY_CELLS,
    FOREGROUND_DECAY,
    constrain_loss,
    expansion_loss,
    floored_softmax,
    has_class,
    refine_cells,
    seeding_loss,
)


def _cells(*rows: list[float]) -> torch.Tensor:
    """Probabilities (1, C, 1, cells) from one row a cell."""
    return torch.tensor(rows).T[None, :, None, :]


def test_floored_softmax_sums_to_one_and_has_a_finite_logarithm():
    probabilities = floored_softmax(torch.tensor([1e4, 0.0, -1e4])[None, :, None, None])
    assert probabilities.sum().item() == pytest.approx(1)
    assert probabilities.min().item() == pytest.approx(1e-4 / 1.0003, rel=1e-3)


def test_seeding_divides_by_the_cues_of_each_image():
    """The second image has one cue, which counts as much as both of the first; the third has none."""
    probabilities = torch.cat([_cells([0.5, 0.5], [0.25, 0.75], [0.9, 0.1])] * 3)
    cues = torch.tensor([[[0, 1, 255]], [[1, 255, 255]], [[255, 255, 255]]], dtype=torch.uint8)
    expected = ((math.log(2) + math.log(4 / 3)) / 2 + math.log(2) + 0) / 3
    assert seeding_loss(probabilities, cues).item() == pytest.approx(expected)


def test_seeding_names_both_sizes():
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 3\).*\(1, 2, 2\)"):
        seeding_loss(torch.ones(1, 2, 1, 3), torch.zeros(1, 2, 2))


def test_expansion_by_hand():
    probabilities = _cells([0.7, 0.2, 0.1], [0.2, 0.6, 0.2])
    decay_fg, decay_bg = (decay ** (DECAY_CELLS / 2) for decay in (FOREGROUND_DECAY, BACKGROUND_DECAY))
    present = (0.6 + decay_fg * 0.2) / (1 + decay_fg)
    background = (0.7 + decay_bg * 0.2) / (1 + decay_bg)
    expected = -math.log(present) - math.log(1 - 0.2) - math.log(background)
    assert expansion_loss(probabilities, torch.tensor([[1, 0]])).item() == pytest.approx(expected, rel=1e-5)


def test_expansion_of_the_papers_cells_has_the_papers_decays():
    rows = torch.rand(2, DECAY_CELLS, generator=torch.Generator().manual_seed(0)).double() * 0.5
    probabilities = torch.cat([1 - rows.sum(dim=0, keepdim=True), rows])[None, :, None, :]
    best_first = np.sort(probabilities[0, :, 0].numpy(), axis=1)[:, ::-1]
    weights = {decay: decay ** np.arange(DECAY_CELLS) for decay in (0.996, 0.999)}
    present = (best_first[1] * weights[0.996]).sum() / weights[0.996].sum()
    background = (best_first[0] * weights[0.999]).sum() / weights[0.999].sum()
    expected = -np.log(present) - np.log(1 - best_first[2, 0]) - np.log(background)
    assert expansion_loss(probabilities, torch.tensor([[1, 0]])).item() == pytest.approx(expected, rel=1e-5)


def test_expansion_asks_for_the_same_part_of_an_image_whatever_its_cells():
    coarse = floored_softmax(torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)))
    fine = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    losses = [expansion_loss(cells, torch.tensor([[1, 0]])).item() for cells in (coarse, fine)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_expansion_of_an_image_with_no_or_all_classes_is_finite(labels: list[int]):
    logits = torch.zeros(1, 3, 2, 2, requires_grad=True)
    expansion_loss(floored_softmax(logits), torch.tensor([labels])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_expansion_names_the_labels_it_needs():
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        expansion_loss(torch.ones(1, 3, 2, 2), torch.zeros(1, 3))


def test_constrain_is_the_divergence_and_moves_the_network_alone():
    probabilities = _cells([0.5, 0.5]).requires_grad_()
    refined = _cells([0.25, 0.75]).requires_grad_()
    loss = constrain_loss(probabilities, refined)
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    loss.backward()
    assert refined.grad is None
    assert probabilities.grad is not None
    assert constrain_loss(probabilities, probabilities).item() == pytest.approx(0, abs=1e-7)


def test_refined_cells_follow_the_edges_of_the_shrunk_image():
    """Left half red, right half blue; the network is sure of a few cells and leans the wrong way in one of them."""
    image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    image[:, :, :32, 0] = image[:, :, 32:, 2] = 255
    logits = torch.zeros(1, 3, 16, 16)
    logits[:, 0, :, :8] = 2.0
    logits[:, 1, :, 8:] = 2.0
    logits[:, :2, 5, 3] = torch.tensor([0.0, 0.5])
    probabilities = floored_softmax(logits).requires_grad_()
    refined = refine_cells(probabilities, torch.from_numpy(image), CrfConfig(preset="sec", backend="torch"), shrink=12)
    assert refined.shape == probabilities.shape
    assert not refined.requires_grad
    assert torch.allclose(refined.sum(dim=1), torch.ones(1, 16, 16), atol=1e-5)
    best = refined.argmax(dim=1)[0]
    assert (best[:, :8] == 0).all()
    assert (best[:, 8:] == 1).all()


def test_classes_of_a_crop_are_those_of_its_cues():
    cues = torch.tensor([[[0, 3], [255, 1]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    assert has_class(cues, 4).tolist() == [[True, False, True, False], [False] * 4]
