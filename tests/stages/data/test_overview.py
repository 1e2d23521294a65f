"""`wsss data check` says what it understood, and what labels and masks contradict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.contracts import SilentProgress, write_index_mask
from stages.data.adapters.custom import CustomConfig
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.voc import VocConfig
from stages.data.check import check_data
from stages.data.overview import ClassCount, DataOverview
from stages.prepare_data import PrepareDataConfig, prepare_data
from tests.stages.data.drawn_sets import draw_set


def check(config: CustomConfig | VocConfig) -> tuple[DataOverview, list[str], list[str]]:
    progress = SilentProgress()
    found = check_data(config, progress, processes=1)
    return found.overview, found.problems.lines(), progress.warnings


def run_warnings(config: CustomConfig, out: Path) -> list[str]:
    progress = SilentProgress()
    prepare_data(PrepareDataConfig(), data=config, out=out, progress=progress)
    return progress.warnings


def lists(folder: Path, train: str, val: str) -> dict[str, Path]:
    (folder / "t.txt").write_text(train)
    (folder / "v.txt").write_text(val)
    return {"train_list": folder / "t.txt", "val_list": folder / "v.txt"}


def test_the_overview_in_numbers_and_words(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", ["cat dog", "dog", "cow", "cow", "cat dog", "dog"], values=[1, 3, 2, 2, 1, 3])
    (root / "masks/p03.png").rename(root / "masks/p03_mask.png")
    config = CustomConfig(root=root, **lists(tmp_path, "p00\np01\np02\np04\n", "p05\n"))  # type: ignore[arg-type]
    overview, problems, warnings = check(config)
    assert problems == []
    assert overview == DataOverview(
        num_images=5,
        splits={"train": 4, "val": 1},
        height_px=(24, 24),
        width_px=(32, 32),
        classes=(ClassCount("cat", 2, 0), ClassCount("cow", 1, 0), ClassCount("dog", 3, 1)),
        masks={"train": 4, "val": 1},
        unused_masks=("masks/p03_mask.png",),
        val_lacks=("cat", "cow"),
        always_with=(("cat", "dog"),),
    )
    assert overview.lines() == [
        "5 images: 4 train, 1 val; height 24, width 32 px",
        "masks of 4 train, 1 val; 1 files belong to no image",
        "3 classes (images of train + val; the number is the value in masks):",
        "    1 cat: 2 + 0",
        "    2 cow: 1 + 0",
        "    3 dog: 3 + 1",
        "val has no image of 2 classes: 'cat', 'cow'",
        "on training images 'cat' never without 'dog'",
    ]
    assert (
        "1 of 6 files in masks belong to no image: 'p03_mask.png'; they are not used: a mask is a PNG named as its "
        "image, e.g. 'p03.png'" in warnings
    )


def test_generated_sets_and_sets_without_anything_have_an_overview() -> None:
    drawn = check_data(SyntheticConfig(num_train=4, num_val=2), SilentProgress()).overview
    assert drawn.lines()[0] == "6 images: 4 train, 2 val"
    empty = check_data(CustomConfig(root=Path("/nowhere/at/all")), SilentProgress())
    assert empty.overview.lines()[:2] == ["0 images: 0 train, 0 val", "masks of no image"]
    assert empty.overview.classes == ()


def test_where_val_has_no_labels_its_masks_say_what_it_shows(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", ["cat", "dog", "cat", "dog", "cow", "", ""], values=[1, 3, 1, 3, 2, 1, 1])
    labels = root / "labels.csv"
    labels.write_text("\n".join(labels.read_text().splitlines()[:6]) + "\n")
    config = CustomConfig(root=root, **lists(tmp_path, "p00\np01\np02\np03\np04\n", "p05\np06\n"))  # type: ignore[arg-type]
    overview, _, _ = check(config)
    assert overview.classes == (ClassCount("cat", 2, 2), ClassCount("cow", 1, 0), ClassCount("dog", 2, 0))
    assert overview.val_lacks == ("cow", "dog")
    bare, _, _ = check(config.model_copy(update={"masks": None}))
    assert bare.classes[0] == ClassCount("cat", 2, None)
    assert bare.val_lacks == ()
    assert "    1 cat: 2 + ?" in bare.lines()


def test_many_classes_are_cut_in_words_and_whole_in_numbers(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", [f"class{number}" for number in range(50)])
    overview, _, _ = check(CustomConfig(root=root))
    assert [count.name for count in overview.classes[:11]] == [f"class{number}" for number in range(11)]
    assert len(overview.classes) == 50
    assert "  … and 10 more; --json lists all" in overview.lines()


def test_numbers_as_names_have_the_masks_values(tmp_path: Path) -> None:
    numbers = [1 + n % 12 for n in range(36)]
    root = draw_set(tmp_path / "set", [str(number) for number in numbers], values=numbers)
    overview, problems, warnings = check(CustomConfig(root=root))
    assert [count.name for count in overview.classes] == [str(number) for number in range(1, 13)]
    assert (problems, warnings) == ([], [])
    as_text = tuple(sorted(map(str, range(1, 13))))
    _, _, warnings = check(CustomConfig(root=root, classes=as_text))
    assert warnings == [
        "in 33 of 36 masks there is a class that is not among its image's labels: 'p03' (mask 12; labels 4), "
        "'p04' (mask 2; labels 5), 'p06' (mask 4; labels 7), …; is the order of the classes right? set data.classes "
        "(now: 1 1, 2 10, 3 11, 4 12, 5 2, …), or complete the labels"
    ]


def test_masks_in_another_order_than_the_classes_are_said_by_check_and_run(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", ["dog", "cat"] * 6, values=[1, 2] * 6)
    expected = "masks there is a class that is not among its image's labels: 'p0"
    _, problems, warnings = check(CustomConfig(root=root))
    assert problems == []
    assert [text for text in warnings if text.startswith(f"in 12 of 12 {expected}") and "set data.classes" in text]
    (text,) = [text for text in run_warnings(CustomConfig(root=root), tmp_path / "out") if expected in text]
    assert text.startswith("in 2 of 2 masks"), "those of val, which are read anyway"
    right = CustomConfig(root=root, classes=("dog", "cat"))
    assert check(right)[2] == run_warnings(right, tmp_path / "right") == []


def test_where_val_cannot_tell_the_training_masks_do_and_change_nothing(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", ["dog", "cat", "dog", "cat", "", ""], values=[1, 2, 1, 2, 1, 2])
    labels = root / "labels.csv"
    labels.write_text("\n".join(labels.read_text().splitlines()[:5]) + "\n")
    config = CustomConfig(root=root, **lists(tmp_path, "p00\np01\np02\np03\n", "p04\np05\n"))  # type: ignore[arg-type]
    (text,) = run_warnings(config, tmp_path / "swapped")
    assert text.startswith("in 4 of 4 masks there is a class that is not among its image's labels")
    for number in range(4):
        mask = np.zeros((24, 32), dtype=np.uint8)
        mask[8:16] = (2, 1)[number % 2]
        write_index_mask(root / f"masks/p{number:02d}.png", mask)
    assert run_warnings(config, tmp_path / "right") == []
    write_index_mask(root / "masks/p00.png", np.full((24, 32), 200, dtype=np.uint8))
    assert run_warnings(config, tmp_path / "spoilt") == [], "what else is wrong with a training mask is no matter here"
    names = ("swapped", "right", "spoilt")
    assert len({(tmp_path / name / "index.json").read_bytes() for name in names}) == 1


def test_masks_that_have_fewer_classes_than_the_labels_are_fine(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", ["cat dog", "dog", "cow cat", "dog", "cow", "cow"], values=[3, 3, 2, 3, 2, 2])
    assert check(CustomConfig(root=root))[2] == []


def test_voc_has_its_order_but_labels_may_lack(tiny_voc: Path) -> None:
    for path in (tiny_voc / "JPEGImages").iterdir():  # large enough to be an image
        path.write_bytes(draw_set(tiny_voc.parent / path.stem, [""]).joinpath("images/p00.jpg").read_bytes())
    for name, value in (("a", 13), ("b", 8), ("c", 12)):
        write_index_mask(tiny_voc / f"SegmentationClass/{name}.png", np.tri(24, 32, dtype=np.uint8) * value)
    _, problems, warnings = check(VocConfig(root=tiny_voc, train_list="train"))
    assert problems == []
    assert warnings[1:] == [
        "in 1 of 3 masks there is a class that is not among its image's labels: 'c' (mask dog; labels cat); "
        "are labels missing, or do the masks belong to other images?"
    ]


def test_masks_in_another_unicode_form_are_used(tmp_path: Path) -> None:
    cells, values = ["bar", "disc"] * 3, [1, 2] * 3
    for there, written in (("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")):
        root = tmp_path / f"set{len(there)}"
        draw_set(
            root,
            cells,
            values=values,
            stem=lambda n, there=there: f"{there}{n}",  # type: ignore[misc]
            mask_name=lambda stem, there=there, written=written: f"{stem.replace(there, written)}.png",
        )  # type: ignore[misc]
        overview, problems, warnings = check(CustomConfig(root=root))
        assert (problems, warnings, overview.masks) == ([], [], {"train": 4, "val": 2})


def test_voc_finds_lists_annotations_and_masks_in_another_unicode_form(tiny_voc: Path) -> None:
    composed, decomposed = "b\u00e9", "be\u0301"
    (tiny_voc / "JPEGImages/b.jpg").rename(tiny_voc / f"JPEGImages/{composed}.jpg")
    (tiny_voc / "SegmentationClass/b.png").rename(tiny_voc / f"SegmentationClass/{decomposed}.png")
    (tiny_voc / "Annotations/b.xml").rename(tiny_voc / f"Annotations/{decomposed}.xml")
    (tiny_voc / "ImageSets/Segmentation/train.txt").write_text(f"a\n{decomposed}\n", encoding="utf-8")
    scan = VocConfig(root=tiny_voc, train_list="train").scan()
    assert scan.problems.lines() == []
    assert scan.listing.splits["train"] == scan.listing.splits["train_score"] == ("a", composed)
    assert [(image.labels, image.mask) for image in scan.listing.images if image.id == composed] == [
        ((7,), f"SegmentationClass/{decomposed}.png")
    ]


@pytest.mark.parametrize("num_classes", [1, 2])
def test_a_class_on_every_image_is_said(num_classes: int, tmp_path: Path) -> None:
    cells = ["cat"] * 6 if num_classes == 1 else ["cat dog", "cat"] * 3
    root = draw_set(tmp_path / "set", cells)
    (text,) = [text for text in check(CustomConfig(root=root, masks=None))[2] if "every one" in text]
    assert text.startswith("every one of the ")
    assert "training images has the class cat: nothing tells it from what is beside it; add images without it" in text
    (root / "images/q.jpg").write_bytes((root / "images/p00.jpg").read_bytes())
    (root / "labels.csv").write_text((root / "labels.csv").read_text() + "q,\n")
    config = CustomConfig(root=root, masks=None, **lists(tmp_path, "p00\np01\nq\n", "p02\n"))  # type: ignore[arg-type]
    assert not [text for text in check(config)[2] if "every one" in text]


def test_classes_that_no_image_tells_apart_are_said(tmp_path: Path) -> None:
    root = draw_set(tmp_path / "set", ["cat;dog", "cat;dog", "cow", "cow;pig", "", "cat;dog", "cat;dog"])
    config = CustomConfig(root=root, **lists(tmp_path, "p00\np01\np02\np03\np04\n", "p05\n"))  # type: ignore[arg-type]
    assert (
        "these classes are always on the same training images: cat and dog (2 images): nothing tells one from the "
        "other" in check(config)[2]
    )
