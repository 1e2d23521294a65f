import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.ops.attention import MapMean, map_size, normalise_attention, quantise_attention
from stages.ops.cells import CellGrid


def test_normalise_divides_each_map_by_its_own_peak():
    scores = torch.tensor([[[[-1.0, 2.0], [1.0, 4.0]], [[0.5, 0.0], [0.0, 0.25]]]])
    expected = torch.tensor([[[[0.0, 0.5], [0.25, 1.0]], [[1.0, 0.0], [0.0, 0.5]]]])
    torch.testing.assert_close(normalise_attention(scores), expected, rtol=0, atol=0)


def test_normalise_keeps_a_map_without_evidence_at_zero_and_its_gradient_finite():
    scores = torch.tensor([[[[-1.0, -2.0]], [[0.0, 0.0]]]], requires_grad=True)
    attention = normalise_attention(scores)
    attention.sum().backward()
    assert attention.abs().sum() == 0
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_normalise_reaches_one_even_for_the_smallest_floats():
    assert normalise_attention(torch.full((1, 1, 1, 2), 1e-45)).tolist() == [[[[1.0, 1.0]]]]


def test_normalise_asks_for_the_batch_dimension():
    with pytest.raises(ValueError, match=r"got \(3, 5, 7\); add the batch dimension"):
        normalise_attention(torch.zeros(3, 5, 7))


def test_map_size_rounds_up():
    assert map_size((375, 500), 4) == (94, 125)
    assert map_size((1, 2), 8) == (1, 1)


def test_map_mean_by_hand():
    mean, even = MapMean((1, 2)), CellGrid.even((1, 2), (4, 8))
    mean.add(torch.tensor([[[1.0, 3.0]]]), image_size=(4, 8), cells=even)
    mean.add(torch.tensor([[[1.0, 5.0]]]), image_size=(4, 8), cells=even, is_flipped=True)
    torch.testing.assert_close(mean.mean(), torch.tensor([[[3.0, 2.0]]]))


def test_map_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no maps were added"):
        MapMean((2, 2)).mean()


def test_quantise_by_hand():
    maps = np.array([[[0.0, 2.0], [1.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]]], dtype=np.float32)
    quantised, peaks = quantise_attention(maps)
    assert quantised.tolist() == [[[0, 255], [128, 64]], [[0, 0], [0, 0]]]
    assert peaks.tolist() == [2.0, 0.0]
    assert (quantised.dtype, peaks.dtype) == (np.uint8, np.float32)


def test_quantise_takes_no_maps_at_all():
    quantised, peaks = quantise_attention(np.zeros((0, 3, 4), dtype=np.float32))
    assert quantised.shape == (0, 3, 4)
    assert peaks.shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_quantise_refuses_what_is_not_a_number(bad):
    with pytest.raises(ValueError, match="must be finite"):
        quantise_attention(np.array([[[1.0, bad]]], dtype=np.float32))


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=12))
def test_quantised_maps_are_within_half_a_step(values):
    maps = np.array(values, dtype=np.float32)[None, None]
    quantised, peaks = quantise_attention(maps)
    restored = quantised / 255 * peaks[0].astype(np.float64)
    assert np.abs(restored - maps).max() <= float(peaks[0]) * (0.5 / 255 + 1e-6)
    assert quantised.max() == (255 if maps.max() > 0 else 0)
