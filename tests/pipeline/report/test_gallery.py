"""The gallery has every scored image, the worst first, and lies in the page or in a folder beside it."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report import gallery
from pipeline.report.colours import safe_palette
from pipeline.report.gallery import LAYERS, ScoredSet, Shot, make_gallery, scored_sets
from stages.contracts import ClassList, ImageIndex, ImageRecord, ImageSet, write_index_mask
from stages.errors import DataError
from stages.ops.metrics.confusion import SparseConfusions, confusion_matrix

TRUTH = np.repeat(np.array([[1, 0]], np.uint8), 10, axis=0).repeat(10, axis=1)
"""Left half cat, right half background, (10, 20)."""
COLUMNS = {"v10": 10, "v9": 0, "v2": 5, "v3": 0}
"""Columns of the cat that are found in each image."""


def make_world(folder: Path) -> tuple[ImageSet, ScoredSet, dict[str, SparseConfusions]]:
    """Four images with their truth and predictions."""
    pairs = []
    for image_id, columns in COLUMNS.items():
        Image.new("RGB", (20, 10), (200, 100, 50)).save(folder / f"{image_id}.png")
        found = np.zeros_like(TRUTH)
        found[:, :columns] = 1
        write_index_mask(folder / f"truth/{image_id}.png", TRUTH)
        write_index_mask(folder / f"predictions/{image_id}.png", found)
        pairs.append((image_id, confusion_matrix(TRUTH, found, 3)))
    index = ImageIndex(
        classes=ClassList(names=("cat", "dog")),
        images=tuple(
            ImageRecord(id=i, image=f"{i}.png", size=(10, 20), labels=None, mask=f"truth/{i}.png") for i in COLUMNS
        ),
        splits={"train": (), "val": tuple(COLUMNS)},
        mask_values={0: 0, 1: 1},
    )
    shown = ScoredSet("segmenter", "predictions, val", folder / "predictions")
    return ImageSet(index=index, root=folder), shown, {"segmenter": SparseConfusions.from_matrices(3, pairs)}


def make(folder: Path) -> list[Shot]:
    images, shown, counts = make_world(folder)
    return make_gallery(images, [shown], counts, safe_palette(), folder / "out" / "my page.html")


def test_every_image_is_there_the_worst_first_and_equal_ones_in_natural_order(tmp_path: Path) -> None:
    shots = make(tmp_path)
    assert [shot.id for shot in shots] == ["v3", "v9", "v2", "v10"]
    assert shots[2].class_iou == pytest.approx({0: 10 / 15, 1: 0.5})
    assert shots[2].miou == pytest.approx((10 / 15 + 0.5) / 2)
    assert all(len(shot.addresses) == len(LAYERS) for shot in shots)
    assert all(address.startswith("data:image/webp;base64,") for shot in shots for address in shot.addresses)
    assert not (tmp_path / "out" / "my page-images").exists()


def test_pictures_that_are_too_many_lie_in_a_folder_that_keeps_no_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out" / "my page-images"
    folder.mkdir(parents=True)
    (folder / f"{'0' * 24}.webp").write_bytes(b"of an earlier page")
    (folder / "mine.txt").write_text("not ours")
    monkeypatch.setattr(gallery, "MAX_INLINE_BYTES", 100)
    shots = make(tmp_path)
    addresses = {address for shot in shots for address in shot.addresses}
    assert all(re.fullmatch(r"my%20page-images/[0-9a-f]{24}\.webp", address) for address in addresses)
    names = {address.rpartition("/")[2] for address in addresses}
    assert {path.name for path in folder.iterdir()} == names | {"mine.txt"}
    with Image.open(folder / shots[0].addresses[0].rpartition("/")[2]) as photo:
        assert photo.size == (gallery.THUMBNAIL_PX, gallery.THUMBNAIL_PX // 2)
    monkeypatch.undo()
    make(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"], "the page holds its pictures again"


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    images, shown, counts = make_world(tmp_path)
    (tmp_path / "v2.png").unlink()
    with pytest.raises(DataError, match=r"v2\.png"):
        make_gallery(images, [shown], counts, safe_palette(), tmp_path / "page.html")


def test_sets_are_what_was_scored(tmp_path: Path) -> None:
    _, _, counts = make_world(tmp_path)
    artifacts = {"evaluate": tmp_path / "e", "make_masks": tmp_path / "m"}
    things = dict.fromkeys(("masks", "segmenter_ms", "segmenter_test_ms", "attention"), counts["segmenter"])
    found = scored_sets(artifacts, things, "segmenter_ms")
    assert [(shown.thing, shown.folder) for shown in found] == [
        ("segmenter_ms", tmp_path / "e/predictions"),
        ("segmenter_test_ms", tmp_path / "e/predictions"),
        ("masks", tmp_path / "m/masks"),
    ]
    assert scored_sets({"evaluate": tmp_path}, things, "segmenter") == []
