"""Id lists and labels.csv as people and spreadsheets write them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.data.adapters.custom import CustomConfig
from stages.data.readers import read_id_list, read_labels_csv, read_text
from stages.data.records import DataListing, Problems
from tests.stages.data.drawn_sets import draw_set

CELLS = ("cat", "dog", "cat;dog", "", "cat", "dog")
EXPECTED = {"p00": (0,), "p01": (1,), "p02": (0, 1), "p03": (), "p04": (0,), "p05": (1,)}


def listing_of(root: Path, **changes: object) -> DataListing:
    scan = CustomConfig.model_validate({"root": root, **changes}).scan()
    assert scan.problems.lines() == []
    return scan.listing


def problems_of(root: Path, **changes: object) -> list[str]:
    return CustomConfig.model_validate({"root": root, **changes}).scan().problems.lines()


def labels_of(listing: DataListing) -> dict[str, tuple[int, ...] | None]:
    return {image.id: image.labels for image in sorted(listing.images, key=lambda image: image.id)}


def table(delimiter: str, *, end: str = "\n", head: str = "", quote: str = '"', name: str = "{}") -> str:
    lines = [f"image{delimiter}labels"]
    lines += [f"{name.format(f'p{n:02d}')}{delimiter}{quote}{cell}{quote}" for n, cell in enumerate(CELLS)]
    return head + end.join(lines) + end


@pytest.mark.parametrize(
    "data",
    [
        table(",").encode(),
        table(",", quote="").encode(),
        table(";", end="\r\n").encode("utf-8-sig"),
        table("\t", quote="", end="\r\n").encode("utf-16"),
        table("\t").encode("utf-16-be").join([b"\xfe\xff", b""]),
        table(";", end="\r").encode("utf-32"),
        table(",", head="sep=,\r\n").encode(),
        table(";", head='"sep=;"\n').encode("utf-8-sig"),
        table("|", head="sep=|\n").encode(),
        table(",", head="\n\n").encode(),
        table(",").replace("image,labels", '"Image", LABELS ').encode(),
        table(",", name="{}.JPG").encode(),
        table(",", name="images/{}.jpg").encode(),
        table(",", name="C:\\data\\images\\{}.png").encode(),
        "\n".join(f"{line},," for line in table(",").splitlines()).encode(),
    ],
    ids=[
        *(
            "plain",
            "bare",
            "semicolons",
            "utf-16 tabs",
            "utf-16 be",
            "utf-32",
            "sep",
            "quoted sep",
            "sep bars",
            "blank",
        ),
        *("header", "endings", "paths", "windows", "empty columns"),
    ],
)
def test_a_csv_reads_the_same_whoever_saved_it(data: bytes, tmp_path: Path) -> None:
    draw_set(tmp_path / "set", CELLS)
    (tmp_path / "set/labels.csv").write_bytes(data)
    listing = listing_of(tmp_path / "set")
    assert listing.classes.names == ("cat", "dog")
    assert labels_of(listing) == EXPECTED


def test_further_columns_are_left_aside_wherever_they_stand(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", CELLS)
    lines = [f"x,{line},train" for line in table(",").splitlines()]
    (tmp_path / "set/labels.csv").write_text("\n".join(["id,image,labels,split", *lines[1:]]))
    listing = listing_of(tmp_path / "set")
    assert labels_of(listing) == EXPECTED
    assert "labels.csv: of its columns only image and labels are read, not 'id', 'split'" in listing.warnings


def one_hot(*, yes: str = "1", no: str = "0", delimiter: str = ",") -> str:
    """CELLS with a column for each class, dog before cat."""
    lines = [f"image{delimiter}dog{delimiter}cat"]
    for number, cell in enumerate(CELLS):
        flags = [yes if name in cell.split(";") else no for name in ("dog", "cat")]
        lines.append(delimiter.join([f"p{number:02d}.jpg", *flags]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        one_hot(),
        one_hot(delimiter=";"),
        one_hot(delimiter="\t", yes="1.0", no="0.0"),
        one_hot(yes="True", no="False"),
        "\n".join(f"{n},{line}" for n, line in enumerate(one_hot().splitlines())).replace("0,image", ",image"),
    ],
    ids=["plain", "semicolons", "floats", "truths", "numbered"],
)
def test_a_column_of_0_and_1_for_each_class_is_read(text: str, tmp_path: Path) -> None:
    draw_set(tmp_path / "set", CELLS)
    (tmp_path / "set/labels.csv").write_text(text)
    listing = listing_of(tmp_path / "set")
    assert (listing.classes.names, labels_of(listing)) == (("cat", "dog"), EXPECTED)
    assert "labels.csv: read as a column of 0 and 1 for each of 2 classes: 'dog', 'cat'" in listing.warnings


def test_names_of_such_columns_keep_their_case_and_may_have_spaces(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", CELLS)
    (tmp_path / "set/labels.csv").write_text(one_hot().replace("dog,cat", "Traffic Light,bird/plane"))
    assert listing_of(tmp_path / "set").classes.names == ("Traffic Light", "bird/plane")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (one_hot().replace(",1,1", ",1,0.7"), "line 4: expected 0 or 1 in the column of 'cat', found '0.7'; write 1"),
        (one_hot().replace(",1,1", ",1,"), "line 4: expected 0 or 1 in the column of 'cat', found ''; write 1"),
        (one_hot().replace(",1,1", ",1"), "line 4: expected 0 or 1 in the column of 'cat', found ''; write 1"),
        (one_hot().replace(",1,1", ",1,1,1"), "line 4: has more cells than the header"),
        (one_hot().replace("p02.jpg", "p01.jpg"), "line 4: image 'p01' has its labels on line 3 already"),
        (one_hot().replace("dog,cat", "cat,cat"), "labels.csv: 'cat' is the name of two columns; keep one of them"),
        (
            one_hot().replace(",1\n", ",0\n"),
            "labels.csv: 'cat': a column without any 1, so a class of no image; remove",
        ),
        (one_hot().replace("dog,cat", "none,cat"), "is 'none' (3 images) a class, or a word for nothing?"),
        ("image,label\np00,0\np01,1\n", "expected the header 'image,labels', found 'image,label'; name the columns so"),
        ("image,cat,split\np00,0,1\n", "expected the header 'image,labels', found 'image,cat,split'"),
        (one_hot().replace("image", "file"), "or write a column of 0 and 1 for each class beside 'image'"),
    ],
)
def test_columns_that_are_not_plainly_0_and_1_are_refused_with_a_remedy(
    text: str, problem: str, tmp_path: Path
) -> None:
    draw_set(tmp_path / "set", CELLS)
    (tmp_path / "set/labels.csv").write_text(text)
    assert problem in "\n".join(problems_of(tmp_path / "set"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("image;class\na;b\n", "labels.csv line 1: expected the header 'image,labels', found 'image;class'"),
        ("image,labels,labels\na,b,c\n", "line 1: expected the header 'image,labels', found 'image,labels,labels'"),
        ("sep=;\nimage,labels\na,b\n", "labels.csv line 2: expected the header 'image,labels', found 'image,labels'"),
        ("", "labels.csv line 1: expected the header 'image,labels', found 'nothing'"),
        (
            "image,labels\np00,cat,dog\n",
            "line 2: expected 'image,labels' with the labels separated by spaces or ';', fo",
        ),
        (
            "image,labels\np00;cat\n",
            "line 2: expected 'image,labels' with the labels separated by spaces or ';', found",
        ),
        (
            'image,labels\np00,"cat\np01,dog\n',
            "line 3: a cell goes on over several lines, 'p00,cat\\np01,dog\\n'; c",
        ),
        ("image,labels\n\x1b[2Jp00,cat\n", r"line 2: '\x1b[2Jp00' names no image: it has the control character U+001B"),
        ("image,labels\nmasks/p00.jpg,cat\n", "'masks/p00.jpg' names no image: no image lies there; write the id with"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_remedy(text: str, problem: str, tmp_path: Path) -> None:
    draw_set(tmp_path / "set", CELLS)
    (tmp_path / "set/labels.csv").write_text(text)
    assert any(problem in line for line in problems_of(tmp_path / "set"))


def test_utf_16_without_its_mark_and_latin_1_are_named(tmp_path: Path) -> None:
    for data in (table(",").encode("utf-16-le"), "image,labels\np00,Bär\n".encode("latin-1"), b"\xff\xfe\0"):
        problems = Problems()
        (tmp_path / "labels.csv").write_bytes(data)
        assert read_labels_csv(tmp_path / "labels.csv", (), "labels.csv", problems) is None
        assert problems.lines() == ["labels.csv: is not UTF-8 text; save it as UTF-8"]


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes("a\u2028b\r\n\fc d\re\n\n\u202f \nf\u202fg.jpg".encode())
    problems = Problems()
    listed = read_id_list(tmp_path / "ids.txt", "ids.txt", problems)
    assert listed is not None
    assert listed.entries == ((1, "a\u2028b"), (2, "c d"), (3, "e"), (6, "f\u202fg"))
    assert problems.lines() == []
    assert read_text(tmp_path / "none.txt", "none.txt", problems) is None
    assert problems.lines() == ["none.txt: cannot be read (No such file or directory); check its name and permission"]


def test_id_lists_take_names_as_the_folder_has_them(tmp_path: Path) -> None:
    draw_set(tmp_path / "set", CELLS, stem=lambda n: f"cafe\u0301\u202f{n}")
    (tmp_path / "t.txt").write_text("caf\u00e9\u202f0.jpg\nimages/cafe\u0301\u202f1.jpg\n caf\u00e9\u202f2 \n")
    (tmp_path / "v.txt").write_text("caf\u00e9\u202f3\ncaf\u00e9\u202f4\n")
    labels = tmp_path / "set/labels.csv"
    labels.write_text(labels.read_text(encoding="utf-8").replace("e\u0301", "\u00e9"), encoding="utf-8")
    listing = listing_of(tmp_path / "set", train_list=tmp_path / "t.txt", val_list=tmp_path / "v.txt")
    assert listing.splits["train"] == tuple(f"cafe\u0301\u202f{n}" for n in range(3)), "ids are the files' own names"
    assert [image.labels for image in listing.images] == [(0,), (1,), (0, 1), (), (0,)]
    (tmp_path / "v.txt").write_text("a\x07b\n\x1b[0m\n")
    lines = problems_of(tmp_path / "set", train_list=tmp_path / "t.txt", val_list=tmp_path / "v.txt")
    assert lines[0] == (
        r"v.txt line 1: expected one image id, found 'a\x07b'; it has the control character U+0007; rename the file"
    )
    assert "U+001B" in lines[1]


def into_sub_folders(root: Path, place: Callable[[str], str]) -> None:
    for kind in ("images", "masks"):
        for file in sorted((root / kind).glob("*.*")):
            (root / kind / place(file.stem)).mkdir(parents=True, exist_ok=True)
            shutil.move(file, root / kind / place(file.stem) / file.name)


def test_images_in_sub_folders_are_found_with_their_masks(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", CELLS, values=[1, 2, 1, 0, 1, 2])
    into_sub_folders(root, lambda stem: f"{int(stem[1:]) % 2}/deep")
    for name in ("{}", "images/{}.jpg"):
        (root / "labels.csv").write_text(table(",", name=name))
        if name == "images/{}.jpg":
            continue
        listing = listing_of(root)
        assert labels_of(listing) == EXPECTED
        first = min(listing.images, key=lambda image: image.id)
        assert (first.image, first.mask) == ("images/0/deep/p00.jpg", "masks/0/deep/p00.png")
        assert listing.unused_masks == ()
    assert "line 2: 'images/p00.jpg' names no image: no image lies there" in problems_of(root)[0]


def test_one_name_in_two_sub_folders_is_refused_where_it_is_used(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", CELLS)
    for place in ("a", "b"):
        (root / "images" / place).mkdir()
        shutil.copy(root / "images/p00.jpg", root / f"images/{place}/q.jpg")
    assert labels_of(listing_of(root)) == EXPECTED
    assert not [text for text in listing_of(root).warnings if "not used" in text]
    (root / "labels.csv").write_text(table(",") + "a/q.jpg,cat\n")
    assert problems_of(root) == [
        "labels.csv line 8: 'a/q.jpg' names no image: images/a/q.jpg and images/b/q.jpg have this name and ids are "
        "names; rename one of the two"
    ]


def test_a_link_to_the_folder_above_ends(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", CELLS)
    (root / "images/again").symlink_to(root / "images", target_is_directory=True)
    (root / "images/loop").symlink_to("loop")
    assert labels_of(listing_of(root)) == EXPECTED


def test_endless_lines_and_problems_without_number_are_cut_in_messages(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", CELLS)
    (root / "labels.csv").write_text("image,labels\np00,cat\n" + "x" * 10_000_000 + "\n")
    (line,) = problems_of(root)
    assert "line 3: is no CSV (field larger than field limit" in line
    (root / "labels.csv").write_text("x" * 10_000_000 + ",y\n")
    (line,) = problems_of(root)
    assert len(line) < 200
    (tmp_path / "t.txt").write_text("../" + "y" * 10_000_000 + "\n" + "p00\n" * 20_000)
    (tmp_path / "v.txt").write_text("p01\n")
    (root / "labels.csv").write_text(table(","))
    scan = CustomConfig(root=root, train_list=tmp_path / "t.txt", val_list=tmp_path / "v.txt").scan()
    shown = scan.problems.lines(25)
    assert len(scan.problems.lines()) == 20_000
    assert len(shown) == 27
    assert shown[-1] == "… and 19,974 more like the last one; `wsss data check --json` lists all"
    assert max(map(len, shown)) < 250
