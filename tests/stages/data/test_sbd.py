"""SBD's .mat files to trainaug: the union less val, official masks first, the number checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from stages.contracts import SilentProgress, read_index_mask
from stages.data.adapters.voc import VocConfig
from stages.data.listing import list_data
from stages.data.sbd import convert_sbd, read_sbd_mask
from stages.errors import DataError


def write_mat(path: Path, mask: np.ndarray) -> None:
    """A file of SBD's structure: GTcls with Segmentation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"GTcls": {"Segmentation": mask, "CategoriesPresent": np.unique(mask[mask > 0])}})


@pytest.fixture
def sbd(tmp_path: Path, tiny_voc: Path) -> Path:
    """SBD with a (in VOC train), c (in VOC val) and d (in neither)."""
    folder = tmp_path / "sbd" / "benchmark_RELEASE" / "dataset" / "cls"
    mask = np.zeros((12, 10), dtype=np.uint8)
    mask[3:7, 2:8] = 20
    for name in ("a", "c", "d"):
        write_mat(folder / f"{name}.mat", mask)
    return tmp_path / "sbd"


def test_trainaug_is_sbd_and_train_less_val(sbd: Path, tiny_voc: Path) -> None:
    assert convert_sbd(sbd, tiny_voc, SilentProgress(), expected=3) == 3
    assert (tiny_voc / "ImageSets/Segmentation/trainaug.txt").read_text(encoding="utf-8") == "a\nb\nd\n"
    augmented = tiny_voc / "SegmentationClassAug"
    assert sorted(path.name for path in augmented.iterdir()) == ["a.png", "b.png", "d.png"]
    official = read_index_mask(tiny_voc / "SegmentationClass/a.png")
    np.testing.assert_array_equal(read_index_mask(augmented / "a.png"), official)
    from_sbd = read_index_mask(augmented / "d.png")
    assert (from_sbd == 20).sum() == 24
    assert set(np.unique(from_sbd)) == {0, 20}
    annotation = "<annotation><object><name>tvmonitor</name></object></annotation>"
    (tiny_voc / "Annotations/d.xml").write_text(annotation, encoding="utf-8")
    listing = list_data(VocConfig(root=tiny_voc))
    assert listing.splits == {"train": ("a", "b", "d"), "val": ("c",), "train_score": ("a", "b")}


def test_the_number_is_checked_before_anything_is_written(sbd: Path, tiny_voc: Path) -> None:
    with pytest.raises(DataError, match="are 3 images, expected 10,582"):
        convert_sbd(sbd, tiny_voc, SilentProgress())
    assert not (tiny_voc / "SegmentationClassAug").exists()
    assert not (tiny_voc / "ImageSets/Segmentation/trainaug.txt").exists()


def test_damaged_and_misfit_masks_are_all_named_and_no_list_is_written(sbd: Path, tiny_voc: Path) -> None:
    folder = sbd / "benchmark_RELEASE/dataset/cls"
    (folder / "d.mat").write_bytes(b"no mat file at all")
    write_mat(folder / "e.mat", np.zeros((5, 5), dtype=np.uint8))
    (tiny_voc / "JPEGImages/e.jpg").write_bytes((tiny_voc / "JPEGImages/d.jpg").read_bytes())
    (tiny_voc / "SegmentationClass/b.png").unlink()
    with pytest.raises(DataError) as caught:
        convert_sbd(sbd, tiny_voc, SilentProgress(), expected=4)
    text = "\n".join(caught.value.problems)
    assert "b.png: VOC's mask is missing" in text
    assert "d.mat: is no readable SBD mask" in text
    assert "e.mat: expected 12×10 pixels as its image, found 5×5" in text
    assert not (tiny_voc / "ImageSets/Segmentation/trainaug.txt").exists()


def test_it_goes_on_where_it_stopped(sbd: Path, tiny_voc: Path) -> None:
    convert_sbd(sbd, tiny_voc, SilentProgress(), expected=3)
    done = tiny_voc / "SegmentationClassAug/d.png"
    before = done.stat().st_mtime_ns
    (tiny_voc / "SegmentationClassAug/a.png").unlink()
    convert_sbd(sbd, tiny_voc, SilentProgress(), expected=3)
    assert done.stat().st_mtime_ns == before
    assert (tiny_voc / "SegmentationClassAug/a.png").is_file()


