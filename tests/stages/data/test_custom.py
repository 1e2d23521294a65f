"""One's own data: any names, masks optional, lists optional."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from stages.data.adapters.custom import CustomConfig
from stages.data.listing import list_data
from stages.data.records import DataListing, some
from stages.errors import DataError


def problems_of(config: CustomConfig) -> list[str]:
    with pytest.raises(DataError) as caught:
        list_data(config)
    return list(caught.value.problems)


def by_id(listing: DataListing) -> dict[str, tuple[int, ...] | None]:
    return {image.id: image.labels for image in listing.images}


def test_a_folder_with_a_csv_is_a_data_set(own_data: Path) -> None:
    listing = list_data(CustomConfig(root=own_data))
    assert listing.classes.names == ("stop sign", "traffic light")
    assert by_id(listing) == {"a": (0, 1), "b": (1,), "c 1": (0,), "d": ()}
    assert {image.id: image.image for image in listing.images}["d"] == "images/d.JPEG"
    assert listing.mask_values == {0: 0, 1: 1, 2: 2, 255: 255}
    assert any("'e'" in text and "not used" in text for text in listing.warnings)


def test_without_lists_val_is_drawn_from_the_images_with_masks(own_data: Path) -> None:
    listing = list_data(CustomConfig(root=own_data))
    assert len(listing.splits["val"]) == 1
    assert set(listing.splits["val"]) < {"a", "b"}
    assert set(listing.splits["train"]) == {"a", "b", "c 1", "d"} - set(listing.splits["val"])
    assert set(listing.splits["train_score"]) == {"a", "b"} - set(listing.splits["val"])


def test_no_masks_at_all_is_valid(own_data: Path) -> None:
    listing = list_data(CustomConfig(root=own_data, masks=None))
    assert all(image.mask is None and image.full_mask is None for image in listing.images)
    assert listing.splits["train_score"] == ()
    assert any("scores on val will be absent" in text for text in listing.warnings)
    shutil.rmtree(own_data / "masks")
    absent = list_data(CustomConfig(root=own_data))
    assert absent.splits["train_score"] == ()


def test_lists_allow_val_without_labels(own_data: Path, tmp_path: Path) -> None:
    train, val = tmp_path / "t.txt", tmp_path / "v.txt"
    train.write_text("a.jpg\nb\n\n", encoding="utf-8")
    val.write_text("e\r\n", encoding="utf-8")
    listing = list_data(CustomConfig(root=own_data, train_list=train, val_list=val))
    assert listing.splits == {"train": ("a", "b"), "val": ("e",), "train_score": ("a", "b")}
    assert by_id(listing)["e"] is None


def test_one_list_alone_and_odd_class_names_are_refused(own_data: Path) -> None:
    with pytest.raises(ValidationError, match="both train_list and val_list"):
        CustomConfig(root=own_data, train_list=own_data / "t.txt")
    with pytest.raises(ValidationError, match="value 0 is given"):
        CustomConfig(root=own_data, classes=("background", "x"))
    with pytest.raises(ValidationError, match="named twice"):
        CustomConfig(root=own_data, classes=("x", "x"))


def test_unknown_names_get_the_nearest_spelling(own_data: Path) -> None:
    lines = problems_of(CustomConfig(root=own_data, classes=("stop signs", "traffic light")))
    assert lines == [
        "labels.csv line 2: unknown class 'stop sign', did you mean 'stop signs'?",
        "labels.csv line 4: unknown class 'stop sign', did you mean 'stop signs'?",
    ]


def test_a_name_with_spaces_needs_no_semicolon_when_the_classes_are_given(own_data: Path) -> None:
    (own_data / "labels.csv").write_text("image,labels\na,stop sign\nb,light\n", encoding="utf-8")
    listing = list_data(CustomConfig(root=own_data, classes=("stop sign", "light"), masks=None))
    assert by_id(listing) == {"a": (0,), "b": (1,)}


def test_missing_things_are_said_together(own_data: Path) -> None:
    (own_data / "labels.csv").unlink()
    (own_data / "images").rename(own_data / "photos")
    lines = problems_of(CustomConfig(root=own_data))
    assert lines[0].startswith("data.images: folder")
    assert "write a CSV with the header 'image,labels'" in lines[1]
    assert "data.root: folder" in problems_of(CustomConfig(root=own_data / "x"))[0]


def test_a_wrong_header_an_empty_csv_and_latin1_are_named(own_data: Path) -> None:
    labels = own_data / "labels.csv"
    labels.write_text("file;class\na;b\n", encoding="utf-8")
    assert problems_of(CustomConfig(root=own_data)) == [
        "labels.csv line 1: expected the header 'image,labels', found 'file;class'; name the columns so, or write a "
        "column of 0 and 1 for each class beside 'image'"
    ]
    labels.write_text("image,labels\n", encoding="utf-8")
    assert "no line below its header" in problems_of(CustomConfig(root=own_data))[0]
    labels.write_bytes("image,labels\na,Bär\n".encode("latin-1"))
    assert problems_of(CustomConfig(root=own_data)) == ["labels.csv: is not UTF-8 text; save it as UTF-8"]


def test_a_line_that_is_no_csv_is_named(own_data: Path) -> None:
    (own_data / "labels.csv").write_text("image,labels\na," + "x" * 200_000 + "\n", encoding="utf-8")
    assert problems_of(CustomConfig(root=own_data)) == [
        "labels.csv line 2: is no CSV (field larger than field limit (131072)); save the file as CSV in UTF-8"
    ]


def test_two_files_of_one_id_and_misnamed_masks_are_named(own_data: Path) -> None:
    (own_data / "images/a.png").write_bytes(b"")
    (own_data / "masks/a.png").rename(own_data / "masks/a_mask.png")
    (own_data / "masks/b.png").unlink()
    lines = problems_of(CustomConfig(root=own_data))
    assert "gives the same image id 'a'" in lines[0]
    assert "none of its 1 masks is named as an image (found a_mask.png, expected e.g. a.png)" in lines[1]


def test_tiny_sets_are_split_or_say_why_not(own_data: Path) -> None:
    (own_data / "masks/a.png").unlink()
    listing = list_data(CustomConfig(root=own_data, val_ratio=0.001))
    assert listing.splits["val"] == ("b",), "the one image with a mask"
    assert listing.splits["train"] == ("a", "c 1", "d")
    (own_data / "labels.csv").write_text("image,labels\na,traffic light\n", encoding="utf-8")
    assert problems_of(CustomConfig(root=own_data, val_ratio=0.999)) == [
        "split of labels.csv: the val list is empty; label at least two images of the folder, "
        "or give data.train_list and data.val_list"
    ]


def test_a_named_folder_of_masks_must_be_there(own_data: Path) -> None:
    (own_data / "masks").rename(own_data / "Mask_PNG")
    list_data(CustomConfig(root=own_data))  # the default may be absent
    assert problems_of(CustomConfig(root=own_data, masks="mask_pngs")) == [
        f"data.masks: folder {own_data / 'mask_pngs'} does not exist; did you mean 'Mask_PNG'?"
    ]
    assert problems_of(CustomConfig(root=own_data, masks="truth")) == [
        f"data.masks: folder {own_data / 'truth'} does not exist (folders there: Mask_PNG, images); correct the name"
    ]
    assert problems_of(CustomConfig(root=own_data, masks="x/y")) == [
        f"data.masks: folder {own_data / 'x/y'} does not exist (folders there: none); correct the name"
    ]


def test_a_missing_list_is_named(own_data: Path) -> None:
    lists = {"train_list": own_data / "t.txt", "val_list": own_data / "v.txt"}
    text = "\n".join(problems_of(CustomConfig.model_validate({"root": own_data, **lists})))
    assert f"data.train_list: {own_data / 't.txt'} does not exist" in text
    assert f"data.val_list: {own_data / 'v.txt'} does not exist" in text


def test_images_in_the_root_itself(own_data: Path) -> None:
    for path in (own_data / "images").iterdir():
        path.rename(own_data / path.name)
    listing = list_data(CustomConfig(root=own_data, images="."))
    assert {image.image for image in listing.images} == {"a.jpg", "b.png", "c 1.jpg", "d.JPEG"}


def test_background_in_the_csv_is_no_class(own_data: Path) -> None:
    labels = own_data / "labels.csv"
    labels.write_text(labels.read_text(encoding="utf-8").replace("d,", "d,background"), encoding="utf-8")
    assert problems_of(CustomConfig(root=own_data)) == [
        f"{labels}: 'background' is no class of yours (mask value 0 is given); "
        "leave the labels of an image without any class empty"
    ]


def test_lists_of_one_name_in_two_folders_are_both_checked(own_data: Path, tmp_path: Path) -> None:
    for split, content in (("train", "a\nb\ngone\n"), ("val", "e\n")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "ids.txt").write_text(content, encoding="utf-8")
    lists = {"train_list": tmp_path / "train/ids.txt", "val_list": tmp_path / "val/ids.txt"}
    lines = problems_of(CustomConfig.model_validate({"root": own_data, **lists}))
    assert lines == ["ids.txt line 3: image 'gone' has no file in images; remove the line or add the image"]


def test_an_unused_file_whose_name_is_not_utf8_can_be_spoken_of() -> None:
    assert some(["caf\udce9"]) == r"'caf\udce9'"


def test_a_rare_name_close_to_a_frequent_one_is_suspected(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    lines = ["image,labels"]
    for number in range(24):
        Image.new("RGB", (20, 20)).save(tmp_path / f"images/i{number}.jpg")
        lines.append(f"i{number},{'hors' if number == 3 else 'horse' if number % 2 else 'cow'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    (text,) = [text for text in list_data(CustomConfig(root=tmp_path)).warnings if "misspelt" in text]
    assert "'hors' (1) beside 'horse' (11)" in text
    assert "data.classes" in text
    assert "cow" not in text


def test_images_in_sub_folders_carry_the_folders_name(own_data: Path) -> None:
    for name, image in (("cat", "a.jpg"), ("dog", "a.jpg"), (".hidden", "a.jpg")):
        (own_data / name).mkdir()
        shutil.copy(next((own_data / "images").glob("a.*")), own_data / name / image)
    shutil.rmtree(own_data / "images")
    (own_data / "labels.csv").write_text("image,labels\ncat_a.jpg,cat\ndog_a,dog\n", encoding="utf-8")
    (own_data / "masks/a.png").rename(own_data / "masks/cat_a.png")
    listing = list_data(CustomConfig(root=own_data, images="*"))
    assert {image.id: image.image for image in listing.images} == {"cat_a": "cat/a.jpg", "dog_a": "dog/a.jpg"}
    assert {image.id: image.mask for image in listing.images} == {"cat_a": "masks/cat_a.png", "dog_a": None}
    (own_data / "dog/a.png").write_bytes(b"")
    assert (
        "dog/a.png: dog/a.jpg gives the same image id 'dog_a'"
        in problems_of(CustomConfig(root=own_data, images="*"))[0]
    )
    for name in ("cat", "dog"):
        shutil.rmtree(own_data / name)
    assert "there is no image" in problems_of(CustomConfig(root=own_data, images="*"))[0]
