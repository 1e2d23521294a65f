"""Pixels as people see them: EXIF orientation, file formats, and images too small to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.contracts import SilentProgress, open_image_set, read_index_mask, read_rgb, write_index_mask
from stages.data.adapters.custom import CustomConfig
from stages.data.check import check_data, check_image
from stages.errors import DataError
from stages.prepare_data import PrepareDataConfig, prepare_data

UPRIGHT = np.zeros((64, 48, 3), dtype=np.uint8)
UPRIGHT[:32] = (250, 10, 10)
UPRIGHT[32:, 24:] = (10, 10, 250)


def save_lying(path: Path, orientation: int = 6, **options: Any) -> None:
    """A photo as a phone keeps it: the sensor's pixels, and a tag that says how it was held (6: turn clockwise)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {6: np.rot90(UPRIGHT), 3: np.rot90(UPRIGHT, 2), 8: np.rot90(UPRIGHT, -1), 2: UPRIGHT[:, ::-1]}[orientation]
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_a_lying_photo_is_read_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    options = {"lossless": True} if suffix == ".webp" else {}
    save_lying(tmp_path / f"photo{suffix}", orientation, **options)
    np.testing.assert_array_equal(read_rgb(tmp_path / f"photo{suffix}"), UPRIGHT)
    assert check_image(tmp_path / f"photo{suffix}") == ((64, 48), [])


def test_a_phones_photo_fits_its_upright_mask(
    broken: Path, as_custom: Callable[..., CustomConfig], tmp_path: Path
) -> None:
    save_lying(broken / "JPEGImages/train_00001.jpg", quality=95)
    write_index_mask(broken / "SegmentationClass/train_00001.png", np.zeros((64, 48), dtype=np.uint8))
    config = as_custom(broken)
    assert check_data(config, SilentProgress(), processes=1).problems.lines() == []
    prepare_data(PrepareDataConfig(), data=config, out=tmp_path / "out", progress=SilentProgress())
    images = open_image_set(tmp_path / "out", broken)
    record = images.index.record("train_00001")
    assert record.size == (64, 48)
    pixels = images.read_image(record)
    assert pixels.shape == (64, 48, 3)
    assert tuple(int(value) > 128 for value in pixels[8, 24]) == (True, False, False)
    assert tuple(int(value) > 128 for value in pixels[56, 40]) == (False, False, True)


def test_a_photo_without_or_with_a_damaged_tag_is_read_as_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    for exif in (b"", b"Exif\0\0no exif at all", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        Image.fromarray(UPRIGHT).save(path, exif=exif)
        np.testing.assert_array_equal(read_rgb(path), UPRIGHT)
        assert check_image(path) == ((64, 48), [])


def test_several_pictures_in_one_jpeg_give_the_first(tmp_path: Path) -> None:
    first, second = Image.fromarray(UPRIGHT), Image.fromarray(UPRIGHT[::-1])
    first.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[second])
    assert check_image(tmp_path / "photo.jpg") == ((64, 48), [])
    assert read_rgb(tmp_path / "photo.jpg")[8, 24, 0] > 128


def test_other_formats_are_refused_whatever_the_name(tmp_path: Path) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "photo.jpg", format="PPM")
    with pytest.raises(DataError, match="not a readable image"):
        read_rgb(tmp_path / "photo.jpg")
    assert "is no readable image" in check_image(tmp_path / "photo.jpg")[1][0]
    Image.fromarray(UPRIGHT[:, :, 0]).save(tmp_path / "mask.png", format="TIFF")
    with pytest.raises(DataError, match="not a readable mask"):
        read_index_mask(tmp_path / "mask.png")


def test_a_mask_of_absurd_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index_mask(tmp_path / "mask.png", np.zeros((64, 64), dtype=np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"mask\.png: not a readable mask \(Image size \(4096 pixels\)"):
        read_index_mask(tmp_path / "mask.png")


def test_an_image_too_small_to_look_at_is_refused(
    broken: Path, as_custom: Callable[..., CustomConfig], tmp_path: Path
) -> None:
    path, mask = broken / "JPEGImages/train_00001.jpg", broken / "SegmentationClass/train_00001.png"
    Image.fromarray(UPRIGHT[:15]).save(path)
    write_index_mask(mask, np.zeros((15, 48), dtype=np.uint8))
    line = (
        f"{path}: expected at least 16 pixels on each side, found 15×48 (height×width); "
        "replace the file, or set data.on_bad_image=skip"
    )
    assert check_data(as_custom(broken), SilentProgress(), processes=1).problems.lines() == [line]
    with pytest.raises(DataError) as caught:
        prepare_data(PrepareDataConfig(), data=as_custom(broken), out=tmp_path, progress=SilentProgress())
    assert caught.value.problems == (line,)
    Image.fromarray(UPRIGHT[:16]).save(path)
    assert check_image(path) == ((16, 48), [])


def test_sixteen_bits_of_grey_become_eight_and_not_white(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 257, 25_700, 65_535]], dtype=np.uint16)).save(path)
    assert read_rgb(path)[0].tolist() == [[value] * 3 for value in (0, 1, 100, 255)]


def test_numbers_without_a_known_white_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "floats.tiff"
    Image.new("F", (4, 4), 0.5).save(path)
    with pytest.raises(DataError, match=r"floats\.tiff: expected 8 or 16 bits a channel, found pixels of mode F"):
        read_rgb(path)
