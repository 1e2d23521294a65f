"""The embedded benchmark: deterministic, of the promised structure, with its context bias."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from stages.contracts import read_index_mask, read_rgb
from stages.data.adapters.custom import CustomConfig
from stages.data.adapters.synthetic import BIASED_LABEL, SyntheticConfig, image_labels, val_group
from stages.data.adapters.synthetic_images import draw_picture, generate_synthetic
from stages.data.listing import list_data
from stages.data.readers import read_annotation
from stages.data.records import Problems
from stages.errors import DataError


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_config_gives_the_same_bytes(synthetic_folder: Path, tmp_path: Path) -> None:
    config = SyntheticConfig(num_train=6, num_val=3, size_px=64, num_classes=3)
    generate_synthetic(config, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(synthetic_folder)
    generate_synthetic(config, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(synthetic_folder)


def test_more_images_and_another_split_size_leave_the_first_ones_as_they_are(synthetic_folder: Path) -> None:
    larger = SyntheticConfig(num_train=60, num_val=30, size_px=64, num_classes=3)
    _, mask = draw_picture(larger, "train", 4)
    np.testing.assert_array_equal(mask, read_index_mask(synthetic_folder / "SegmentationClass/train_00004.png"))
    other = draw_picture(SyntheticConfig(seed=1, num_train=60, num_val=30, size_px=64, num_classes=3), "train", 4)[1]
    assert not np.array_equal(mask, other)
    assert not np.array_equal(mask, draw_picture(larger, "val", 4)[1])


def test_the_layout_is_that_of_voc(synthetic_folder: Path, as_custom: Callable[..., CustomConfig]) -> None:
    listing = list_data(SyntheticConfig(num_train=6, num_val=3, size_px=64, num_classes=3))
    on_disk = list_data(as_custom(synthetic_folder))
    assert on_disk.images == listing.images
    assert on_disk.splits == listing.splits
    assert on_disk.mask_values == listing.mask_values
    assert on_disk.classes == listing.classes
    assert listing.root is None
    for image in listing.images:
        mask = read_index_mask(synthetic_folder / str(image.mask))
        assert read_rgb(synthetic_folder / image.image).shape == (*mask.shape, 3) == (64, 64, 3)
        assert tuple(np.unique(mask[mask > 0]) - 1) == image.labels
        names = read_annotation(synthetic_folder / f"Annotations/{image.id}.xml", Problems())
        assert names == tuple(listing.classes.names[label] for label in image.labels or ())


def test_every_label_stays_visible_when_objects_overlap() -> None:
    config = SyntheticConfig(max_objects=4, num_classes=12, size_px=64)
    shares = []
    for index in range(150):
        labels, _ = image_labels(config, "train", index)
        mask = draw_picture(config, "train", index)[1]
        counts = np.bincount(mask.ravel(), minlength=13)
        assert {label + 1 for label in labels} == {value for value in range(1, 13) if counts[value]}
        shares += [counts[label + 1] for label in labels]
    assert min(shares) >= 20


def test_classes_and_numbers_of_objects_are_balanced() -> None:
    config = SyntheticConfig()
    labels = [image_labels(config, "train", index)[0] for index in range(600)]
    counts = Counter(label for present in labels for label in present)
    assert set(counts) == set(range(6))
    assert max(counts.values()) < 1.5 * min(counts.values())
    assert 0.4 < sum(len(present) == 2 for present in labels) / 600 < 0.6


def saturation(pixels: np.ndarray) -> float:
    pixels = pixels.astype(float)
    return float(((pixels.max(1) - pixels.min(1)) / (pixels.max(1) + 1e-6)).mean())


def test_heads_are_vivid_and_bodies_muted_with_a_texture_above_the_noise() -> None:
    config = SyntheticConfig(max_objects=1)
    shares, deviations = [], []
    for index in range(30):
        picture, mask = draw_picture(config, "train", index)
        pixels = picture[mask > 0].astype(float)
        vivid = (pixels.max(1) - pixels.min(1)) > 150
        shares.append(vivid.mean())
        body = pixels[~vivid & (pixels.min(1) > 45)]
        assert saturation(body) < 0.5
        deviations.append(body.mean(1).std())
    assert 0.08 < float(np.mean(shares)) < 0.30
    assert float(np.mean(deviations)) > 2 * 6 / np.sqrt(3)


def test_options_change_what_they_say() -> None:
    def head_share(ratio: float) -> float:
        config = SyntheticConfig(max_objects=1, head_ratio=ratio)
        shares = []
        for index in range(12):
            picture, mask = draw_picture(config, "train", index)
            pixels = picture[mask > 0].astype(float)
            shares.append(((pixels.max(1) - pixels.min(1)) > 150).mean())
        return float(np.mean(shares))

    assert head_share(0.2) < head_share(0.3) < head_share(0.5)
    faint = draw_picture(SyntheticConfig(body_contrast=4), "train", 0)
    strong = draw_picture(SyntheticConfig(body_contrast=60), "train", 0)
    np.testing.assert_array_equal(faint[1], strong[1])
    body = faint[1] > 0
    assert faint[0][body].astype(float).std() < strong[0][body].astype(float).std()
    assert draw_picture(SyntheticConfig(size_px=128), "train", 0)[0].shape == (128, 128, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size_px": 63},
        {"size_px": 257},
        {"num_classes": 13},
        {"num_classes": 1},
        {"classes": ("a", "b")},
        {"classes": ("a", "a"), "num_classes": 2},
        {"classes": ("a b", "c"), "num_classes": 2},
        {"context_bias": 1.5},
        {"heads": 1},
    ],
)
def test_bad_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SyntheticConfig.model_validate(wrong)


def is_wavy(picture: np.ndarray, mask: np.ndarray) -> bool:
    """The biased background is blue on average and waves from top to bottom."""
    rows = np.array([picture[y][mask[y] == 0].mean(0) for y in range(len(mask)) if (mask[y] == 0).any()])
    blue = rows.mean(0)
    return bool(blue[2] > blue[1] > blue[0] and rows.std(0).min() > 6)


def test_the_context_bias_ties_one_class_to_a_background_in_training() -> None:
    config = SyntheticConfig.model_validate({"context_bias": True, "num_train": 60, "num_val": 16, "size_px": 64})
    assert config.context_bias == 1.0
    for index in range(60):
        labels, is_context = image_labels(config, "train", index)
        assert is_context == (BIASED_LABEL in labels)
    tied = [i for i in range(60) if image_labels(config, "train", i)[1]]
    assert all(is_wavy(*draw_picture(config, "train", index)) for index in tied)


def test_val_has_the_object_on_it_off_it_and_the_background_alone(tmp_path: Path) -> None:
    config = SyntheticConfig(context_bias=1.0, num_train=2, num_val=12, size_px=64)
    for index in range(config.num_val):
        labels, is_context = image_labels(config, "val", index)
        group = val_group(config, index)
        assert is_context == (group in {"on", "empty"})
        assert (BIASED_LABEL in labels) == (group in {"on", "off"})
        assert (labels == ()) == (group == "empty")
    generate_synthetic(config, tmp_path / "set")
    with (tmp_path / "set/ImageSets/Segmentation/val_groups.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[:5] == [
        ["image", "group"],
        ["val_00000", "on"],
        ["val_00001", "off"],
        ["val_00002", "empty"],
        ["val_00003", "other"],
    ]
    assert read_index_mask(tmp_path / "set/SegmentationClass/val_00002.png").max() == 0
    listing = list_data(config)
    assert {image.id: image.labels for image in listing.images}["val_00002"] == ()


def test_without_a_bias_there_are_no_groups_and_half_a_bias_ties_about_half(synthetic_folder: Path) -> None:
    assert not (synthetic_folder / "ImageSets/Segmentation/val_groups.csv").exists()
    config = SyntheticConfig(context_bias=0.5)
    present = [image_labels(config, "train", index) for index in range(600)]
    ties = [is_context for labels, is_context in present if BIASED_LABEL in labels]
    assert 0.3 < sum(ties) / len(ties) < 0.7


def test_a_folder_with_other_things_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="is not empty"):
        generate_synthetic(SyntheticConfig(num_train=2, num_val=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_another_config_does_not_mix_into_a_set(synthetic_folder: Path) -> None:
    before = digests(synthetic_folder)
    with pytest.raises(DataError, match="no synthetic set of this config"):
        generate_synthetic(SyntheticConfig(num_train=3, num_val=3, size_px=64, num_classes=3), synthetic_folder)
    assert digests(synthetic_folder) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(DataError, match="is a file or lies below one"):
            generate_synthetic(SyntheticConfig(num_train=2, num_val=1, size_px=64), folder)
