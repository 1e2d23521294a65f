"""Corrected masks in a folder: which image each is of, what is wrong with them, all at once."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.contracts import ClassList, ImageRecord, write_index_mask
from stages.data.adapters.custom import CustomConfig
from stages.data.corrected import check_corrected, check_corrected_listed, digest_corrected, find_corrected
from stages.errors import ConfigError, DataError

CLASSES = ClassList(names=("cat", "dog"))
SIZE = (6, 8)


def put(folder: Path, name: str, value: int = 1, size: tuple[int, int] = SIZE) -> None:
    write_index_mask(folder / name, np.full(size, value, dtype=np.uint8))


def image(image_id: str, *labels: int) -> ImageRecord:
    return ImageRecord(id=image_id, image=f"{image_id}.jpg", size=SIZE, labels=labels)


def test_each_mask_is_of_the_image_whose_name_it_has(tmp_path: Path) -> None:
    put(tmp_path, "my photo.png")
    put(tmp_path, unicodedata.normalize("NFD", "é.PNG"))
    put(tmp_path, ".hidden.png")
    (tmp_path / "labelmap.txt").touch()
    found = find_corrected(tmp_path, ["é", "a", "my photo"])
    assert {image_id: path.suffix for image_id, path in found.items()} == {"my photo": ".png", "é": ".PNG"}


def test_every_mask_of_no_training_image_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "a.PNG", "val_1.png", "x.png"):
        put(tmp_path, name)
    with pytest.raises(ConfigError) as caught:
        find_corrected(tmp_path, ["a"])
    assert caught.value.problems == (
        f"corrected_masks: {tmp_path}/a.png: a.PNG is of the same image; remove one of them",
        *(
            f"corrected_masks: {tmp_path}/{name}.png: no training image is called '{name}', and only those are "
            "learned; rename the mask or take it out of the folder"
            for name in ("val_1", "x")
        ),
    )


@pytest.mark.parametrize(("name", "found"), [("gone", "there is no such folder"), (".", "has no PNG mask")])
def test_a_folder_without_masks_is_refused(tmp_path: Path, name: str, found: str) -> None:
    for read in (lambda: find_corrected(tmp_path / name, ["a"]), lambda: digest_corrected(tmp_path / name)):
        with pytest.raises(ConfigError, match=f"{found}; name the folder that `wsss masks import --out` wrote"):
            read()


def test_sizes_values_and_damage_are_all_named(tmp_path: Path) -> None:
    put(tmp_path, "a.png", 3)
    put(tmp_path, "b.png", size=(8, 6))
    (tmp_path / "c.png").write_bytes(b"no image")
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "d.png")
    put(tmp_path, "e.png", 2)
    ids = "abcde"
    with pytest.raises(DataError, match="4 of the corrected masks cannot be learned") as caught:
        check_corrected(find_corrected(tmp_path, ids), [image(i, 0, 1) for i in ids], CLASSES)
    lines = caught.value.problems
    assert [line.partition(".png: ")[2][:30] for line in lines] == [
        "values 3 are no class (allowed",
        "expected 6×8 pixels (height×wi",
        "is no readable mask (cannot id",
        "expected a mask of class indic",
    ]
    assert all(line.startswith(f"corrected_masks: {tmp_path}") for line in lines)


def test_a_class_that_is_no_label_is_told(tmp_path: Path) -> None:
    put(tmp_path, "a.png", 1)
    put(tmp_path, "b.png", 255)
    put(tmp_path, "c.png", 0)
    found = find_corrected(tmp_path, "abc")
    assert check_corrected(found, [image("a", 0), image("b"), image("c")], CLASSES) == []
    (warning,) = check_corrected(found, [image("a", 1)], CLASSES)
    assert "1 masks have a class that their image is not labelled with: 'a (cat)'" in warning


def test_before_the_index_sizes_come_from_the_images(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (40, 50)).save(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "labels.csv").write_text("image,labels\na,cat\nb,dog\nc,cat\nd,dog\n")
    for split, ids in {"train": "a\nb\nc\n", "val": "d\n"}.items():
        (tmp_path / f"{split}.txt").write_text(ids)
    lists = {f"{split}_list": tmp_path / f"{split}.txt" for split in ("train", "val")}
    listing = CustomConfig(root=tmp_path, **lists).scan().listing
    put(tmp_path / "corrected", "a.png", 1, size=(50, 40))
    assert check_corrected_listed(tmp_path / "corrected", listing) == []
    put(tmp_path / "corrected", "b.png", 2, size=(40, 50))
    (tmp_path / "images" / "c.jpg").write_bytes(b"damaged, which data check tells")
    put(tmp_path / "corrected", "c.png", 2, size=(50, 40))
    with pytest.raises(DataError) as caught:
        check_corrected_listed(tmp_path / "corrected", listing)
    (line,) = caught.value.problems
    assert "b.png: expected 50×40 pixels" in line


def test_digests_are_of_bytes(tmp_path: Path) -> None:
    put(tmp_path, "a.png", 1)
    put(tmp_path, "b.png", 1)
    before = digest_corrected(tmp_path)
    assert list(before) == ["a", "b"]
    assert before["a"] == before["b"]
    put(tmp_path, "b.png", 2)
    after = digest_corrected(tmp_path)
    assert after["a"] == before["a"]
    assert after["b"] != before["b"]
