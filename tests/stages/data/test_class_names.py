"""Class names that are none: dialects of label lists, near duplicates, words for nothing, names of two words."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.data.adapters.custom import CustomConfig
from stages.data.adapters.imagenet import ImageNetConfig
from stages.data.adapters.voc import VocConfig
from stages.data.class_names import check_class_names, is_word_for_nothing, nearest
from stages.data.records import Problems
from tests.stages.data.drawn_sets import draw_set
from tests.stages.data.wsol_sets import write_imagenet


def problems_of(root: Path, **changes: object) -> list[str]:
    return CustomConfig.model_validate({"root": root, **changes}).scan().problems.lines()


def warnings_of(root: Path, **changes: object) -> tuple[str, ...]:
    return CustomConfig.model_validate({"root": root, **changes}).scan().listing.warnings


NUMBERS = "numbers beside the names (write the names of what is there alone)"


@pytest.mark.parametrize(
    ("cell", "dialect", "remedy"),
    [
        ("bar, disc", "labels separated by commas", "bar;disc"),
        ("bar,disc", "labels separated by commas", "bar;disc"),
        ("bar，disc", "labels separated by commas", "bar;disc"),
        ("bar、disc", "labels separated by commas", "bar;disc"),
        ("bar|disc", "labels separated by bars", "bar;disc"),
        ("bar | disc", "labels separated by bars", "bar;disc"),
        ("bar；disc", "labels separated by another character than ';'", "bar;disc"),
        ("bar/disc", "labels separated by '/'", "bar;disc"),
        ("bar + disc", "labels separated by '+'", "bar;disc"),
        ("bar & disc", "labels separated by '&'", "bar;disc"),
        ("bar and disc", "labels joined by 'and'", "bar;disc"),
        ("['bar']", "a list as programs write it", "bar"),
        ('["bar", "disc"]', "a list as programs write it", "bar;disc"),
        ("{'bar', 'disc'}", "a list as programs write it", "bar;disc"),
        ("('bar',)", "a list as programs write it", "bar"),
        ("'bar' 'disc'", "names in quotes", "bar;disc"),
        ("bar_disc", "labels separated by '_'", "bar;disc"),
        ("Bar-Disc", "labels separated by '-'", "Bar;Disc"),
        ("bar.disc", "labels separated by '.'", "bar;disc"),
        ("bar\\disc_bar", "labels separated by '\\'", "bar;disc;bar"),
        ("bar:1 disc:1", NUMBERS, "bar;disc"),
        ("bar=0.9", NUMBERS, "bar"),
        ("rod=3", NUMBERS, "rod"),
        ("bar:90%", NUMBERS, "bar"),
        ("bar(2)", NUMBERS, "bar"),
        ("bar@.9", NUMBERS, "bar"),
    ],
)
def test_labels_in_another_dialect_are_one_problem_with_its_remedy(
    cell: str, dialect: str, remedy: str, tmp_path: Path
) -> None:
    draw_set(tmp_path / "set", ["bar", cell, "disc", "disc", cell, "bar"])
    (line,) = [line for line in problems_of(tmp_path / "set") if "lines have" in line]
    assert line == (
        f"labels.csv: 2 of 6 lines have {dialect}, e.g. line 3 '{cell}'; separate labels by ';' (write '{remedy}'), "
        "or name the classes as they stand there in data.classes"
    )


def test_signs_that_belong_to_names_are_no_dialect(tmp_path: Path) -> None:
    names = [
        "c++",
        "rock/stone",
        "AT&T",
        "c",
        "12:30",
        "Saint-Bernard",
        "x_y",
        "sku:17",
        "Boeing(747)",
        "polar_bear",
        "bear",
    ]
    draw_set(tmp_path / "set", names)
    assert problems_of(tmp_path / "set") == []
    draw_set(tmp_path / "numbers", ["1", "5", "1.5", "1-5"])
    assert len(problems_of(tmp_path / "numbers")) == 1, "1-5 alone"


def test_spaces_in_a_file_with_semicolons_join_names_too(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["cat dog", "cat;person", "dog", "cat", "traffic light"])
    assert problems_of(tmp_path / "set") == [
        "labels.csv: 1 of 5 lines have labels separated by spaces in a file with ';', e.g. line 2 'cat dog'; separate "
        "labels by ';' (write 'cat;dog'), or name the classes as they stand there in data.classes"
    ]


def test_numbers_beside_names_are_asked_about(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["cat", "0", "dog", "0", "dog 0.5"])
    assert problems_of(tmp_path / "set") == [
        "labels.csv: numbers, '0' (2), '0.5' (1), stand beside names, 'cat' (1), 'dog' (2): counts, scores, or a 0 for "
        "nothing?  Write names alone, leave the labels empty where there is nothing, or name all classes in "
        "data.classes"
    ]
    assert problems_of(tmp_path / "set", classes=("cat", "dog", "0", "0.5")) == []


def test_yes_and_no_are_asked_about_where_they_are_all(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["yes", "no", "yes", "no"])
    (line,) = problems_of(tmp_path / "set")
    assert line.startswith("labels.csv: is 'no' (2 images) a class, or does it say that the class is not there?  Leave")
    draw_set(tmp_path / "countries", ["no", "se", "no", "se"])
    assert problems_of(tmp_path / "countries") == []


def test_few_images_of_a_plural_or_a_slip_are_warned_of(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["cat"] * 5 + ["cats"] + ["bus"] * 2 + ["buses"] * 2 + ["doog"] + ["dooog"] * 5)
    (text,) = [text for text in warnings_of(tmp_path / "set") if "misspelt" in text]
    assert text == (
        "labels.csv: misspelt? 'buses' (2) beside 'bus' (2), 'cats' (1) beside 'cat' (5), 'doog' (1) beside 'dooog' "
        "(5); each is a class of its own: correct the CSV, or set data.classes"
    )


def test_a_class_for_the_rest_is_warned_of(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["cat", "other", "cat", "Misc.", "other"])
    (text,) = [text for text in warnings_of(tmp_path / "set", masks=None) if "class of its own" in text]
    assert text.startswith("labels.csv: 'Misc.' (1), 'other' (2) ") or text.startswith(
        "labels.csv: 'other' (2), 'Misc.'"
    )


def test_what_data_classes_names_is_meant(tmp_path: Path) -> None:
    classes = ("bar, disc", "BAR", "bar", "none", "['x']")
    draw_set(tmp_path / "set", [*classes, *classes])
    assert len(problems_of(tmp_path / "set")) > 1
    assert problems_of(tmp_path / "set", classes=classes) == []
    assert not [text for text in warnings_of(tmp_path / "set", classes=classes) if "labels.csv:" in text]


def test_names_that_nearly_are_the_same_are_asked_about(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["BAR", "bar", "traffic_light", "Traffic-Light", "bar", "disc", "barn"])
    assert problems_of(tmp_path / "set") == [
        "labels.csv: 'BAR' (1 images) beside 'bar' (2 images) would be classes of their own; write them in one way, "
        "or name all classes in data.classes",
        "labels.csv: 'Traffic-Light' (1 images) beside 'traffic_light' (1 images) would be classes of their own; "
        "write them in one way, or name all classes in data.classes",
    ]


@pytest.mark.parametrize("name", ["!cat", "cat?", "cat.", "~cat", "c.a.t", "cat*", " cat -"])
def test_names_that_differ_by_a_mark_are_asked_about(name: str, tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["cat", "dog", f"{name};dog", "cat;dog"])
    assert f"'{name.strip()}' (1 images)" in "\n".join(problems_of(tmp_path / "set"))
    draw_set(tmp_path / "numbers", ["1.5", "15", "-1", "1"])
    assert problems_of(tmp_path / "numbers") == []


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["caf\u00e9", "cafe\u0301", "tea", "tea"])
    config = CustomConfig(root=tmp_path / "set")
    assert config.scan().listing.classes.names == ("caf\u00e9", "tea")
    named = CustomConfig(root=tmp_path / "set", classes=("tea", "cafe\u0301"))
    assert [image.labels for image in named.scan().listing.images].count((1,)) == 2


@pytest.mark.parametrize(
    "word",
    ["none", "-", "--", "Background", "_background_", "N/A", "n.a.", "NaN", "null", "?", "unknown", "#N/A", "TBD"],
)
def test_words_for_nothing_are_asked_about(word: str, tmp_path: Path) -> None:
    assert is_word_for_nothing(word)
    draw_set(tmp_path / "set", ["cat", word, "dog", word])
    (line,) = problems_of(tmp_path / "set")
    assert line == (
        f"labels.csv: is '{word}' (2 images) a class, or a word for nothing?  Leave the labels empty, "
        "or name all classes in data.classes"
    )
    lines = problems_of(tmp_path / "set", classes=("cat", "dog"))
    assert lines[0] == (
        f"labels.csv line 3: unknown class '{word}', leave the labels of an image without any class empty"
    )


def test_words_that_only_begin_like_nothing_are_names(tmp_path: Path) -> None:
    assert not any(map(is_word_for_nothing, ["nonesuch", "Nan bread", "0", "x", "background noise", "é", "🐻"]))
    draw_set(tmp_path / "set", ["0", "1", "0", "1"])
    assert problems_of(tmp_path / "set") == []
    (text,) = warnings_of(tmp_path / "set", masks=None)[:1]
    assert text.startswith("labels.csv: '0' (2) is a class as it stands there, and value 1 in masks")


def test_control_characters_in_a_class_name_are_spelled_out(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["cat", "\x1b[31mdog", "cat", "cat"])
    (line,) = problems_of(tmp_path / "set")
    assert line == (
        r"labels.csv: '\x1b[31mdog' can be no name of a class: it has the control character U+001B; correct it"
    )


def test_words_that_always_stand_together_are_one_name(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["traffic light", "stop sign", "traffic light", "stop sign", "car stop sign", "car"])
    (text,) = [text for text in warnings_of(tmp_path / "set") if "two words" in text]
    assert text == (
        "labels.csv: 'traffic light', 'stop sign' always stand together: one name of two words?  "
        "Then separate labels by ';' in the whole file, or set data.classes"
    )


def test_words_of_several_names_are_seen_too(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["traffic light", "traffic sign", "traffic sign", "traffic light", "warning light"])
    (text,) = [text for text in warnings_of(tmp_path / "set") if "two words" in text]
    assert "'traffic light', 'traffic sign', 'warning light' always" in text


def test_labels_that_change_their_neighbours_are_names_of_their_own(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", ["cat dog", "dog cat", "cat", "dog person", "person", "person cat"])
    assert not [text for text in warnings_of(tmp_path / "set", masks=None) if "together" in text]
    draw_set(tmp_path / "semicolons", ["traffic light;car", "traffic light", "car", "traffic light", "bus", "bus"])
    assert not [text for text in warnings_of(tmp_path / "semicolons", masks=None) if "together" in text]


def test_the_csv_of_voc_has_the_same_dialects(tiny_voc: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text('image,labels\na,"cat, horse"\nb,none\n', encoding="utf-8")
    lines = VocConfig(root=tiny_voc, train_list="train", labels=labels).scan().problems.lines()
    assert lines[0].startswith("labels.csv: 1 of 2 lines have labels separated by commas, e.g. line 2 'cat, horse'")
    assert "unknown class 'none', leave the labels of an image without any class empty" in "\n".join(lines)


def test_class_folders_of_imagenet_are_asked_about_too(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "imagenet")
    for name in ("N01", "background"):
        (root / "train" / name).mkdir()
        (root / "train" / name / f"{name}_9.JPEG").write_bytes((root / "train/n01/n01_0.JPEG").read_bytes())
    lines = ImageNetConfig(root=root).scan().problems.lines()
    assert any("'N01' (1 images) beside 'n01' (2 images) would be classes of their own" in line for line in lines)
    assert any(
        "is 'background' (1 images) a class, or a word for nothing?  Take the folder out" in line for line in lines
    )
    assert ImageNetConfig(root=root, classes=("n01", "n02")).scan().problems.lines() == []


def test_the_remedy_for_an_unknown_name_is_its_nearest_spelling() -> None:
    assert nearest("Cat", ("cat", "dog")) == "did you mean 'cat'?"
    assert nearest("zebra", ("cat", "dog")) == "known classes: cat, dog"
    assert nearest("x" * 10_000_000, ("cat", "dog")) == "known classes: cat, dog", "at once"


def test_a_name_with_a_character_of_no_width_is_its_neighbour() -> None:
    problems = Problems()
    check_class_names({"cat": 5, "cat\u200b": 1}, "labels.csv", problems, remedy="correct the file")
    assert any("would be classes of their own" in line for line in problems.lines())