def test_missing_folders_and_images_are_named(sbd: Path, tiny_voc: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no folder cls of SBD"):
        convert_sbd(tmp_path / "nowhere", tiny_voc, SilentProgress())
    (tiny_voc / "JPEGImages/d.jpg").unlink()
    with pytest.raises(DataError, match="JPEGImages has no file for 1 images of trainaug: 'd'"):
        convert_sbd(sbd, tiny_voc, SilentProgress(), expected=3)
    (tiny_voc / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(DataError, match="VOC's list val is missing"):
        convert_sbd(sbd, tiny_voc, SilentProgress(), expected=3)


def test_values_outside_the_20_classes_are_no_mask_of_sbd(tmp_path: Path) -> None:
    write_mat(tmp_path / "x.mat", np.full((4, 4), 21, dtype=np.uint8))
    with pytest.raises(DataError, match="expected class indices 0 … 20"):
        read_sbd_mask(tmp_path / "x.mat")


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, -1.0, 0.5, 20.5, 21.0, 256.0, 1e300])
def test_a_float_that_is_no_class_is_no_class(tmp_path: Path, odd: float) -> None:
    mask = np.full((4, 4), 20.0)
    write_mat(tmp_path / "x.mat", mask)
    assert (read_sbd_mask(tmp_path / "x.mat") == np.full((4, 4), 20, dtype=np.uint8)).all()
    mask[1:3, 2] = odd
    write_mat(tmp_path / "x.mat", mask)
    with pytest.raises(
        DataError, match=r"x\.mat: expected class indices 0 … 20, found 2 other values, e\.g\. "
    ) as caught:
        read_sbd_mask(tmp_path / "x.mat")
    assert f"e.g. {odd}; unpack benchmark.tgz again" in caught.value.message


def test_a_huge_integer_is_no_class(tmp_path: Path) -> None:
    write_mat(tmp_path / "x.mat", np.full((2, 2), 2**56 + 1, dtype=np.int64))
    with pytest.raises(DataError, match="found 4 other values"):
        read_sbd_mask(tmp_path / "x.mat")


def test_case_of_suffixes_does_not_count(sbd: Path, tiny_voc: Path) -> None:
    mat = sbd / "benchmark_RELEASE/dataset/cls/d.mat"
    mat.rename(mat.with_suffix(".MAT"))
    for name in ("JPEGImages/d.jpg", "SegmentationClass/a.png"):
        path = tiny_voc / name
        path.rename(path.with_suffix(path.suffix.upper()))
    assert convert_sbd(sbd, tiny_voc, SilentProgress(), expected=3) == 3
    made = sorted(path.name for path in (tiny_voc / "SegmentationClassAug").iterdir())
    assert made == ["a.png", "b.png", "d.png"]


def test_the_images_size_is_compared_height_first(sbd: Path, tiny_voc: Path) -> None:
    Image.fromarray(np.zeros((10, 12, 3), dtype=np.uint8)).save(tiny_voc / "JPEGImages/d.jpg")
    with pytest.raises(DataError, match="could not be made"):
        convert_sbd(sbd, tiny_voc, SilentProgress(), expected=3)


def test_a_damaged_image_and_a_mask_of_another_type_are_named(sbd: Path, tiny_voc: Path, tmp_path: Path) -> None:
    (tiny_voc / "JPEGImages/d.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="could not be made") as caught:
        convert_sbd(sbd, tiny_voc, SilentProgress(), expected=3)
    assert "d.jpg: not a readable image" in caught.value.problems[0]
    cells = np.empty((2, 2), dtype=object)
    cells[:] = "cell"
    write_mat(tmp_path / "x.mat", np.zeros((2, 2)))
    savemat(tmp_path / "x.mat", {"GTcls": {"Segmentation": cells}})
    with pytest.raises(DataError, match="it is no mask of SBD"):
        read_sbd_mask(tmp_path / "x.mat")
