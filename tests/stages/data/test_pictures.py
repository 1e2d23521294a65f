"""Files, folders and patterns become named pictures, and whatever a camera wrote becomes upright RGB bytes."""

import io
import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.contracts import read_image, read_image_size
from stages.data.adapters.custom import CustomConfig
from stages.data.pictures import find_pictures
from stages.errors import DataError, InputError


def save(path: Path, size: tuple[int, int] = (6, 9), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path, **options)
    return path


def names(words: list[Path | str], out: Path) -> list[str]:
    return [picture.name for picture in find_pictures([str(word) for word in words], out).pictures]


# -- finding ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_to_the_bottom_without_hidden_files_and_the_output(tmp_path: Path):
    for name in ("b.jpg", "a.PNG", "sub/deep/c.jpeg", ".hidden.jpg", ".git/d.jpg", "out/a.png", "sub/out/e.jpg"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert names([tmp_path], tmp_path / "out") == ["a", "b", "sub/deep/c", "sub/out/e"]


def test_files_and_patterns_keep_their_order_and_count_once(tmp_path: Path):
    for name in ("x/2.jpg", "x/1.jpg", "y/3.jpg"):
        save(tmp_path / name)
    out = tmp_path / "out"
    assert names([tmp_path / "y/3.jpg", f"{tmp_path}/*/[12].jpg"], out) == ["3", "1", "2"]
    assert names([f"{tmp_path}/**/*.jpg", tmp_path / "x/2.jpg"], out) == ["1", "2", "3"]


def test_a_file_may_have_any_suffix_and_brackets(tmp_path: Path):
    path = save(tmp_path / "holiday [1].jpg").rename(tmp_path / "holiday [1].picture")
    assert names([path], tmp_path / "out") == ["holiday [1]"]


def test_all_that_is_missing_is_named_at_once(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / "gone.jpg"), str(tmp_path / "empty"), f"{tmp_path}/*.webp"]
    with pytest.raises(InputError) as error:
        find_pictures(words, tmp_path / "out")
    assert len(error.value.problems) == 3
    assert error.value.problems[0].endswith("gone.jpg: no such file")
    assert "no image in this folder" in error.value.problems[1]
    assert error.value.problems[2].endswith("*.webp: no match")


def test_a_folder_of_images_is_no_place_for_results(tmp_path: Path):
    save(tmp_path / "x.jpg")
    with pytest.raises(InputError, match="is the output folder too"):
        names([tmp_path], tmp_path / "sub" / "..")
    assert names([f"{tmp_path}/*.jpg"], tmp_path) == ["x"]


@pytest.mark.parametrize("pair", [("a/x.jpg", "b/x.jpg"), ("a/x.jpg", "a/x.png"), ("a/x.jpg", "b/X.jpg")])
def test_two_files_of_one_name_are_refused_and_both_named(tmp_path: Path, pair: tuple[str, str]):
    paths = [save(tmp_path / name) for name in pair]
    with pytest.raises(InputError, match="one name") as error:
        find_pictures([str(path) for path in paths], tmp_path / "out")
    assert all(str(path) in error.value.problems[0] for path in paths)


def test_a_common_folder_keeps_equal_names_apart(tmp_path: Path):
    save(tmp_path / "a/x.jpg")
    save(tmp_path / "b/x.jpg")
    assert names([tmp_path], tmp_path / "out") == ["a/x", "b/x"]


def test_odd_files_are_named_and_left_out_and_nothing_hangs(tmp_path: Path):
    save(tmp_path / "in/good.jpg")
    os.mkfifo(tmp_path / "in/pipe.jpg")
    (tmp_path / "in/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "in/gone.jpg").symlink_to("nowhere.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "in/socket.png"))
    folder = f"{tmp_path}/in"
    left_out = [
        f"{folder}/gone.jpg: a link to nowhere.jpg, which is not there; left out",
        f"{folder}/loop.jpg: too many levels of symbolic links; left out",
        f"{folder}/pipe.jpg: a pipe, not an image file; left out",
        f"{folder}/socket.png: a socket, not an image file; left out",
    ]
    (tmp_path / "in/folder.jpg").mkdir()
    out = tmp_path / "out"
    found = find_pictures([folder], out)
    assert ([picture.name for picture in found.pictures], list(found.left_out)) == (["good"], left_out)
    left_out.insert(0, f"{folder}/folder.jpg: a folder, not an image file; left out")
    found = find_pictures([f"{folder}/*"], out)
    assert ([picture.name for picture in found.pictures], list(found.left_out)) == (["good"], left_out)
    words = [f"{folder}/{name}.jpg" for name in ("good", "gone", "loop", "pipe")]
    found = find_pictures(words, out)
    assert ([picture.name for picture in found.pictures], list(found.left_out)) == (["good"], left_out[1:4])
    with pytest.raises(InputError, match="expected images, found none") as error:
        find_pictures(words[1:], out)
    assert list(error.value.problems) == left_out[1:4]


