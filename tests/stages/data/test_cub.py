"""CUB-200-2011's layout: what is listed, what the index holds, and the text of every defect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.contracts import SilentProgress, open_image_set, read_json
from stages.data.adapters.cub import CubConfig
from stages.data.check import check_data
from stages.data.listing import digest_data, list_data
from stages.errors import DataError
from stages.prepare_data import PrepareDataConfig, prepare_data
from tests.stages.data.wsol_sets import square_of, write_cub


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    return write_cub(tmp_path / "CUB_200_2011")


def edit(path: Path, change: Callable[[list[str]], None]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    change(lines)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def problems(root: Path, **changes: object) -> list[str]:
    with pytest.raises(DataError) as caught:
        list_data(CubConfig.model_validate({"root": root, **changes}))
    return list(caught.value.problems)


def test_a_good_set_is_listed(cub: Path) -> None:
    listing = list_data(CubConfig(root=cub))
    assert listing.classes.names == ("001.Red_Auk", "002.Blue_Bee")
    assert listing.splits["train"] == ("Red_Auk_0001", "Blue_Bee_0002", "Red_Auk_0003", "Blue_Bee_0004")
    assert listing.splits["val"] == ("Red_Auk_0005", "Blue_Bee_0006", "Red_Auk_0007", "Blue_Bee_0008")
    assert listing.splits["train_score"] == listing.splits["train"]
    images = {image.id: image for image in listing.images}
    bee = images["Blue_Bee_0006"]
    assert (bee.image, bee.labels) == ("images/002.Blue_Bee/Blue_Bee_0006.png", (1,))
    assert bee.mask == "segmentations/002.Blue_Bee/Blue_Bee_0006.png"
    assert bee.boxes == ((1, square_of(5)),)
    assert images["Red_Auk_0001"].boxes is None, "no box of a training image is handed on"
    assert listing.warnings == ()
    progress = SilentProgress()
    assert check_data(CubConfig(root=cub), progress, processes=1).problems.lines() == []
    assert progress.warnings == []


def test_case_of_suffixes_does_not_count(cub: Path) -> None:
    before = list_data(CubConfig(root=cub))
    for path in [*cub.glob("images/*/*"), *cub.glob("segmentations/*/*")]:
        path.rename(path.with_suffix(path.suffix.upper()))
    after = list_data(CubConfig(root=cub))
    assert (after.splits, after.warnings) == (before.splits, ())
    assert {image.id: image.mask for image in after.images}["Red_Auk_0001"] == (
        "segmentations/001.Red_Auk/Red_Auk_0001.PNG"
    )
    assert all((cub / image.image).is_file() for image in after.images)


def test_the_index_has_boxes_and_masks_of_each_image_s_class(cub: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = prepare_data(PrepareDataConfig(), data=CubConfig(root=cub), out=out, progress=SilentProgress())
    assert result.metrics == {"data.num_train": 4, "data.num_val": 4}
    images = open_image_set(out, cub)
    assert images.index.splits["holdout"] == (), "val has labels"
    for number, record in enumerate(images.index.split("val"), start=4):
        assert record.boxes == ((number % 2, square_of(number)),)
        mask = images.read_mask(record)
        x0, y0, x1, y1 = square_of(number)
        expected = np.zeros((48, 64), np.uint8)
        expected[y0 : y1 + 1, x0 : x1 + 1] = number % 2 + 1
        np.testing.assert_array_equal(mask, expected, err_msg=record.image)
    written = read_json(out / "index.json")
    assert written["has_object_masks"] is True
    assert written["is_single_label"] is True
    assert [image["boxes"] is not None for image in written["images"]] == [False] * 4 + [True] * 4


def test_without_masks_boxes_are_enough(tmp_path: Path) -> None:
    root = write_cub(tmp_path / "cub", masks=False)
    listing = list_data(CubConfig(root=root))
    assert listing.warnings == ()
    assert not listing.has_object_masks
    assert listing.splits["train_score"] == ()
    text = problems(root, masks="segmentation_masks")[0]
    assert text.startswith(f"data.masks: folder {root}/segmentation_masks does not exist")


def test_boxes_enter_the_digest(cub: Path, tmp_path: Path) -> None:
    def digest() -> str:
        config = CubConfig(root=cub)
        return digest_data(list_data(config), config, tmp_path / "cache.json").whole()

    before = digest()
    edit(cub / "bounding_boxes.txt", lambda lines: lines.__setitem__(7, "8 1.0 1.0 20.0 20.0"))
    assert digest() != before


def test_a_wrong_root_is_named(cub: Path, tmp_path: Path) -> None:
    assert problems(tmp_path) == [
        f"data.root: {tmp_path} has no images.txt, but {cub} has; set data.root={cub}",
    ]
    assert problems(tmp_path / "none") == [
        f"data.root: folder {tmp_path / 'none'} does not exist; correct the path",
    ]
    assert problems(cub / "images")[0].endswith("name the folder CUB_200_2011")


def test_every_wrong_line_is_named_with_its_number(cub: Path) -> None:
    edit(cub / "bounding_boxes.txt", lambda lines: lines.__setitem__(1, "2 4.0 -3.0 9.0 9.0"))
    edit(cub / "bounding_boxes.txt", lambda lines: lines.__setitem__(2, "3 4.0 x 9.0 9.0"))
    edit(cub / "bounding_boxes.txt", lambda lines: lines.__setitem__(3, "4 4.0 3.0 9.0"))
    edit(cub / "train_test_split.txt", lambda lines: lines.__setitem__(0, "1 2"))
    edit(cub / "image_class_labels.txt", lambda lines: lines.append("9 1"))
    edit(cub / "image_class_labels.txt", lambda lines: lines.__setitem__(5, "6 7"))
    edit(cub / "image_class_labels.txt", lambda lines: lines.insert(1, "1 1"))
    edit(cub / "images.txt", lambda lines: lines.__setitem__(7, "8 ../secret.png"))
    found = problems(cub)
    for text in (
        "bounding_boxes.txt line 2: expected 'image_id x y width height', found '2 4.0 -3.0 9.0 9.0' "
        "(expected 0 <= x0 <= x1 and 0 <= y0 <= y1, found 4, -3, 13, 6); restore the file",
        "bounding_boxes.txt line 3: expected 'image_id x y width height', found '3 4.0 x 9.0 9.0' "
        "(could not convert string to float: 'x'); restore the file",
        "bounding_boxes.txt line 4: expected 'image_id x y width height', found '4 4.0 3.0 9.0' "
        "(expected four numbers, found 3); restore the file",
        "train_test_split.txt line 1: expected 'image_id is_training_image', found '1 2' (1 for training, 0 for "
        "test); restore the file",
        "image_class_labels.txt line 2: id 1 has a line already; remove one of the two",
        "image_class_labels.txt line 10: id 9 is not in images.txt; remove the line",
        "image_class_labels.txt: image id 6 has class id 7, which is not in classes.txt; restore the files",
        "images.txt line 8: expected 'image_id path', found '8 ../secret.png' (a path below images/ has no '..' and "
        "does not begin with '/'); restore the file",
    ):
        assert text in found


def test_missing_files_and_lines_are_named(cub: Path) -> None:
    (cub / "images/001.Red_Auk/Red_Auk_0003.png").unlink()
    (cub / "segmentations/002.Blue_Bee/Blue_Bee_0008.png").unlink()
    (cub / "train_test_split.txt").unlink()
    edit(cub / "bounding_boxes.txt", lambda lines: lines.pop(4))
    found = problems(cub)
    assert f"{cub}/train_test_split.txt does not exist; unpack CUB_200_2011.tgz again" in found
    assert "bounding_boxes.txt: 1 images of images.txt have no line, e.g. id 5; restore the file" in found
    (cub / "train_test_split.txt").write_text("".join(f"{n} {int(n < 5)}\n" for n in range(1, 9)))
    found = problems(cub)
    assert "images.txt line 3: image 'Red_Auk_0003' has no file in images; remove the line or add the image" in found
    assert any(text.startswith("1 of 4 val images (images.txt) have no mask in segmentations") for text in found)
    assert "1 of 4 val images have no box: 'Red_Auk_0005'; add the boxes or remove the images from the list" in found


def test_two_images_of_one_name_are_refused(cub: Path) -> None:
    edit(cub / "images.txt", lambda lines: lines.__setitem__(1, "2 002.Blue_Bee/Red_Auk_0001.png"))
    text = "images.txt: 001.Red_Auk/Red_Auk_0001.png and 002.Blue_Bee/Red_Auk_0001.png give the same image id"
    assert f"{text} 'Red_Auk_0001'; rename one of the two" in problems(cub)


def test_a_box_outside_its_image_is_refused_and_one_that_sticks_out_is_cut(cub: Path, tmp_path: Path) -> None:
    edit(cub / "bounding_boxes.txt", lambda lines: lines.__setitem__(4, "5 40.0 8.0 24.0 40.0"))  # ends at 64, 48
    edit(cub / "bounding_boxes.txt", lambda lines: lines.__setitem__(5, "6 40.0 8.0 34.0 10.0"))
    config, progress = CubConfig(root=cub), SilentProgress()
    prepare_data(PrepareDataConfig(), data=config, out=tmp_path / "out", progress=progress)
    records = open_image_set(tmp_path / "out", cub).index.split("val")
    assert [record.boxes for record in records[:2]] == [((0, (40, 8, 63, 47)),), ((1, (40, 8, 63, 18)),)]
    checked = SilentProgress()
    assert check_data(config, checked, processes=1).problems.lines() == []
    assert checked.warnings == progress.warnings
    assert progress.warnings == [
        "the boxes of 1 images reach beyond their image and are cut at its edge, at most by 10 pixels "
        "(images/002.Blue_Bee/Blue_Bee_0006.png); if they are of other image files or sizes, scores are worthless"
    ]
    edit(cub / "bounding_boxes.txt", lambda lines: lines.__setitem__(6, "7 64.0 8.0 4.0 4.0"))
    expected = (
        "images/001.Red_Auk/Red_Auk_0007.png: box 64, 8, 68, 12 (x0, y0, x1, y1) lies outside the image of 48×64 "
        "pixels (height×width); correct the box list"
    )
    assert check_data(config, SilentProgress(), processes=1).problems.lines() == [expected]
    with pytest.raises(DataError) as caught:
        prepare_data(PrepareDataConfig(), data=config, out=tmp_path / "again", progress=SilentProgress())
    assert list(caught.value.problems) == [expected]


def test_a_colour_mask_is_still_refused(cub: Path) -> None:
    path = cub / "segmentations/002.Blue_Bee/Blue_Bee_0006.png"
    with Image.open(path) as mask:
        mask.convert("RGB").save(path)
    found = check_data(CubConfig(root=cub), SilentProgress(), processes=1).problems.lines()
    assert len(found) == 1
    assert f"{path}: expected a mask of class indices (PNG mode P or L, 8 bits a pixel), found mode RGB" in found[0]


def test_masks_that_belong_to_no_image_are_counted(cub: Path) -> None:
    folder = cub / "segmentations/001.Red_Auk"
    for name in ("Red_Auk_0001", "Red_Auk_0003"):
        (folder / f"{name}.png").rename(folder / f"{name}_mask.png")
    listing = list_data(CubConfig(root=cub))
    assert listing.splits["train_score"] == ("Blue_Bee_0002", "Blue_Bee_0004")
    assert listing.warnings == (
        "2 of 8 files in segmentations belong to no image: '001.Red_Auk/Red_Auk_0001_mask.png', "
        "'001.Red_Auk/Red_Auk_0003_mask.png'; they are not used: a mask is a PNG named as its image, "
        "e.g. 'Red_Auk_0001.png'",
    )


def test_names_may_have_any_space_and_unicode_form_but_no_control_character(cub: Path) -> None:
    edit(cub / "images.txt", lambda lines: lines.__setitem__(0, "1 001.Red_Auk/Caf\u00e9\u202f1.png"))
    edit(cub / "images.txt", lambda lines: lines.__setitem__(1, "2 002.Blue_Bee/Bee\x1b[2J.png"))
    for kind in ("images", "segmentations"):
        folder = cub / kind / "001.Red_Auk"
        (folder / "Red_Auk_0001.png").rename(folder / "Cafe\u0301\u202f1.png")
    lines = problems(cub)
    expected = "images.txt line 2: expected 'image_id path', found '2 002.Blue_Bee/Bee\\x1b[2J.png'"
    assert lines[0] == f"{expected} (it has the control character U+001B); restore the file"
    edit(cub / "images.txt", lambda lines: lines.__setitem__(1, "2 002.Blue_Bee/Blue_Bee_0002.png"))
    (image,) = [image for image in list_data(CubConfig(root=cub)).images if image.id.startswith("Caf")]
    assert image.image == "images/001.Red_Auk/Cafe\u0301\u202f1.png"
    assert image.mask == "segmentations/001.Red_Auk/Cafe\u0301\u202f1.png"
