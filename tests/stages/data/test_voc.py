"""VOC's layout: lists, labels from XML and CSV, subsets of classes, and what is said when something is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from stages.data.adapters.voc import VOC_CLASSES, VocConfig
from stages.data.listing import list_data
from stages.errors import DataError


def config(root: Path, **changes: object) -> VocConfig:
    return VocConfig.model_validate({"root": root, "train_list": "train", **changes})


def problems_of(voc: VocConfig) -> str:
    with pytest.raises(DataError) as caught:
        list_data(voc)
    return "\n".join(caught.value.problems)


def test_labels_come_from_the_objects_of_the_annotations(tiny_voc: Path) -> None:
    listing = list_data(config(tiny_voc))
    labels = {image.id: image.labels for image in listing.images}
    assert labels == {"a": (12, 14), "b": (7,), "c": (7,)}
    assert VOC_CLASSES[12] == "horse"
    assert VOC_CLASSES[14] == "person"
    assert listing.splits == {"train": ("a", "b"), "val": ("c",), "train_score": ("a", "b")}
    assert listing.mask_values == {**{value: value for value in range(21)}, 255: 255}


def test_a_subset_of_classes_renumbers_labels_and_masks(tiny_voc: Path) -> None:
    listing = list_data(config(tiny_voc, classes=("horse", "cat")))
    assert {image.id: image.labels for image in listing.images} == {"a": (0,), "b": (1,), "c": (1,)}
    assert (listing.mask_values[13], listing.mask_values[8], listing.mask_values[15]) == (1, 2, 0)
    ignored = list_data(config(tiny_voc, classes=("horse", "cat"), other_classes="ignore"))
    assert (ignored.mask_values[13], ignored.mask_values[15], ignored.mask_values[0]) == (1, 255, 0)


@pytest.mark.parametrize("change", [str.upper, str.title, {".jpg": ".JFIF", ".png": ".Png", ".xml": ".XML"}.get])
def test_case_and_kind_of_suffixes_do_not_count(tiny_voc: Path, change: Callable[[str], str]) -> None:
    before = list_data(config(tiny_voc))
    for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
        for path in list((tiny_voc / folder).iterdir()):
            path.rename(path.with_suffix(change(path.suffix)))
    after = list_data(config(tiny_voc))
    assert after.splits == before.splits
    assert after.warnings == before.warnings
    assert [(image.id, image.labels) for image in after.images] == [(image.id, image.labels) for image in before.images]
    for image in after.images:
        assert image.mask == f"SegmentationClass/{image.id}{change('.png')}"
        assert image.image == f"JPEGImages/{image.id}{change('.jpg')}"


def test_two_files_of_one_id_are_named(tiny_voc: Path) -> None:
    mask = tiny_voc / "SegmentationClass/a.png"
    shutil.copy(mask, mask.with_suffix(".PNG"))
    listing = list_data(config(tiny_voc))
    assert next(image.mask for image in listing.images if image.id == "a") == "SegmentationClass/a.png"
    assert any("in SegmentationClass belong to no image" in text and "a.PNG" in text for text in listing.warnings)
    shutil.copy(tiny_voc / "JPEGImages/a.jpg", tiny_voc / "JPEGImages/a.JPG")
    text = problems_of(config(tiny_voc))
    assert f"{tiny_voc}/JPEGImages/a.jpg: JPEGImages/a.JPG gives the same id 'a'; remove one of the two" in text


def test_pipes_folders_and_links_to_themselves_are_no_files(tiny_voc: Path) -> None:
    images = tiny_voc / "JPEGImages"
    (images / "x.jpg").mkdir()
    os.mkfifo(images / "y.jpg")
    (images / "z.jpg").symlink_to("z.jpg")
    assert {image.id for image in list_data(config(tiny_voc)).images} == {"a", "b", "c"}


def test_images_without_a_chosen_class_are_named_as_background(tiny_voc: Path) -> None:
    listing = list_data(config(tiny_voc, classes=("horse", "dog")))
    assert listing.warnings == (
        "1 of 2 training images have none of the classes: they are background",
        "no training image has the class dog: it cannot be learnt",
    )


def test_wrong_class_names_get_the_nearest_spelling(tiny_voc: Path) -> None:
    with pytest.raises(ValidationError, match="'hors' is no VOC class, did you mean 'horse'"):
        config(tiny_voc, classes=("hors", "cat"))
    with pytest.raises(ValidationError, match="named twice"):
        config(tiny_voc, classes=("cat", "cat"))


def test_augmented_masks_come_first_for_full_supervision_and_never_for_val(tiny_voc: Path) -> None:
    augmented = tiny_voc / "SegmentationClassAug"
    augmented.mkdir()
    for name in ("a", "c"):
        (augmented / f"{name}.png").write_bytes((tiny_voc / f"SegmentationClass/{name}.png").read_bytes())
    images = {image.id: image for image in list_data(config(tiny_voc)).images}
    assert images["a"].mask == "SegmentationClass/a.png"
    assert images["a"].full_mask == "SegmentationClassAug/a.png"
    assert images["b"].full_mask == "SegmentationClass/b.png"
    assert images["c"].full_mask is None


def test_a_missing_trainaug_says_how_to_make_it(tiny_voc: Path) -> None:
    text = problems_of(config(tiny_voc, train_list="trainaug"))
    assert "trainaug.txt does not exist (found test, train, val)" in text
    assert "`wsss data voc DIR` makes it from SBD" in text
    assert "data.train_list=train" in text


def test_test_images_need_no_masks_and_no_labels(tiny_voc: Path) -> None:
    listing = list_data(config(tiny_voc, test_list="test"))
    image = listing.images[-1]
    assert (image.id, image.labels, image.mask, listing.splits["test"]) == ("d", None, None, ("d",))
    mask = tiny_voc / "SegmentationClass/d.png"
    mask.write_bytes((tiny_voc / "SegmentationClass/a.png").read_bytes())
    image = list_data(config(tiny_voc, test_list="test")).images[-1]
    assert (image.mask, image.full_mask) == ("SegmentationClass/d.png", None), (
        "a mask is for the score, if there is one"
    )
    (tiny_voc / "ImageSets/Segmentation/test.txt").unlink()
    assert "unpack VOC2012test.tar" in problems_of(config(tiny_voc, test_list="test"))


def test_a_wrong_root_is_one_problem_with_the_right_folder(tiny_voc: Path) -> None:
    assert problems_of(config(tiny_voc.parent)).endswith(f"set data.root={tiny_voc}")
    assert problems_of(config(tiny_voc.parent.parent)).endswith(f"set data.root={tiny_voc}")
    assert "does not exist" in problems_of(config(tiny_voc / "nowhere"))


def test_the_csv_replaces_the_annotations(tiny_voc: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("image,labels\na,cat horse\nb,dog\n", encoding="utf-8")
    images = {image.id: image.labels for image in list_data(config(tiny_voc, labels=labels)).images}
    assert images == {"a": (7, 12), "b": (11,), "c": None}


def test_all_problems_of_a_csv_at_once(tiny_voc: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("image,labels\na,cta\nghost,cat\na,dog\nx,y,z\n", encoding="utf-8")
    lines = problems_of(config(tiny_voc, labels=labels)).splitlines()
    assert lines == [
        "labels.csv line 5: expected 'image,labels' with the labels separated by spaces or ';', found 'x,y,z'",
        "labels.csv line 4: image 'a' has its labels on line 2 already; join the two lines",
        "labels.csv line 3: image 'ghost' has no file in JPEGImages; remove the line or add the image",
        "labels.csv: training image 'b' has no line; add its labels or remove it from the list",
        "labels.csv line 2: unknown class 'cta', did you mean 'cat'?",
    ]


def test_a_document_type_in_an_annotation_is_refused(tiny_voc: Path) -> None:
    bomb = '<!DOCTYPE a [<!ENTITY x "cat">]><annotation><object><name>&x;</name></object></annotation>'
    (tiny_voc / "Annotations/a.xml").write_text(bomb, encoding="utf-8")
    assert "declares a document type" in problems_of(config(tiny_voc))
    (tiny_voc / "Annotations/a.xml").write_text(bomb, encoding="utf-16")
    assert "declares a document type" in problems_of(config(tiny_voc))


def test_damaged_and_missing_annotations_are_named(tiny_voc: Path) -> None:
    (tiny_voc / "Annotations/a.xml").write_text("<annotation><object>", encoding="utf-8")
    (tiny_voc / "Annotations/b.xml").unlink()
    (tiny_voc / "Annotations/c.xml").unlink()
    text = problems_of(config(tiny_voc))
    assert "a.xml: not a readable VOC annotation" in text
    assert "the labels of training image 'b' are missing" in text
    assert "'c'" not in text


def test_lists_are_checked_against_each_other_and_the_images(tiny_voc: Path) -> None:
    lists = tiny_voc / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("a\nb\na\nc\n../etc/passwd\nghost\n", encoding="utf-8")
    text = problems_of(config(tiny_voc))
    assert "train.txt line 5: expected one image id, found '../etc/passwd'" in text
    assert "train.txt line 3: image 'a' stands on line 1 already" in text
    assert "1 images stand in both train (ImageSets/Segmentation/train.txt) and val" in text
    assert "train.txt line 6: image 'ghost' has no file in JPEGImages" in text
    (lists / "train.txt").write_text("\n", encoding="utf-8")
    assert "the train list is empty" in problems_of(config(tiny_voc))


def test_val_without_masks_is_valid_but_with_some_missing_is_not(tiny_voc: Path) -> None:
    (tiny_voc / "SegmentationClass/c.png").unlink()
    listing = list_data(config(tiny_voc))
    assert "scores on val will be absent" in listing.warnings[0]
    assert listing.images[-1].mask is None
    (tiny_voc / "JPEGImages/e.jpg").write_bytes((tiny_voc / "JPEGImages/d.jpg").read_bytes())
    (tiny_voc / "SegmentationClass/e.png").write_bytes((tiny_voc / "SegmentationClass/a.png").read_bytes())
    (tiny_voc / "ImageSets/Segmentation/val.txt").write_text("c\ne\n", encoding="utf-8")
    assert "1 of 2 val images" in problems_of(config(tiny_voc))


def test_training_masks_may_be_absent(tiny_voc: Path) -> None:
    for name in ("a", "b"):
        (tiny_voc / f"SegmentationClass/{name}.png").unlink()
    listing = list_data(config(tiny_voc))
    assert listing.splits["train_score"] == ()
    assert any("attention and pseudo-masks are scored on 0" in text for text in listing.warnings)


def test_a_named_folder_of_masks_must_be_there(tiny_voc: Path) -> None:
    list_data(config(tiny_voc))  # without SegmentationClassAug, which is a default
    assert problems_of(config(tiny_voc, masks="SegmentationClas", full_masks="Aug")).splitlines() == [
        f"data.masks: folder {tiny_voc}/SegmentationClas does not exist; did you mean 'SegmentationClass'?",
        f"data.full_masks: folder {tiny_voc}/Aug does not exist (folders there: Annotations, ImageSets, JPEGImages, "
        "SegmentationClass); correct the name",
    ]


def test_masks_that_belong_to_no_image_are_counted(tiny_voc: Path) -> None:
    folder = tiny_voc / "SegmentationClass"
    (folder / "a.png").rename(folder / "a_mask.png")
    (folder / "b.png").rename(folder / "b.tif")
    assert list_data(config(tiny_voc)).warnings[0] == (
        "2 of 3 files in SegmentationClass belong to no image: 'a_mask.png', 'b.tif'; they are not used: "
        "a mask is a PNG named as its image, e.g. 'a.png'"
    )


REAL = Path(__file__).parents[4] / "shared" / "voc_animals"


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not beside the project")
def test_the_real_animals_list_with_their_numbers() -> None:
    animals = VocConfig(
        root=REAL / "VOC2012", labels=REAL / "labels.csv", classes=("cat", "cow", "dog", "horse", "sheep")
    )
    listing = list_data(animals)
    assert {split: len(ids) for split, ids in listing.splits.items()} == {"train": 1032, "val": 162, "train_score": 309}
    assert [listing.mask_values[value] for value in (8, 10, 12, 13, 17, 255)] == [1, 2, 3, 4, 5, 255]
    assert listing.warnings == ()
    assert sum(0 in (image.labels or ()) for image in listing.images) == 211


def test_an_annotation_in_an_unknown_encoding_is_named(tiny_voc: Path) -> None:
    text = '<?xml version="1.0" encoding="voc-8"?><annotation></annotation>'
    (tiny_voc / "Annotations/a.xml").write_text(text, encoding="utf-8")
    assert "a.xml: not a readable VOC annotation (unknown encoding: voc-8)" in problems_of(config(tiny_voc))


def test_training_images_without_any_label_are_refused(tiny_voc: Path) -> None:
    text = problems_of(config(tiny_voc, classes=("dog", "sheep")))
    assert text == (
        "none of the 2 training images has a label of the classes dog, sheep; "
        "correct the labels, the train list or data.classes"
    )
