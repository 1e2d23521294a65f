"""Data that a training does not read may change: nothing is trained again, and it would be the same training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from stages.contracts import read_index_mask, write_index_mask
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.synthetic_images import generate_synthetic
from tests.pipeline.whole_runs.here import wsss_here
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

MIDDLE = ("train_classifier", "make_attention", "make_masks", "train_segmenter")
"""Everything between prepare_data and evaluate."""


def _bytes(store: Path) -> dict[str, bytes]:
    """What these stages wrote, without the manifests, by path below the folder of the key."""
    return {
        "/".join((stage, *path.relative_to(store / stage).parts[1:])): path.read_bytes()
        for stage in MIDDLE
        for path in (store / stage).rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def _own_data(folder: Path, **changes: object) -> Path:
    """A small set on disk, as anybody's own, and the config of a run on it; the set's folder."""
    data = folder / "data"
    generate_synthetic(SyntheticConfig(num_train=6, num_val=2, size_px=64, num_classes=2), data)
    config = yaml.safe_load(tiny_yaml(**changes))
    config["data"] = {"format": "custom", "root": str(data), "images": "JPEGImages", "masks": "SegmentationClass"}
    lists = data / "ImageSets/Segmentation"
    config["data"] |= {f"{split}_list": str(lists / f"{split}.txt") for split in ("train", "val")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return data


def test_an_image_that_changed_since_it_was_indexed_is_named_and_indexed_anew(tmp_path: Path) -> None:
    """Of the same size and time, as a rotten disk leaves it: nothing but its bytes tells."""
    image = _own_data(tmp_path) / "JPEGImages" / "train_00002.jpg"
    os.utime(image, ns=(10**18, 10**18))

    def run(until: str, code: int = 0) -> dict:
        return wsss_here(tmp_path, "run", "tiny.yaml", "--engine", "local", "--until", until, code=code)

    (indexed,) = run("prepare_data")["stages"]
    data = bytearray(image.read_bytes())
    data[-3] ^= 1
    image.write_bytes(data)
    os.utime(image, ns=(10**18, 10**18))
    refused = run("train_classifier", code=2)
    assert [stage["state"] for stage in refused["stages"]] == ["cached", "failed"]
    assert "is not what prepare_data indexed (1 changed); put it back, or run" in refused["error"]["message"]
    assert refused["error"]["problems"] == [f"{image}: the content was changed"]
    again = run("train_classifier")["stages"]
    assert [stage["state"] for stage in again] == ["built", "built"]
    assert again[0]["key"] != indexed["key"]


@pytest.mark.slow
@pytest.mark.parametrize("keep_maps", [True, False])
def test_masks_that_only_scores_read_train_nothing(tmp_path: Path, keep_maps: bool) -> None:
    refined = {"refine": ["par", "crf"], "crf": {"backend": "numba", "iterations": 2}}
    masks = _own_data(tmp_path, make_attention={"keep_maps": keep_maps}, make_masks=refined) / "SegmentationClass"
    late = masks / "train_00003.png"
    drawn = late.read_bytes()
    late.unlink()

    def run(store: str) -> list[str]:
        found = wsss_here(tmp_path, "run", "tiny.yaml", "--engine", "local", "--artifacts", store)
        return [stage["state"] for stage in found["stages"]]

    assert run("store") == ["built"] * 6
    corrected = read_index_mask(masks / "val_00000.png")
    write_index_mask(masks / "val_00000.png", np.roll(corrected, 3, axis=1))
    late.write_bytes(drawn)  # a mask of training, added for the scores
    assert run("store") == ["built", *["cached"] * 4, "built"]
    assert run("store") == ["cached"] * 6
    assert run("fresh") == ["built"] * 6
    assert _bytes(tmp_path / "fresh") == _bytes(tmp_path / "store")
