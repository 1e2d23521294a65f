"""Windows cover an image, blend without a seam, and give what the whole image gives where the network is local."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from stages.ops.multi_scale import predict_logits
from stages.ops.windows import (
    iter_blended_rows,
    predict_in_windows,
    resized_argmax,
    window_starts,
    window_weights,
)

NUM_CLASSES = 3


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (150, 97, 3), dtype=np.uint8)


class Local(nn.Module):
    """Logits that depend on 5 × 5 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, NUM_CLASSES, 5, padding=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images) * 8


def scorer(model: nn.Module):
    def score(windows: np.ndarray) -> torch.Tensor:
        images = torch.from_numpy(windows.copy()).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            return torch.softmax(predict_logits(model, images), dim=1)

    return score


def whole(model: nn.Module, image: np.ndarray) -> torch.Tensor:
    return scorer(model)(image[None])[0]


@pytest.mark.parametrize(("length", "window"), [(100, 100), (101, 100), (1000, 64), (65, 64), (7, 3), (1, 1)])
def test_windows_cover_the_side_and_overlap(length: int, window: int):
    starts = window_starts(length, window)
    assert starts[0] == 0
    assert starts[-1] + window == length
    assert starts == sorted(starts)
    assert all(after - before <= window - window // 4 for before, after in itertools.pairwise(starts))
    assert all(start % 32 == 0 for start in starts[:-1]) or window < 64
    weights = window_weights(window)
    assert weights.shape == (window,)
    assert 0 < float(weights.min()) <= float(weights.max()) <= 1


@pytest.mark.parametrize("window", [32, 48, 97, 400])
def test_blended_probabilities_are_those_of_the_whole_image(image: np.ndarray, window: int):
    model = Local()
    expected = whole(model, image)
    rows = [
        (top, found.clone())
        for top, found in iter_blended_rows(scorer(model), image, num_classes=NUM_CLASSES, window_px=window)
    ]
    assert [top for top, _ in rows] == np.cumsum([0, *(found.shape[1] for _, found in rows[:-1])]).tolist()
    found = torch.cat([part for _, part in rows], dim=1)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(image.shape[:2]))
    difference = (found - expected).abs().amax(dim=0)
    is_exact = difference < 1e-5
    if window >= max(image.shape[:2]):
        assert is_exact.all()
    else:  # a window's border lacks neighbours: there its weight is smallest
        assert is_exact.float().mean() > 0.6
        assert float(difference.mean()) < 0.02


def test_a_wide_image_is_the_tall_one_turned(image: np.ndarray):
    """Strips lie along the shorter side, and the network still sees windows upright."""
    tall_model = Local()
    wide_model = Local()
    wide_model.conv.weight.data = tall_model.conv.weight.data.transpose(2, 3).contiguous()
    tall = predict_in_windows(scorer(tall_model), image, num_classes=NUM_CLASSES, window_px=48)
    wide_image = np.ascontiguousarray(image.transpose(1, 0, 2))
    wide = predict_in_windows(scorer(wide_model), wide_image, num_classes=NUM_CLASSES, window_px=48)
    assert wide.shape == wide_image.shape[:2]
    np.testing.assert_array_equal(wide.T, tall)


@pytest.mark.parametrize("shape", [(150, 97), (97, 150)])
def test_no_more_than_a_strip_is_ever_kept(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    asked = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes: asked.append(sizes) or zeros(*sizes))
    predict_in_windows(scorer(Local()), np.zeros((*shape, 3), np.uint8), num_classes=NUM_CLASSES, window_px=32)
    assert max(np.prod(sizes) for sizes in asked) == NUM_CLASSES * 32 * min(shape)


@pytest.mark.parametrize("size", [(31, 90), (300, 200), (40, 60)])
def test_resized_argmax_is_that_of_interpolate(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stages.ops.windows._CHUNK_VALUES", 4 * 90 * 7)  # several chunks
    probabilities = torch.rand(4, 40, 60, generator=torch.Generator().manual_seed(1))
    expected = functional.interpolate(probabilities[None], size=size, mode="bilinear", align_corners=False)[0]
    found = resized_argmax(probabilities, size)
    assert found.shape == size
    assert (found == expected.argmax(dim=0).numpy()).mean() > 0.999  # a tie of two floats may fall either way


def test_another_mask_size_keeps_the_objects(image: np.ndarray):
    half = image.copy()
    half[:, :48], half[:, 48:] = 0, 255
    model = nn.Conv2d(3, 2, 1, bias=True)
    with torch.no_grad():
        model.weight[0], model.weight[1] = -4, 4
        model.bias[0], model.bias[1] = 6, -6
    mask = predict_in_windows(scorer(model), half, num_classes=2, window_px=48, mask_size=(301, 194))
    assert mask.shape == (301, 194)
    assert (mask[:, :94] == 0).all()
    assert (mask[:, 99:] == 1).all()
