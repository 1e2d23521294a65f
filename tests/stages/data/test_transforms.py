"""The augmentation: a pure function of the seed, masks stay masks, and its draws are independent of each other."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.transforms import (
    IMAGE_MEAN,
    IMAGE_STD,
    PADDING_COLOUR,
    AugmentConfig,
    Augmenter,
    build_pipeline,
    seed_pipeline,
    to_network_input,
    to_pixels,
)

FULL = AugmentConfig(crop_px=32, scale=(0.5, 2.0), color_jitter=0.3)


def picture(height=40, width=56, seed=0):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = random.choice(np.array([0, 3, 20, 255], dtype=np.uint8), (height, width))
    return image, mask


@pytest.fixture(scope="module")
def augmenter():
    return Augmenter(FULL)


def test_equal_seeds_give_equal_crops_whatever_came_before(augmenter):
    image, mask = picture()
    first = augmenter(image, mask, seed=7)
    for seed in (1, 2, 3):
        augmenter(*picture(seed=seed), seed=seed)
    fresh = Augmenter(FULL)
    for other in (augmenter, fresh, pickle.loads(pickle.dumps(augmenter))):  # noqa: S301 - our own bytes
        again = other(image, mask, seed=7)
        np.testing.assert_array_equal(again[0], first[0])
        np.testing.assert_array_equal(again[1], first[1])
    assert not np.array_equal(augmenter(image, mask, seed=8)[0], first[0])


def test_the_crop_of_the_image_does_not_depend_on_whether_a_mask_comes_along(augmenter):
    image, mask = picture()
    alone, nothing = augmenter(image, seed=11)
    assert nothing is None
    np.testing.assert_array_equal(alone, augmenter(image, mask, seed=11)[0])


def test_threads_share_an_augmenter(augmenter):
    image, mask = picture()
    expected = [augmenter(image, mask, seed=seed)[0] for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: augmenter(image, mask, seed=seed)[0], range(40)))
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(5, 70), width=st.integers(5, 70), seed=st.integers(0, 2**32 - 1))
def test_every_size_gives_a_crop_whose_mask_has_no_new_value(augmenter, height, width, seed):
    image, mask = picture(height, width)
    crop, mask_crop = augmenter(image, mask, seed=seed)
    assert crop.shape == (32, 32, 3)
    assert crop.dtype == mask_crop.dtype == np.uint8
    assert mask_crop.shape == (32, 32)
    assert crop.flags.c_contiguous
    assert set(np.unique(mask_crop)) <= {0, 3, 20, 255}


def test_padding_is_mean_colour_and_255():
    image, mask = np.full((10, 12, 3), 200, np.uint8), np.full((10, 12), 4, np.uint8)
    crop, mask_crop = Augmenter(AugmentConfig(crop_px=32, scale=(1, 1)))(image, mask, seed=0)
    inside = mask_crop == 4
    assert inside.sum() == 120
    assert set(np.unique(mask_crop)) == {4, 255}
    assert (crop[inside] == 200).all()
    assert (crop[~inside] == np.array(PADDING_COLOUR)).all()
    normalised = to_network_input(torch.from_numpy(crop[None]), torch.device("cpu"))
    assert normalised[0][:, torch.from_numpy(~inside)].abs().max() < 0.01


def test_image_and_mask_move_together():
    _, mask = picture()
    mask[mask == 255] = 7
    image = np.repeat(mask[:, :, None] * 10, 3, axis=2)
    for seed in range(10):
        crop, mask_crop = Augmenter(AugmentConfig(crop_px=24, scale=(1, 1)))(image, mask, seed=seed)
        np.testing.assert_array_equal(crop[:, :, 0], mask_crop * 10)


def test_the_draws_are_independent_of_each_other():
    """Scale, corner and flip of 400 seeds are uncorrelated.

    albumentations gives all transforms the same seed, which makes the corner a function of the scale (correlation 1).
    """
    pipeline = build_pipeline(AugmentConfig(crop_px=16, scale=(0.5, 2.0)))
    scale, crop, flip = pipeline.transforms
    drawn = []
    for seed in range(400):
        seed_pipeline(pipeline, seed)
        # each transform's first two numbers: p and the parameter
        drawn.append(
            [t.py_random.random() for t in (scale, crop, flip)] + [t.py_random.random() for t in (scale, crop)]
        )
    correlation = np.corrcoef(np.array(drawn).T) - np.eye(5)
    assert np.abs(correlation).max() < 0.2
    assert np.array(drawn).mean(0) == pytest.approx([0.5] * 5, abs=0.06)


def test_the_rescale_covers_its_range_and_flip_is_a_coin():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, :20] = 255  # left half white
    pipeline = build_pipeline(AugmentConfig(crop_px=16, scale=(0.5, 2.0)))
    scales, flips = [], []
    for seed in range(200):
        seed_pipeline(pipeline, seed)
        pipeline(image=image)
        scales.append(pipeline.transforms[0].params["scale"])
        flips.append(bool(pipeline.transforms[2].params))
    assert 0.5 <= min(scales) < 0.55
    assert 1.95 < max(scales) <= 2.0
    assert np.mean(flips) == pytest.approx(0.5, abs=0.1)


def test_short_side_keeps_the_aspect_and_comes_first():
    image = np.zeros((100, 200, 3), np.uint8)
    crop_px = 64
    mask = np.full((100, 200), 1, np.uint8)
    pipeline = build_pipeline(AugmentConfig(crop_px=crop_px, scale=(1, 1), short_side_px=32))
    seed_pipeline(pipeline, 0)
    resized = pipeline.transforms[0](image=image, mask=mask)
    assert resized["image"].shape == (32, 64, 3)
    _, mask_crop = Augmenter(AugmentConfig(crop_px=crop_px, scale=(1, 1), short_side_px=32))(image, mask, seed=0)
    assert (mask_crop == 1).sum() == 32 * 64


def test_flip_false_and_jitter_zero_leave_a_plain_crop():
    config = AugmentConfig(crop_px=40, scale=(1, 1), flip=False)
    image, mask = picture(40, 40)
    for seed in range(8):
        crop, mask_crop = Augmenter(config)(image, mask, seed=seed)
        np.testing.assert_array_equal(crop, image)
        np.testing.assert_array_equal(mask_crop, mask)


def test_jitter_changes_colours_but_not_the_mask():
    image, mask = picture(40, 40)
    config = AugmentConfig(crop_px=40, scale=(1, 1), flip=False, color_jitter=0.5)
    crop, mask_crop = Augmenter(config)(image, mask, seed=1)
    assert not np.array_equal(crop, image)
    np.testing.assert_array_equal(mask_crop, mask)


def test_a_mask_of_another_size_is_refused(augmenter):
    image, mask = picture()
    with pytest.raises(ValueError, match=r"mask must have the image's size \(40, 56\), got \(40, 55\)"):
        augmenter(image, mask[:, :55], seed=0)


def test_aligned_masks_get_the_crop_of_the_mask_alone(augmenter):
    image, mask = picture()
    other = np.random.default_rng(5).integers(0, 255, mask.shape, dtype=np.uint8)
    for seed in range(6):
        crop, (first, second) = augmenter.crop_aligned(image, [mask, other], seed=seed)
        alone, mask_crop = augmenter(image, mask, seed=seed)
        np.testing.assert_array_equal(crop, alone)
        np.testing.assert_array_equal(first, mask_crop)
        np.testing.assert_array_equal(second, augmenter(image, other, seed=seed)[1])
    with pytest.raises(ValueError, match=r"image's size \(40, 56\), got \[\(40, 56\), \(40, 55\)\]"):
        augmenter.crop_aligned(image, [mask, other[:, :55]], seed=0)


def test_network_input_by_hand():
    images = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    found = to_network_input(images, torch.device("cpu"))
    expected = [(value / 255 - m) / s for value, m, s in zip((0, 128, 255), IMAGE_MEAN, IMAGE_STD, strict=True)]
    assert found.shape == (1, 3, 1, 1)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"uint8 \(B, H, W, 3\), got torch.uint8 \(1, 3, 4, 5\)"):
        to_network_input(torch.zeros((1, 3, 4, 5), dtype=torch.uint8), torch.device("cpu"))


@pytest.mark.parametrize("scale", [(0.0, 1.0), (1.5, 0.5), (1.0, 11.0)])
def test_a_scale_out_of_bounds_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be"):
        AugmentConfig(scale=scale)


def test_the_module_loads_neither_torch_nor_albumentations():
    code = (
        "import sys, stages.data.transforms as t; t.Augmenter(t.AugmentConfig()); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'albumentations', 'cv2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_way_into_the_network_can_be_gone_back():
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    assert torch.equal(to_pixels(to_network_input(every_byte, torch.device("cpu"))), every_byte)


def test_squash_shows_the_whole_image_at_every_seed():
    image, mask = np.zeros((40, 80, 3), dtype=np.uint8), np.zeros((40, 80), dtype=np.uint8)
    image[:, 60:], mask[:, 60:] = 200, 3
    squash = Augmenter(AugmentConfig(crop_px=32, scale=(1.0, 1.0), resize="squash", flip=False))
    for seed in (1, 2):
        crop, mask_crop = squash(image, mask, seed=seed)
        assert crop.shape == (32, 32, 3)
        assert (mask_crop == np.where(np.arange(32) < 24, 0, 3)).all()
        assert (crop[:, 25:] == 200).all()
        assert (crop[:, :23] == 0).all()
    flipped = Augmenter(AugmentConfig(crop_px=32, scale=(1.0, 1.0), resize="squash"))
    first_columns = {int(flipped(image, mask, seed=seed)[1][0, 0]) for seed in range(20)}
    assert first_columns == {0, 3}


@pytest.mark.parametrize("other", [{"scale": (0.5, 1.5)}, {"scale": (1.0, 1.0), "short_side_px": 64}])
def test_squash_leaves_nothing_to_rescale(other):
    with pytest.raises(ValueError, match=r"set scale: \[1, 1\] and leave short_side_px"):
        AugmentConfig(crop_px=32, resize="squash", **other)


def test_a_whole_image_is_looked_at_as_it_was_trained_on():
    assert AugmentConfig(crop_px=321, scale=(1.0, 1.0), resize="squash").seen_short_side_px == 321
    assert AugmentConfig(crop_px=321, short_side_px=256).seen_short_side_px == 256
    assert AugmentConfig().seen_short_side_px is None
