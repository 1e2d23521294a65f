"""The digest of a data set, hash splits, and that a config needs no heavy library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from stages.data.adapters.custom import CustomConfig
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.voc import VocConfig
from stages.data.config import DataConfig, data_root
from stages.data.listing import DataView, digest_data, find_changed_files, list_data
from stages.data.records import Problems, Scan
from stages.data.subsets import hash_fraction, hash_half, hash_share
from stages.errors import DataError

AsCustom = Callable[..., CustomConfig]


def digest(config: CustomConfig, cache: Path) -> str:
    return digest_data(list_data(config), config, cache).whole()


def test_a_moved_copy_has_the_same_digest(synthetic_folder: Path, broken: Path, as_custom: AsCustom) -> None:
    cache = broken.parent / "cache.json"
    assert digest(as_custom(synthetic_folder), cache) == digest(as_custom(broken), cache)


@pytest.mark.parametrize("name", ["JPEGImages/train_00001.jpg", "SegmentationClass/val_00000.png"])
def test_a_changed_file_changes_the_digest(broken: Path, as_custom: AsCustom, name: str) -> None:
    cache = broken.parent / "cache.json"
    before = digest(as_custom(broken), cache)
    with (broken / name).open("ab") as file:
        file.write(b"\0")
    assert digest(as_custom(broken), cache) != before


def test_changed_labels_lists_and_classes_change_the_digest(broken: Path, as_custom: AsCustom) -> None:
    cache = broken.parent / "cache.json"
    seen = {digest(as_custom(broken), cache)}
    seen.add(digest(as_custom(broken, classes=("bee", "auk", "cod")), cache))
    labels = (broken / "labels.csv").read_text(encoding="utf-8").splitlines()
    labels[1] = "train_00000," + ("cod" if labels[1].endswith("auk") else "auk")
    (broken / "labels.csv").write_text("\n".join(labels), encoding="utf-8")
    seen.add(digest(as_custom(broken), cache))
    train = broken / "ImageSets/Segmentation/train.txt"
    train.write_text("\n".join(reversed(train.read_text(encoding="utf-8").split())), encoding="utf-8")
    seen.add(digest(as_custom(broken), cache))
    assert len(seen) == 4


def test_digests_of_settled_files_come_from_the_cache(broken: Path, as_custom: AsCustom) -> None:
    cache = broken.parent / "cache.json"
    config = as_custom(broken)
    for path in broken.rglob("*.*"):
        path.touch()
    first = digest(config, cache)
    assert not cache.exists()  # files written a moment ago are hashed again each time
    for path in broken.rglob("*.*"):
        os.utime(path, ns=(10**18, 10**18))
    assert digest(config, cache) == first
    entries = json.loads(cache.read_text(encoding="utf-8"))
    assert len(entries) == 18
    key = str(broken.resolve() / "JPEGImages/train_00001.jpg")
    entries[key][2] = "0" * 64
    cache.write_text(json.dumps(entries), encoding="utf-8")
    assert digest(config, cache) != first
    cache.write_text("damaged", encoding="utf-8")
    assert digest(config, cache) == first


def test_one_photo_under_two_names_in_train_and_val_is_said(broken: Path, as_custom: AsCustom) -> None:
    config, cache = as_custom(broken), broken.parent / "cache.json"
    warnings: list[str] = []
    expected = digest(config, cache)
    assert digest_data(list_data(config), config, cache, warn=warnings.append).whole() == expected
    assert warnings == []
    images = broken / "JPEGImages"
    for val, train in (("val_00000", "train_00004"), ("val_00002", "train_00001")):
        shutil.copy(images / f"{train}.jpg", images / f"{val}.jpg")
    digest_data(list_data(config), config, cache, warn=warnings.append)
    assert warnings == [
        "2 images of val are the same file as an image of train under another name: 'train_00004 = val_00000', "
        "'train_00001 = val_00002'; scores on trained images are worthless, remove one of each pair"
    ]


def test_a_file_that_disappears_is_named(broken: Path, as_custom: AsCustom) -> None:
    config = as_custom(broken)
    listing = list_data(config)
    (broken / "JPEGImages/train_00001.jpg").unlink()
    with pytest.raises(DataError, match=r"train_00001\.jpg: cannot be read"):
        digest_data(listing, config, broken.parent / "cache.json")


def test_files_that_changed_since_they_were_digested_are_named_whatever_the_cache_says(
    broken: Path, as_custom: AsCustom
) -> None:
    config, cache = as_custom(broken), broken.parent / "cache.json"
    for path in broken.rglob("*.*"):
        os.utime(path, ns=(10**18, 10**18))
    digests = digest_data(list_data(config), config, cache)
    assert find_changed_files(digests, None, cache) == []
    image, mask = broken / "JPEGImages/train_00001.jpg", broken / "SegmentationClass/val_00000.png"
    for path in (image, mask):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(10**18, 10**18))  # a rotten disk tells no time
    assert digest_data(list_data(config), config, cache) == digests, "by the cache nothing changed"
    train = DataView({"train": digests.listing.splits["train"]})
    assert find_changed_files(digests, train, cache) == [f"{image}: the content was changed"]
    scored = DataView({"val": ("val_00000",)}, masks=("val_00000",))
    assert find_changed_files(digests, scored, cache) == [f"{mask}: the content was changed"]
    image.unlink()
    assert find_changed_files(digests, None, cache) == [
        f"{image.resolve()}: cannot be read (No such file or directory)",
        f"{mask}: the content was changed",
    ]
    image.write_bytes(b"restored")
    found = digest_data(list_data(config), config, cache)
    changed = {name for name in digests.files if found.files[name] != digests.files[name]}
    assert changed == {"JPEGImages/train_00001.jpg", "SegmentationClass/val_00000.png"}, "the cache learnt of it"


def test_the_digest_of_a_synthetic_set_is_that_of_its_config(tmp_path: Path) -> None:
    def of(**changes: object) -> str:
        config = SyntheticConfig.model_validate(changes)
        return digest_data(list_data(config), config, tmp_path / "cache.json").whole()

    assert of() == of(on_bad_image="skip")
    assert len({of(), of(seed=1), of(body_contrast=23), of(context_bias=True)}) == 4
    assert not (tmp_path / "cache.json").exists()


def test_thousands_of_one_kind_do_not_hide_another() -> None:
    problems = Problems()
    for number in range(100):
        problems.add("many", f"missing {number}")
    problems.add("one", "overlap")
    lines = problems.lines(limit=3)
    assert lines[:3] == ["missing 0", "missing 1", "missing 2"]
    assert lines[3].startswith("… and 97 more")
    assert lines[4] == "overlap"
    assert len(problems.lines()) == 101


def test_a_share_by_hash_is_never_less_and_hardly_moves_with_new_images() -> None:
    ids = [f"image_{number}" for number in range(2000)]
    chosen = hash_share(ids, 0.05, "holdout")
    assert 100 <= len(chosen) <= 130
    assert set(chosen) >= {image_id for image_id in ids if hash_fraction(image_id, "holdout") < 0.05}
    assert hash_share(reversed(ids), 0.05, "holdout") == chosen[::-1], "a function of the ids, in any order"
    assert list(chosen) == sorted(chosen, key=ids.index)
    for count in range(1000, 1100):
        moved = set(hash_share(ids[:count], 0.05, "holdout")) ^ set(hash_share(ids[: count + 1], 0.05, "holdout"))
        assert len(moved) <= 2, "one more image pushes at most one out of the share"
    assert set(hash_share(ids, 0.05, "val")) != set(chosen)
    few = [image_id for image_id in ids if hash_fraction(image_id, "val") >= 0.1]  # none of which a coin would take
    assert [len(hash_share(few[:count], 0.1, "val")) for count in (40, 41, 70)] == [4, 5, 7], "0.1 · 70 > 7 in binary"
    assert hash_share(ids, 0.0, "val") == ()
    assert len(hash_share(("a", "b"), 1e-9, "val")) == 1
    assert len(hash_share(("a", "b", "c"), 1 - 1e-9, "val")) == 2
    assert hash_share(("a",), 1 - 1e-9, "val") == ()
    assert hash_share(("a", "a"), 0.5, "val") == ()


def test_a_share_shows_every_class_and_takes_none_away() -> None:
    # two common classes, one of two images, and one of a single image, which must stay
    labels = {f"i{n:02d}": ["even" if n % 2 == 0 else "odd"] for n in range(40)}
    labels["i07"] = labels["i21"] = ["pair"]
    labels["i30"] = ["lone"]
    chosen = hash_share(labels, 0.1, "val", labels)
    assert len(chosen) == 4
    assert {name for image_id in chosen for name in labels[image_id]} == {"even", "odd", "pair"}
    many = {f"i{n:02d}": [f"class {n // 2}"] for n in range(40)}
    halves = hash_share(many, 0.1, "val", many)
    assert len(halves) == len({many[image_id][0] for image_id in halves}) == 20, "more than a tenth, for the classes"
    assert hash_share(["i00", "i01"], 0.5, "val", {"i00": ["a"], "i01": ["b"]}) in {("i00",), ("i01",)}
    # a candidate may go where another image, itself no candidate, keeps its class
    assert hash_share(["m0", "m1"], 0.1, "val", {"m0": ["a"], "m1": ["b"], "n": ["a"]}) == ("m0",)


def test_halves_depend_on_the_id_alone() -> None:
    halves = [hash_half(f"image_{number}") for number in range(2000)]
    assert 900 < halves.count("train_select") < 1100
    assert hash_half("a") == "train_report"  # sha256("a") = ca978112…, first byte 0xca ≥ 128
    assert hash_half("b") == "train_select"  # sha256("b") = 3e23e816…


def test_the_format_chooses_the_adapter(tmp_path: Path) -> None:
    adapter = TypeAdapter(DataConfig)
    assert isinstance(adapter.validate_python({"format": "synthetic"}), SyntheticConfig)
    voc = adapter.validate_python({"format": "voc", "root": str(tmp_path)})
    assert isinstance(voc, VocConfig)
    assert (data_root(voc), data_root(SyntheticConfig())) == (tmp_path, None)
    with pytest.raises(ValidationError):
        adapter.validate_python({"format": "coco"})


ADAPTERS = get_args(get_args(DataConfig)[0])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_lists_all_problems_of_an_empty_folder_instead_of_raising(adapter: type, tmp_path: Path) -> None:
    needed = {name: tmp_path for name, field in adapter.model_fields.items() if field.is_required()}
    config = adapter(**needed)
    assert set(needed) <= {"root"}, "a folder is a complete config"
    scan = config.scan()
    assert isinstance(scan, Scan)
    assert bool(scan.problems) == (data_root(config) is not None), "what is generated has none"


def test_configs_and_listings_need_no_heavy_library() -> None:
    code = (
        "import sys, stages.data.config, stages.data.listing, stages.prepare_data, stages.data.check\n"
        "from stages.data.adapters.synthetic import SyntheticConfig\n"
        "stages.data.listing.list_data(SyntheticConfig())\n"
        "heavy = {'torch', 'torchvision', 'scipy', 'prefect', 'albumentations', 'cv2', 'matplotlib'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
