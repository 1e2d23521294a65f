"""Data that a training does not read may change: nothing is trained again, and it would be the same training."""

from __future__ import annotations

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


@pytest.mark.slow
@pytest.mark.parametrize("keep_maps", [True, False])
def test_masks_that_only_scores_read_train_nothing(tmp_path: Path, keep_maps: bool) -> None:
    data = tmp_path / "data"
    generate_synthetic(SyntheticConfig(num_train=6, num_val=2, size_px=64, num_classes=2), data)
    masks, lists = data / "SegmentationClass", data / "ImageSets/Segmentation"
    late = masks / "train_00003.png"
    drawn = late.read_bytes()
    late.unlink()
    config = yaml.safe_load(
        tiny_yaml(
            make_attention={"keep_maps": keep_maps},
            make_masks={"refine": ["par", "crf"], "crf": {"backend": "numba", "iterations": 2}},
        )
    )
    config["data"] = {"format": "custom", "root": str(data), "images": "JPEGImages", "masks": masks.name}
    config["data"] |= {f"{split}_list": str(lists / f"{split}.txt") for split in ("train", "val")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

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
