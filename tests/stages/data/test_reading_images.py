"""Pixels as people see them: EXIF orientation, file formats, and images too small to look at."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from stages.contracts import (
    SilentProgress,
    images,
    open_image_set,
    open_quietly,
    orientation_of,
    read_image,
    read_image_size,
    read_index_mask,
    read_rgb,
    write_index_mask,
)
from stages.contracts.images import IMAGE_FORMATS
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
    assert check_image(tmp_path / f"photo{suffix}") == ((64, 48), [], orientation)


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


REMEDIES = (
    "look at one: where they fit the unturned pixels, remove the tag (exiftool -Orientation= FILE), else turn the "
    "pixels for good (mogrify -auto-orient FILE)"
)


def test_a_mask_of_the_unturned_pixels_is_told_by_its_size(
    broken: Path, as_custom: Callable[..., CustomConfig]
) -> None:
    save_lying(broken / "JPEGImages/train_00001.jpg", quality=95)
    mask = broken / "SegmentationClass/train_00001.png"
    write_index_mask(mask, np.zeros((48, 64), dtype=np.uint8))
    progress = SilentProgress()
    assert check_data(as_custom(broken), progress, processes=1).problems.lines() == [
        f"{mask}: is a mask of the unturned pixels, and its image is turned by its EXIF tag, as viewers show it; "
        "remove the image's tag (exiftool -Orientation= FILE), or turn the mask"
    ]
    write_index_mask(mask, np.eye(64, 48, dtype=np.uint8))
    assert check_data(as_custom(broken), progress, processes=1).problems.lines() == []
    assert progress.warnings == []


def test_where_sizes_do_not_tell_whether_masks_are_turned_the_images_are_named(
    broken: Path, as_custom: Callable[..., CustomConfig], tmp_path: Path
) -> None:
    square = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    for number, orientation in ((0, 1), (1, 2), (2, 3), (3, 6)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        square.save(broken / f"JPEGImages/train_0000{number}.jpg", exif=exif)
    turned = ", ".join(f"'JPEGImages/train_0000{number}.jpg'" for number in (1, 2, 3))
    text = (
        "3 images are turned by their EXIF tag and used as viewers show them, and nothing tells whether their masks or "
        f"boxes are turned too: {turned}; {REMEDIES}"
    )
    checked, prepared = SilentProgress(), SilentProgress()
    assert check_data(as_custom(broken), checked, processes=1).problems.lines() == []
    assert checked.warnings == [text]
    prepare_data(PrepareDataConfig(), data=as_custom(broken), out=tmp_path / "out", progress=prepared)
    assert text in prepared.warnings
    without = SilentProgress()
    check_data(as_custom(broken, masks=None), without, processes=1)
    assert not any("EXIF" in warning for warning in without.warnings)


def test_a_mask_with_a_tag_that_turns_it_is_refused_by_the_check_and_by_reading(
    broken: Path, as_custom: Callable[..., CustomConfig]
) -> None:
    mask = broken / "SegmentationClass/train_00001.png"
    exif = Image.Exif()
    for orientation, is_refused in ((1, False), (3, True)):
        exif[0x0112] = orientation
        Image.fromarray(np.zeros((64, 64), dtype=np.uint8)).save(mask, exif=exif)
        text = f"{mask}: its EXIF tag turns it, and a mask is read pixel by pixel; "
        text += "turn its pixels and save it without the tag"
        assert check_data(as_custom(broken), SilentProgress(), processes=1).problems.lines() == [text] * is_refused
        if is_refused:
            with pytest.raises(DataError) as caught:
                read_index_mask(mask)
            assert caught.value.message == text
        else:
            assert read_index_mask(mask).shape == (64, 64)


def odd_image(kind: str) -> tuple[Image.Image, str, dict[str, Any]]:
    """An image of every kind of pixels that files hold, its format and how to save it."""
    rgb = Image.fromarray(UPRIGHT)
    grey = rgb.convert("L")
    palette = rgb.quantize(4)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "1": (rgb.convert("1"), "PNG", {}),
        "L": (grey, "PNG", {}),
        "LA": (rgb.convert("LA"), "PNG", {}),
        "P": (palette, "PNG", {}),
        "P with transparency": (palette, "PNG", {"transparency": bytes([0, 255, 7, 8])}),
        "RGBA": (rgb.convert("RGBA"), "PNG", {}),
        "CMYK": (rgb.convert("CMYK"), "JPEG", {}),
        "LAB": (rgb.convert("LAB"), "TIFF", {}),
        "I;16": (deep, "PNG", {}),
        "I;16 in TIFF": (deep, "TIFF", {}),
        "I": (Image.fromarray(np.asarray(grey).astype(np.int32) * 257), "TIFF", {}),
        "I too large": (Image.fromarray(np.asarray(grey).astype(np.int32) * 1000), "TIFF", {}),
        "F": (Image.fromarray(np.asarray(grey).astype(np.float32)), "TIFF", {}),
        "animated GIF": (rgb, "GIF", {"save_all": True, "append_images": [grey.convert("RGB")]}),
        "animated PNG": (rgb, "PNG", {"save_all": True, "append_images": [Image.fromarray(UPRIGHT[::-1])]}),
        "pages": (rgb, "TIFF", {"save_all": True, "append_images": [grey]}),
        "PPM": (rgb, "PPM", {}),
        "JPEG 2000": (rgb, "JPEG2000", {}),
    }[kind]


READ = ("1", "L", "LA", "P", "P with transparency", "RGBA", "CMYK", "I;16", "I;16 in TIFF", "I", "animated GIF")
READ += ("animated PNG", "pages", "LAB")


@pytest.mark.parametrize("kind", [*READ, "I too large", "F", "PPM", "JPEG 2000"])
def test_the_check_the_training_and_predict_accept_the_same(kind: str, tmp_path: Path) -> None:
    image, file_format, options = odd_image(kind)
    path = tmp_path / "x.jpg"
    image.save(path, format=file_format, **options)
    size, problems, _ = check_image(path)
    if kind not in READ:
        assert size is None
        for read in (lambda: read_rgb(path), lambda: read_image(path, path.read_bytes())):
            with pytest.raises(DataError) as caught:
                read()
            assert problems == [f"{caught.value.message}, or set data.on_bad_image=skip"]
        return
    assert (size, problems) == ((64, 48), [])
    np.testing.assert_array_equal(read_rgb(path), read_image(path, path.read_bytes())[0])
    assert read_image_size(path) == (64, 48)


def test_a_cut_image_is_refused_everywhere_in_the_same_words(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    for file_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        Image.fromarray(noise).save(path, format=file_format)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError) as caught:
            read_rgb(path)
        assert check_image(path) == (None, [f"{caught.value.message}, or set data.on_bad_image=skip"], 1)
        assert caught.value.message.startswith(f"{path}: not a readable image (")


def test_a_large_image_is_read_and_one_of_absurd_size_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2)
    assert check_image(tmp_path / "x.png") == ((64, 48), [], 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    assert "has more than 3,070 pixels, which is taken for an attack" in check_image(tmp_path / "x.png")[1][0]


@pytest.mark.skipif("AVIF" not in IMAGE_FORMATS, reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "x.avif", quality=100)
    assert check_image(tmp_path / "x.avif") == ((64, 48), [], 1)
    assert np.abs(read_rgb(tmp_path / "x.avif").astype(int) - UPRIGHT).mean() < 5


def test_heic_and_avif_that_nothing_here_reads_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    remedy = "convert it to JPEG or PNG, or pip install"
    with pytest.raises(DataError, match=rf"x\.HEIC: a HEIC image, which Pillow cannot read; {remedy} pillow-heif"):
        read_rgb(path)
    assert check_image(path)[0] is None
    path.write_bytes(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif")
    monkeypatch.setattr(images, "_HAS_AVIF", False)
    with pytest.raises(DataError, match=rf"an AVIF image, which this Pillow cannot read; {remedy} --upgrade pillow"):
        read_rgb(path)


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (20, 30), "RGB"

        def load(self) -> Any:
            self.im = Image.new("RGB", self._size, (1, 2, 3)).im
            return Image.Image.load(self)

    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (Heif, lambda prefix: prefix[4:8] == b"ftyp"))

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    pixels = read_rgb(tmp_path / "x.heic")
    assert pixels.shape == (30, 20, 3)
    assert pixels[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "it is a Git LFS pointer; fetch the file itself",
        ),
        (b"<html>login</html>", "it is a web page, perhaps a login or an error; download the file itself"),
        (b"", "the file is empty"),
    ],
)
def test_what_stands_in_the_place_of_an_image_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.jpg: not a readable image \({reason}"):
        read_rgb(tmp_path / "x.jpg")


def test_pipes_sockets_and_links_to_themselves_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name, reason in (("pipe", "found a pipe"), ("folder", "found a folder"), ("loop", "symbolic links")):
        with pytest.raises(DataError, match=reason):
            read_rgb(tmp_path / f"{name}.jpg")
        assert reason in check_image(tmp_path / f"{name}.jpg")[1][0]


def test_a_photo_without_or_with_a_damaged_tag_is_read_as_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    for exif in (b"", b"Exif\0\0no exif at all", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        Image.fromarray(UPRIGHT).save(path, exif=exif)
        np.testing.assert_array_equal(read_rgb(path), UPRIGHT)
        assert check_image(path) == ((64, 48), [], 1)


def test_several_pictures_in_one_jpeg_give_the_first(tmp_path: Path) -> None:
    first, second = Image.fromarray(UPRIGHT), Image.fromarray(UPRIGHT[::-1])
    first.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[second])
    assert check_image(tmp_path / "photo.jpg") == ((64, 48), [], 1)
    assert read_rgb(tmp_path / "photo.jpg")[8, 24, 0] > 128


def test_other_formats_are_refused_whatever_the_name(tmp_path: Path) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "photo.jpg", format="PPM")
    with pytest.raises(DataError, match="not a readable image"):
        read_rgb(tmp_path / "photo.jpg")
    assert "not a readable image" in check_image(tmp_path / "photo.jpg")[1][0]
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
    assert check_image(path) == ((16, 48), [], 1)


def test_sixteen_bits_of_grey_become_eight_and_not_white(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 257, 25_700, 65_535]], dtype=np.uint16)).save(path)
    assert read_rgb(path)[0].tolist() == [[value] * 3 for value in (0, 1, 100, 255)]


def test_numbers_without_a_known_white_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "floats.tiff"
    Image.new("F", (4, 4), 0.5).save(path)
    with pytest.raises(DataError, match=r"floats\.tiff: expected 8 or 16 bits a channel, found pixels of mode F"):
        read_rgb(path)


def damaged_exif() -> list[bytes]:
    """EXIF data cut off at many places, and with bytes changed."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description of some length " * 3
    whole, random = exif.tobytes(), np.random.default_rng(0)
    changed = [bytearray(whole) for _ in range(60)]
    for data in changed:
        for place in random.integers(6, len(data), 4):
            data[place] = random.integers(256)
    return [*(whole[:end] for end in range(8, len(whole), 3)), *map(bytes, changed)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_costs_neither_the_image_nor_a_word(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    for exif in damaged_exif():
        content = io.BytesIO()
        picture.save(content, kind, exif=exif)
        pixels, orientation = read_image(Path("photo"), content.getvalue())
        assert pixels.shape == ((30, 20, 3) if orientation >= 5 else (20, 30, 3))
    assert not recwarn.list


def test_a_mask_with_damaged_exif_data_is_read(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    mask = Image.fromarray(np.eye(20, 30, dtype=np.uint8))
    for exif in damaged_exif():
        mask.save(tmp_path / "mask.png", exif=exif)
        with open_quietly(tmp_path / "mask.png", ("PNG",)) as image:
            is_turned = orientation_of(image) != 1
        with pytest.raises(DataError, match="its EXIF tag turns it") if is_turned else contextlib.nullcontext():
            assert np.array_equal(read_index_mask(tmp_path / "mask.png"), np.asarray(mask))
    assert not recwarn.list


def test_palettes_with_transparency_are_read_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    image = Image.fromarray(np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)).quantize(16)
    for number, transparency in enumerate((bytes(range(0, 160, 10)), 3)):
        image.save(tmp_path / f"{number}.png", transparency=transparency)
        image.save(tmp_path / f"{number}.gif", transparency=3)
        for suffix in ("png", "gif"):
            assert np.array_equal(read_rgb(tmp_path / f"{number}.{suffix}"), np.asarray(image.convert("RGB")))
    assert not recwarn.list


def test_images_and_masks_of_many_pixels_are_read_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    write_index_mask(tmp_path / "a.png", np.zeros((20, 30), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert read_index_mask(tmp_path / "a.png").shape == read_rgb(tmp_path / "a.png").shape[:2] == (20, 30)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(DataError, match="it has more than 400 pixels, which is taken for an attack; cut it into tiles"):
        read_rgb(tmp_path / "a.png")
