"""ImageNet's layout: flat and sorted val, lists and XML boxes, a choice of classes, and the text of every defect."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.contracts import ImageIndex, SilentProgress, open_image_set, read_json
from stages.data.adapters.imagenet import ImageNetConfig
from stages.data.check import check_data
from stages.data.listing import list_data
from stages.data.records import DataListing
from stages.errors import DataError
from stages.prepare_data import PrepareDataConfig, prepare_data
from tests.stages.data.wsol_sets import annotation, square_of, write_imagenet

VAL = tuple(f"ILSVRC2012_val_{number:08d}" for number in range(1, 5))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_imagenet(tmp_path / "imagenet")


def listing_of(root: Path, **changes: object) -> DataListing:
    return list_data(ImageNetConfig.model_validate({"root": root, **changes}))


def problems(root: Path, **changes: object) -> list[str]:
    with pytest.raises(DataError) as caught:
        listing_of(root, **changes)
    return list(caught.value.problems)


def facts(listing: DataListing) -> dict[str, tuple]:
    val = set(listing.splits["val"])
    return {image.id: (image.labels, image.boxes) for image in listing.images if image.id in val}


EXPECTED = {name: ((number % 2,), ((number % 2, square_of(number)),)) for number, name in enumerate(VAL)}


def write_annotations(root: Path) -> Path:
    folder = root / "boxes"
    folder.mkdir()
    for number, name in enumerate(VAL):
        own = f"n0{number % 2 + 1}"
        (folder / f"{name}.xml").write_text(annotation((own, square_of(number))), encoding="utf-8")
    return folder


def test_flat_val_with_lists(root: Path, tmp_path: Path) -> None:
    listing = listing_of(root)
    assert listing.classes.names == ("n01", "n02")
    assert listing.splits["train"] == ("n01_0", "n01_2", "n02_1", "n02_3")
    assert listing.splits["val"] == VAL
    assert facts(listing) == EXPECTED
    assert listing.warnings == ()
    config = ImageNetConfig(root=root)
    assert check_data(config, SilentProgress(), processes=1).problems.lines() == []
    prepare_data(PrepareDataConfig(), data=config, out=tmp_path / "out", progress=SilentProgress())
    record = open_image_set(tmp_path / "out", root).index.record(VAL[1])
    assert (record.size, record.labels, record.boxes, record.mask) == ((40, 50), *EXPECTED[VAL[1]], None)


def test_val_in_class_folders_needs_no_labels(root: Path) -> None:
    for number, name in enumerate(VAL):
        folder = root / "val" / f"n0{number % 2 + 1}"
        folder.mkdir(exist_ok=True)
        (root / "val" / f"{name}.JPEG").rename(folder / f"{name}.JPEG")
    (root / "val_labels.txt").unlink()
    assert facts(listing_of(root)) == EXPECTED


def test_xml_annotations_give_boxes_and_labels(root: Path) -> None:
    folder = write_annotations(root)
    (root / "val_labels.txt").unlink()
    assert facts(listing_of(root, val_boxes=folder)) == EXPECTED
    two = annotation(("n01", (1, 2, 3, 4)), ("n01", (5, 6, 7, 8)))
    (folder / f"{VAL[0]}.xml").write_text(two, encoding="utf-8")
    found = facts(listing_of(root, val_boxes=folder))
    assert found[VAL[0]] == ((0,), ((0, (1, 2, 3, 4)), (0, (5, 6, 7, 8))))


def test_labels_may_be_numbers_as_in_wsolevaluation(root: Path) -> None:
    path = root / "val_labels.txt"
    path.write_text(path.read_text().replace("n01", "0").replace("n02", "1"))
    assert facts(listing_of(root)) == EXPECTED


def test_a_choice_of_classes_leaves_the_other_images_out(root: Path) -> None:
    listing = listing_of(root, classes=["n02"])
    assert listing.splits["train"] == ("n02_1", "n02_3")
    assert facts(listing) == {name: ((0,), ((0, square_of(n)),)) for n, name in enumerate(VAL) if n % 2}
    (root / "val_labels.txt").unlink()
    found = facts(listing_of(root, classes=["n02"], val_boxes=write_annotations(root)))
    assert set(found) == {VAL[1], VAL[3]}


def test_without_boxes_there_is_a_warning(root: Path) -> None:
    (root / "localization.txt").unlink()
    listing = listing_of(root)
    assert [text.split(": ", 1)[1] for text in listing.warnings] == [
        "there is no localization.txt and data.val_boxes is not set: boxes of val are not known"
    ]
    assert all(image.boxes is None for image in listing.images)


def test_every_wrong_line_is_named_with_its_number(root: Path) -> None:
    boxes = root / "localization.txt"
    lines = boxes.read_text().splitlines()
    lines[0] = f"val/{VAL[0]}.JPEG,5,5,4,9"
    lines[1] = f"val/{VAL[1]}.JPEG,1,2,3"
    lines += ["val/other.JPEG,1,2,3,4", "", ",1,2,3,4", f"val/{VAL[3]}.JPEG,1,nan,3,4"]
    boxes.write_text("\n".join(lines))
    labels = root / "val_labels.txt"
    lines = labels.read_text().splitlines()
    lines[2] = f"val/{VAL[2]}.JPEG,n1"
    lines += [f"val/{VAL[0]}.JPEG,n02", "val/other.JPEG,n01", "nothing"]
    labels.write_text("\n".join(lines))
    found = problems(root)
    for text in (
        f"localization.txt line 1: expected 'path,x0,y0,x1,y1', found 'val/{VAL[0]}.JPEG,5,5,4,9' "
        "(expected 0 <= x0 <= x1 and 0 <= y0 <= y1, found 5, 5, 4, 9: are these x, y, width, height?); correct the "
        "line",
        f"localization.txt line 2: expected 'path,x0,y0,x1,y1', found 'val/{VAL[1]}.JPEG,1,2,3' "
        "(expected four numbers, found 3); correct the line",
        "localization.txt line 5: image 'other' has no file in val; remove the line or add the image",
        "localization.txt line 7: expected 'path,x0,y0,x1,y1', found ',1,2,3,4' "
        "(that names no image); correct the line",
        f"localization.txt line 8: expected 'path,x0,y0,x1,y1', found 'val/{VAL[3]}.JPEG,1,nan,3,4' "
        "(expected four numbers, found '1, nan, 3, 4'); correct the line",
        "val_labels.txt line 3: unknown class 'n1'; expected a folder of train or 0 … 1",
        f"val_labels.txt line 5: image '{VAL[0]}' has its label on line 1 already; remove one of the two",
        "val_labels.txt line 6: image 'other' has no file in val; remove the line or add the image",
        "val_labels.txt line 7: expected 'path,class', found 'nothing' (no class); correct the line",
    ):
        assert text in found


def with_boxes(root: Path, *boxes: str) -> list[str]:
    """The problems of the lists, or else those of check with its warnings, where the first images have these boxes."""
    lines = (root / "localization.txt").read_text().splitlines()
    lines[: len(boxes)] = [f"val/{name}.JPEG,{box}" for name, box in zip(VAL, boxes, strict=False)]
    (root / "localization.txt").write_text("\n".join(lines))
    progress = SilentProgress()
    found = check_data(ImageNetConfig(root=root), progress, processes=1).problems.lines()
    return [*found, *progress.warnings]


@pytest.mark.parametrize("box", ["0.1,0.2,0.5,0.75", "0,0,1,0.5", "0.0,0.0,1.0,.999", "5e-1,0.1,1,1"])
def test_boxes_in_fractions_of_the_image_are_refused(root: Path, box: str) -> None:
    assert with_boxes(root, box)[0] == (
        f"localization.txt line 1: expected 'path,x0,y0,x1,y1', found 'val/{VAL[0]}.JPEG,{box}' (expected pixels, "
        "found fractions of the image; multiply x by its width and y by its height); correct the line"
    )


def test_a_box_of_nothing_but_0_and_1_is_asked_about(root: Path) -> None:
    assert with_boxes(root, "0,0,1,1") == [
        f"val/{VAL[0]}.JPEG: box 0, 0, 1, 1 (x0, y0, x1, y1) has at most 2×2 of 40×50 pixels (height×width): is it in "
        "fractions of the image?  Multiply x by the width and y by the height"
    ]
    assert with_boxes(root, "0.5,0.5,1.5,20") == [], "fractions of a pixel"


def test_widths_and_heights_instead_of_ends_are_seen(root: Path) -> None:
    assert "found 30, 20, 10, 15: are these x, y, width, height?)" in with_boxes(root, "30,20,10,15")[0]


def test_x_and_y_in_the_other_order_are_said(root: Path) -> None:
    (text,) = with_boxes(root, "2,4,30,48", "2,4,30,49")
    assert text.startswith(
        "the boxes of 2 images reach beyond their image and are cut at its edge, at most by 9 pixels"
    )
    assert "; all of these would fit with x and y in the other order; if they" in text
    assert "(height×width); x and y are probably in the other order; correct" in with_boxes(root, "2,41,30,48")[0]


def test_boxes_of_one_pixel_in_width_are_warned_of(root: Path) -> None:
    (text,) = with_boxes(root, "7,4,7,30")
    assert text == f"1 box is one pixel wide or high: 'val/{VAL[0]}.JPEG'; are they empty?  Correct the box list"


def test_missing_folders_files_and_labels_are_named(root: Path, tmp_path: Path) -> None:
    assert problems(tmp_path / "none") == [
        f"data.root: folder {tmp_path / 'none' / 'train'} does not exist; correct the path"
    ]
    assert problems(root, train="training")[0].startswith("data.train: folder")
    assert f"data.val: folder {root / 'validation'} does not exist; correct the path" in problems(
        root, val="validation"
    )
    assert problems(root, classes=["n01", "n20"]) == [
        f"data.classes: {root / 'train'} has no folder 'n20', did you mean 'n02'?"
    ]
    assert f"data.val_labels: {root / 'x.txt'} does not exist; correct the path" in problems(
        root, val_labels=root / "x.txt"
    )
    assert f"data.val_boxes: {root / 'x'} does not exist; correct the path" in problems(root, val_boxes=root / "x")
    (root / "val_labels.txt").write_text(f"{VAL[0]},n01\n")
    text = f"3 of 4 images of val have no label: '{VAL[1]}', '{VAL[2]}', '{VAL[3]}'"
    assert any(problem.startswith(text) for problem in problems(root))


def test_images_without_a_box_and_of_the_same_name_are_named(root: Path) -> None:
    path = root / "localization.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert problems(root) == [
        f"1 of 4 val images have no box: '{VAL[3]}'; add the boxes or remove the images from the list"
    ]
    (root / "train/n02/n01_0.JPEG").write_bytes(b"")
    text = "train/n02/n01_0.JPEG: train/n01/n01_0.JPEG gives the same image id 'n01_0'; rename one of the two"
    assert text in problems(root)


def test_unreadable_and_dangerous_annotations_are_refused(root: Path) -> None:
    folder = write_annotations(root)
    (folder / f"{VAL[0]}.xml").write_text("<annotation>")
    (folder / f"{VAL[1]}.xml").write_text("<!DOCTYPE a><annotation></annotation>")
    (folder / f"{VAL[2]}.xml").write_text(annotation(("n09", (1, 2, 3, 4))))
    (folder / f"{VAL[3]}.xml").write_text("<annotation><object><name>n02</name></object></annotation>")
    found = "\n".join(problems(root, val_boxes=folder))
    for text in (
        f"{VAL[0]}.xml: not a readable annotation with boxes (no element found",
        f"{VAL[1]}.xml: not a readable annotation with boxes (it declares a document type",
        f"{VAL[2]}.xml: unknown class 'n09'; expected a folder of train",
        f"{VAL[3]}.xml: not a readable annotation with boxes",
    ):
        assert text in found


def test_numbers_count_all_folders_also_where_some_classes_are_chosen(root: Path) -> None:
    path = root / "val_labels.txt"
    path.write_text(path.read_text().replace("n01", "0").replace("n02", "1"))
    assert set(facts(listing_of(root, classes=["n02"]))) == {VAL[1], VAL[3]}


def test_an_index_without_boxes_says_so(root: Path, tmp_path: Path) -> None:
    (root / "localization.txt").unlink()
    config = ImageNetConfig(root=root)
    prepare_data(PrepareDataConfig(), data=config, out=tmp_path / "out", progress=SilentProgress())
    index = read_json(tmp_path / "out" / "index.json")
    assert index["has_object_masks"] is False
    assert index["is_single_label"] is True
    assert all(image["boxes"] is None for image in index["images"])
    assert ImageIndex.model_validate(index).images[0].boxes is None


def test_numbers_that_may_be_names_or_positions_are_asked_about(root: Path) -> None:
    for old, new in (("n01", "1"), ("n02", "2")):
        (root / "train" / old).rename(root / "train" / new)
    labels = root / "val_labels.txt"
    labels.write_text("".join(f"{name}.JPEG,{number % 2}\n" for number, name in enumerate(VAL)))
    (line,) = [line for line in problems(root) if "positions" in line]
    assert line == (
        "val_labels.txt: '1' is a folder of train and '0' is none: are they names, or positions from 0?  "
        "Write the folders' names"
    )
    labels.write_text("".join(f"{name}.JPEG,{1 + number % 2}\n" for number, name in enumerate(VAL)))
    assert facts(listing_of(root)) == EXPECTED


def test_file_names_that_are_no_text_are_named_and_other_unicode_forms_match(root: Path) -> None:
    train = root / "train/n01"
    (train / "n01_0.JPEG").rename(train / "caf\udce9.JPEG")
    assert any("it is not UTF-8 (byte 0xE9); rename the file" in line for line in problems(root))
    (train / "caf\udce9.JPEG").rename(train / "n01\u202f0.JPEG")
    image = root / f"val/{VAL[0]}.JPEG"
    image.rename(root / "val/e\u0301.JPEG")
    for name in ("val_labels.txt", "localization.txt"):
        text = (root / name).read_text(encoding="utf-8").replace(VAL[0], "\u00e9")
        (root / name).write_text(text, encoding="utf-8")
    listing = listing_of(root)
    assert "n01\u202f0" in listing.splits["train"]
    assert facts(listing)["e\u0301"] == EXPECTED[VAL[0]]