def test_patterns_do_not_circle_in_links(tmp_path: Path):
    for name in ("a/b/1.jpg", "a/.hidden/2.jpg", "a/.3.jpg", "a/c**d.jpg"):
        save(tmp_path / name)
    for name in ("x", "y", "b/z"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a")
    out = tmp_path / "out"
    assert names([f"{tmp_path}/**/*.jpg"], out) == ["1", "c**d"]
    assert names([f"{tmp_path}/a/**"], out) == ["1", "c**d"]
    assert names([f"{tmp_path}/a/?**.jpg"], out) == ["c**d"]
    assert names([f"{tmp_path}/a/.*.jpg"], out) == [".3"]


def test_home_and_variables_in_words_and_names_that_look_like_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SHOTS", str(tmp_path / "shots"))
    monkeypatch.chdir(tmp_path)
    for name in ("home/a.jpg", "shots/b.jpg", "price$NONE.jpg", "~c.jpg", "$SHOTS.jpg"):
        save(tmp_path / name)
    words = ["~/*.jpg", "$SHOTS", "price$NONE.jpg", "~c.jpg", "$SHOTS.jpg"]
    assert names([*words], tmp_path / "out") == ["a", "b", "price$NONE", "~c", "$SHOTS"]
    with pytest.raises(InputError) as error:
        find_pictures(["~no-such-user/*.png", "$NONE/x.jpg"], tmp_path / "out")
    assert list(error.value.problems) == [
        "~no-such-user/*.png: there is no user 'no-such-user' on this machine; write the path in full",
        "$NONE/x.jpg: $NONE is not set; write the path in full",
    ]


@pytest.mark.parametrize("suffix", [".JFIF", ".avif", ".HEIC", ".heif", ".jpe", ".TIF", ".webp", ".gif", ".bmp"])
def test_folders_of_data_and_predict_take_the_same_names(tmp_path: Path, suffix: str):
    (tmp_path / "in/images").mkdir(parents=True)
    (tmp_path / f"in/images/x{suffix}").touch()
    (tmp_path / "in/labels.csv").write_text(f"image,labels\nx{suffix},cat\n")
    assert names([tmp_path / "in"], tmp_path / "out") == ["images/x"]
    assert "no file in images" not in str(CustomConfig(root=tmp_path / "in").scan().problems.lines())
    assert [image.image for image in CustomConfig(root=tmp_path / "in").scan().listing.images] == [f"images/x{suffix}"]


# -- decoding ---------------------------------------------------------------------------------------------------------


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_image(Path("x"), data)[0]


def test_sixteen_bits_are_scaled_not_cut_off():
    values = np.array([[0, 257, 25_700, 65_535]], dtype=np.uint16)
    assert decode(encode(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 100, 255]
    assert decode(encode(Image.fromarray(values), "TIFF"))[0, :, 2].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str):
    image = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    found = decode(encode(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert (found.shape, found.dtype) == ((4, 5, 3), np.uint8)
    assert (found == 255).all()


def test_transparency_is_left_aside():
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert decode(encode(image))[0, 0].tolist() == [10, 20, 30]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode(encode(palette, transparency=bytes([0, 7])))[0, 0].tolist() == [10, 20, 30]


def test_exif_turns_the_pixels_and_the_size(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255  # the left half is white: upright it is the upper one
    path = tmp_path / "turned.png"
    path.write_bytes(encode(Image.fromarray(pixels), exif=exif))
    found = decode(path.read_bytes())
    assert found.shape == (16, 8, 3)
    assert read_image_size(path) == (16, 8)
    assert (found[:8] == 255).all()
    assert (found[8:] == 0).all()


def test_a_damaged_exif_tag_leaves_the_picture_as_it_is(tmp_path: Path):
    path = tmp_path / "x.png"
    path.write_bytes(encode(Image.new("RGB", (9, 6)), exif=b"Exif\0\0garbage!"))
    assert read_image_size(path) == (6, 9)
    assert decode(path.read_bytes()).shape == (6, 9, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"dear diary", "it holds none of JPEG"),
        (encode(Image.new("RGB", (64, 64)), "JPEG")[:400], "(?i)truncated|broken"),
        (encode(Image.new("F", (4, 4), 0.5), "TIFF"), "8 or 16 bits"),
    ],
)
def test_what_is_no_image_is_named_with_its_reason(tmp_path: Path, data: bytes, reason: str):
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError, match=reason) as error:
        read_image(path, data)
    assert str(error.value).startswith(str(path))
    assert "BytesIO" not in str(error.value)


def test_a_size_cannot_be_read_of_an_empty_file(tmp_path: Path):
    (tmp_path / "x.jpg").touch()
    with pytest.raises(DataError, match="the file is empty"):
        read_image_size(tmp_path / "x.jpg")
