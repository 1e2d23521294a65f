"""What can be an image id, and which image a written name means."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from stages.data.names import ImageNames, image_id_of, numbers_as_numbers, odd_character

THIN = "Screenshot 9.41.00\u202fAM"
COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    "name", [THIN, "a b", "a\u00a0b", "\u3000", "\u2028", "ein Bär 🐻", "x'\"$%`;,", "a\u200db", "a..b"]
)
def test_any_space_and_sign_may_be_in_a_name(name: str) -> None:
    assert odd_character(name) is None
    assert ImageNames({name: f"images/{name}.jpg"}).find(name) == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b", "it has a separator of paths, '/'"),
        ("a\\b", "it has a separator of paths, '\\'"),
        ("a\0b", "it has the control character U+0000"),
        ("\x1b[31mred", "it has the control character U+001B"),
        ("a\nb", "it has the control character U+000A"),
        ("a\x85b", "it has the control character U+0085"),
        ("caf\udce9", "it is not UTF-8 (byte 0xE9)"),
        (".hidden", "it begins with a dot"),
        ("..", "it begins with a dot"),
    ],
)
def test_what_cannot_be_a_name_is_said_by_its_character(name: str, reason: str) -> None:
    assert odd_character(name) == reason


def test_another_unicode_form_means_the_same_image_where_only_one_is_meant() -> None:
    for there, written in ((COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)):
        names = ImageNames({there: f"images/{there}.jpg"})
        assert names.find(written) == names.find(f"{written}.jpg") == names.get(written) == there
    both = ImageNames({COMPOSED: "images/1.jpg", DECOMPOSED: "images/2.jpg"})
    assert (both.get(COMPOSED), both.get(DECOMPOSED)) == (COMPOSED, DECOMPOSED)
    assert both.get(f" {COMPOSED}") is None, "two are meant"
    assert ImageNames({" a ": "images/ a .jpg"}).find("a") == " a ", "readers strip lines"


@pytest.mark.parametrize(
    "written",
    [
        *("1", "1.jpg", "1.PNG", "cat/1.jpg", "images/cat/1.jpg", "./images/cat/1", "data/images/cat/1.jpg"),
        *("/mnt/data/images/cat/1.jpg", "C:\\photos\\images\\cat\\1.jpg", "/JPEGImages/../images/cat/1.jpg"),
    ],
)
def test_a_path_means_the_image_that_lies_there(written: str) -> None:
    assert ImageNames({"1": "images/cat/1.jpg"}, root=Path("/mnt/data")).find(written) == "1"


@pytest.mark.parametrize("written", ["dog/1.jpg", "images/1.jpg", "../1.jpg", "cat/2.jpg", "/1.jpg/", "a\x1b/1.jpg"])
def test_a_path_to_no_image_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"no image lies there; write the id without a path|names no image"):
        ImageNames({"1": "images/cat/1.jpg"}, root=Path("/mnt/data")).find(written)


def test_an_id_of_several_files_means_none() -> None:
    names = ImageNames({}, {"1": ["images/cat/1.jpg", "images/dog/1.jpg", "images/cow/1.jpg"]})
    for written in ("1", "cat/1.jpg"):
        with pytest.raises(ValueError, match=r"images/cat/1\.jpg and images/dog/1\.jpg have this name.*rename one"):
            names.find(written)
    assert names.find("unknown") == "unknown"


def test_endings_of_images_are_no_part_of_an_id() -> None:
    assert [image_id_of(name) for name in ("a.JPG", "a", "a.b.png", "a.txt", "9.41.00 AM")] == [
        *("a", "a", "a.b", "a.txt", "9.41.00 AM")
    ]


def test_numbers_are_sorted_as_numbers() -> None:
    assert numbers_as_numbers(map(str, range(12, 0, -1))) == [str(number) for number in range(1, 13)]
    assert numbers_as_numbers(["10", "9", "-1", "0.25", "0.5", "+3"]) == ["-1", "0.25", "0.5", "+3", "9", "10"]
    assert numbers_as_numbers(["c10", "c9", "c", "b11 x", "b2 y"]) == ["b2 y", "b11 x", "c", "c9", "c10"]
    assert numbers_as_numbers(["dog", "cat", "10", "9"]) == ["9", "10", "cat", "dog"]
    assert numbers_as_numbers(["1", "01", "1" * 5000, "2"])[:3] == ["01", "1", "2"], "no number is too long"
