import math

import numpy as np
import pytest
import torch

from stages.ops.losses import (
    balanced_segmentation_cross_entropy,
    bootstrapped_cross_entropy,
    multilabel_soft_margin,
    segmentation_cross_entropy,
    smoothed_cross_entropy,
    softmax_cross_entropy,
)


def test_multilabel_soft_margin_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/2 and 3/4
    loss = multilabel_soft_margin(logits, torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_multilabel_soft_margin_stays_finite_for_huge_logits_and_bf16():
    logits = torch.tensor([[1e4, -1e4]], dtype=torch.bfloat16)
    loss = multilabel_soft_margin(logits, torch.tensor([[1.0, 0.0]]))
    assert loss.dtype == torch.float32
    assert loss.item() == 0.0


def test_softmax_cross_entropy_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # 3/4 and 1/4; 1/2 and 1/2
    loss = softmax_cross_entropy(logits, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    shares = softmax_cross_entropy(logits[:1], torch.tensor([[0.25, 0.75]]))
    assert shares.item() == pytest.approx(0.25 * math.log(4 / 3) + 0.75 * math.log(4))
    assert softmax_cross_entropy(logits.bfloat16(), torch.eye(2)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(2, 3\)"):
        softmax_cross_entropy(logits, torch.zeros(2, 3))


def test_multilabel_soft_margin_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        multilabel_soft_margin(torch.zeros(2, 3), torch.zeros(2, 4))


def _logits(probabilities: list[list[float]]) -> torch.Tensor:
    """One row of pixels with these class probabilities, as (1, C, 1, W)."""
    return torch.tensor(probabilities).log().T[None, :, None, :].requires_grad_()


def test_segmentation_cross_entropy_drops_255():
    logits = _logits([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])
    loss = segmentation_cross_entropy(logits, torch.tensor([[[0, 1, 255]]], dtype=torch.uint8))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[..., 2].abs().max() == 0


def test_balanced_cross_entropy_weighs_background_as_much_as_objects():
    logits = _logits([[0.5, 0.5], [0.25, 0.75], [0.125, 0.875], [0.75, 0.25], [0.5, 0.5]])
    masks = torch.tensor([[[0, 0, 0, 1, 255]]])
    background = (math.log(2) + math.log(4) + math.log(8)) / 3
    assert balanced_segmentation_cross_entropy(logits, masks).item() == pytest.approx((background + math.log(4)) / 2)


def test_a_weight_is_how_much_a_pixel_counts():
    """The weight of a pixel of 255 is in neither sum."""
    logits = _logits([[0.5, 0.5], [0.25, 0.75], [0.125, 0.875], [0.9, 0.1]])
    masks = torch.tensor([[[0, 0, 1, 255]]])
    weights = torch.tensor([[[1.0, 0.25, 0.5, 1.0]]])
    plain = (math.log(2) + 0.25 * math.log(4) + 0.5 * math.log(8 / 7)) / 1.75
    assert segmentation_cross_entropy(logits, masks, weights).item() == pytest.approx(plain)
    background = (math.log(2) + 0.25 * math.log(4)) / 1.25
    foreground = 0.5 * math.log(8 / 7)  # weights that sum to less than one pixel are not blown up
    balanced = balanced_segmentation_cross_entropy(logits, masks, weights)
    assert balanced.item() == pytest.approx((background + foreground) / 2)


@pytest.mark.parametrize("loss", [segmentation_cross_entropy, balanced_segmentation_cross_entropy])
def test_weights_of_one_change_nothing_and_of_zero_leave_nothing(loss):
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masks = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    masks[0, 0] = 255
    assert loss(logits, masks, torch.ones(2, 4, 5)).item() == loss(logits, masks).item()
    nothing = loss(logits, masks, torch.zeros(2, 4, 5))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0
    with pytest.raises(ValueError, match=r"expected weights \(2, 4, 5\) as the masks, got \(2, 4, 4\)"):
        loss(logits, masks, torch.ones(2, 4, 4))


@pytest.mark.parametrize("value", [0, 1])
def test_balanced_cross_entropy_of_one_side_is_the_plain_one(value):
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    masks = torch.full((2, 4, 5), value)
    masks[0, 0] = 255
    torch.testing.assert_close(
        balanced_segmentation_cross_entropy(logits, masks), segmentation_cross_entropy(logits, masks)
    )


@pytest.mark.parametrize("loss", [segmentation_cross_entropy, balanced_segmentation_cross_entropy])
def test_nothing_labelled_gives_zero_and_zero_gradients(loss):
    logits = torch.randn(1, 3, 2, 2).requires_grad_()
    value = loss(logits, torch.full((1, 2, 2), 255, dtype=torch.uint8))
    value.backward()
    assert value.item() == 0.0
    np.testing.assert_array_equal(logits.grad, np.zeros((1, 3, 2, 2)))


def test_segmentation_losses_want_logits_at_the_size_of_the_masks():
    with pytest.raises(ValueError, match="upsample the logits"):
        segmentation_cross_entropy(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.uint8))


def test_bootstrapping_believes_the_network_a_little():
    """The mask says 1 where the network says 0: a fifth of the target is 0; a pixel of 255 stays out."""
    logits = _logits([[0.75, 0.25], [0.9, 0.1]])
    masks = torch.tensor([[[1, 255]]])
    expected = 0.8 * math.log(4) + 0.2 * math.log(4 / 3)
    assert bootstrapped_cross_entropy(logits, masks).item() == pytest.approx(expected)
    assert bootstrapped_cross_entropy(logits, masks, trust=1.0).item() == pytest.approx(math.log(4))


def test_smoothing_spreads_a_part_of_the_target():
    logits = _logits([[0.75, 0.25], [0.9, 0.1]])
    masks = torch.tensor([[[1, 255]]])
    expected = 0.9 * math.log(4) + 0.05 * (math.log(4) + math.log(4 / 3)) + 0.05 * 0
    assert smoothed_cross_entropy(logits, masks).item() == pytest.approx(expected)
    assert smoothed_cross_entropy(logits, masks, smoothing=0.0).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("loss", [bootstrapped_cross_entropy, smoothed_cross_entropy])
def test_losses_for_noise_of_nothing_are_zero(loss):
    logits = torch.zeros(1, 2, 2, 2, requires_grad=True)
    value = loss(logits, torch.full((1, 2, 2), 255))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0
