"""Run lengths by hand, and those of the tools' own encoders."""

from __future__ import annotations

import numpy as np
import pytest

from stages.annotation.labelstudio import decode_brush, encode_brush
from stages.annotation.shapes import decode_rle, encode_rle, find_regions, pixels_to_runs, runs_to_pixels

pytest.importorskip("pycocotools")

PIXELS = np.array([[0, 1, 1], [1, 1, 0]], dtype=bool)


def test_run_lengths_begin_with_pixels_that_are_not_set():
    assert pixels_to_runs(PIXELS) == [1, 4, 1]
    assert pixels_to_runs(~PIXELS) == [0, 1, 4, 1]
    for pixels in (PIXELS, ~PIXELS, np.zeros((2, 3), dtype=bool), np.ones((2, 3), dtype=bool)):
        np.testing.assert_array_equal(runs_to_pixels(pixels_to_runs(pixels), (2, 3)), pixels)


def test_coco_goes_down_the_columns():
    # column by column: 0 1 | 1 1 | 1 0; counts 1 4 1 as text are 48 + count
    assert encode_rle(PIXELS) == {"size": [2, 3], "counts": "141"}
    np.testing.assert_array_equal(decode_rle({"size": [2, 3], "counts": "141"}, (2, 3)), PIXELS)
    np.testing.assert_array_equal(decode_rle({"size": [2, 3], "counts": [1, 4, 1]}, (2, 3)), PIXELS)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_coco_text_of_any_length_reads_back(share: float):
    """Long runs take several characters, and differences are negative."""
    pixels = np.random.default_rng(1).random((211, 190)) < share
    pixels[:, 60:160] = True
    np.testing.assert_array_equal(decode_rle(encode_rle(pixels), pixels.shape), pixels)


def test_brush_bytes_are_those_of_label_studio():
    """label_studio_converter 0.0.59, brush.encode_rle(repeat([0, 1, 1, 1, 1, 0], 4) * 255)."""
    expected = [0, 0, 0, 24, 57, 27, 252, 96, 23, 255, 227, 0, 0]
    assert encode_brush(PIXELS) == expected
    np.testing.assert_array_equal(decode_brush(expected, (2, 3)), PIXELS)


def test_a_brush_of_single_values_reads():
    """The browser writes values that differ one by one: x = 0, then size and values."""
    bits = f"{4:032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    bits += "0" + "00" + f"{3:03b}" + f"{9:08b}{9:08b}{9:08b}{200:08b}"
    bits += "0" * (-len(bits) % 8)
    rle = [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]
    assert decode_brush(rle, (1, 1)).tolist() == [[True]]


def test_long_brush_runs_are_cut():
    pixels = np.zeros((300, 300), dtype=bool)
    pixels[5, 7] = True
    np.testing.assert_array_equal(decode_brush(encode_brush(pixels), pixels.shape), pixels)


def test_masks_are_one_region_a_class_and_polygons_one_an_object():
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[1:5, 1:5] = mask[10:19, 10:19] = 1
    mask[1:5, 10:15] = 255
    names = {1: "cat", 2: "dog", 255: "unsure"}
    assert [(region.name, region.pixels.sum()) for region in find_regions(mask, names, "masks")] == [
        ("cat", 16 + 81),
        ("unsure", 20),
    ]
    found = find_regions(mask, names, "polygons")
    assert [(region.name, region.pixels.sum()) for region in found] == [("cat", 81), ("unsure", 20), ("cat", 16)]
    assert found[2].ring is not None
    assert sorted(found[2].ring) == [(1.25, 1.25), (1.25, 4.75), (4.75, 1.25), (4.75, 4.75)]
