"""Labels to masks, masks to a person, corrected masks back into the run: what changes then, and what does not."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from stages.contracts import read_index_mask, write_index_mask
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.synthetic_images import generate_synthetic
from tests.pipeline.whole_runs.here import wsss_here
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

pytest.importorskip("pycocotools")

NUM_EDITED = 3
ALL = ["prepare_data", "train_classifier", "make_attention", "make_masks", "train_segmenter", "evaluate"]


def _data_set(folder: Path) -> None:
    """A set without any mask, as somebody's own, and the config of a run; the true masks are the person's eyes."""
    generate_synthetic(SyntheticConfig(num_train=10, num_val=2, size_px=64, num_classes=2), folder / "data")
    (folder / "data" / "SegmentationClass").rename(folder / "truth")
    training = {"steps": 150, "batch_size": 4, "learning_rate": 0.05}
    config = yaml.safe_load(tiny_yaml(train_segmenter={"augment": {"scale": [1.0, 1.0]}, "training": training}))
    lists = {f"{split}_list": f"data/ImageSets/Segmentation/{split}.txt" for split in ("train", "val")}
    config["data"] = {"format": "custom", "root": "data", "images": "JPEGImages", **lists}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _edit_coco(file: Path, truth: dict[str, NDArray[np.uint8]]) -> None:
    """What a person does who draws every object anew, as run lengths without compression."""
    content = json.loads(file.read_text())
    content["annotations"] = [
        {
            "id": 10 * image["id"] + value,
            "image_id": image["id"],
            "category_id": value,
            "iscrowd": 1,
            "segmentation": {"size": [64, 64], "counts": _counts(truth[Path(image["file_name"]).stem] == value)},
        }
        for image in content["images"]
        for value in (1, 2)
    ]
    file.write_text(json.dumps(content))


def _counts(pixels: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs down the columns, beginning with pixels that are not set."""
    flat = np.concatenate([[False], pixels.T.ravel()])
    ends = [*np.flatnonzero(np.diff(flat)).tolist(), pixels.size]
    return np.diff([0, *ends]).tolist()


def _edit_voc(folder: Path, truth: dict[str, NDArray[np.uint8]]) -> None:
    for image_id, mask in truth.items():
        write_index_mask(folder / "SegmentationClass" / f"{image_id}.png", mask)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["coco", "voc"])
def test_corrections_move_the_predictions_of_their_images_and_train_the_segmenter_alone(
    tmp_path: Path, format: str
) -> None:
    _data_set(tmp_path)

    def wsss(*words: str) -> dict[str, Any]:
        return wsss_here(tmp_path, *words)

    def run(*overrides: str) -> dict[str, str]:
        found = wsss("run", "tiny.yaml", "--engine", "local", *overrides)
        return {stage["stage"]: stage["state"] for stage in found["stages"]}

    def predict(out: str, *overrides: str) -> float:
        """Share of the edited images' pixels that are predicted as the person drew them."""
        wsss("predict", "tiny.yaml", "data/JPEGImages", "--out", out, *overrides)
        return float(np.mean([read_index_mask(tmp_path / out / f"{i}.png") == truth[i] for i in truth]))

    assert run() == dict.fromkeys(ALL, "built")
    wsss("masks", "suggest", "tiny.yaml", str(NUM_EDITED), "--out", "worst.txt")
    chosen = (tmp_path / "worst.txt").read_text().split()
    assert len(chosen) == NUM_EDITED
    truth = {image_id: read_index_mask(tmp_path / "truth" / f"{image_id}.png") for image_id in chosen}
    before = predict("before")

    wsss("masks", "export", "tiny.yaml", "--format", format, "--ids", "worst.txt", "--out", "sent")
    if format == "coco":
        _edit_coco(tmp_path / "sent" / "annotations.json", truth)
    else:
        _edit_voc(tmp_path / "sent", truth)
    words = ("masks", "import", "sent", "--format", format, "--config", "tiny.yaml", "--out", "by hand")
    use = wsss(*words, "--ids", "by hand.txt")["use"]
    for image_id, mask in truth.items():
        np.testing.assert_array_equal(read_index_mask(tmp_path / "by hand" / f"{image_id}.png"), mask)

    learn = [word for override in use["segmenter"] for word in ("--set", override)]
    assert shlex.join(learn) == "--set 'train_segmenter.corrected_masks=\"by hand\"'"
    often = [*learn, "--set", "train_segmenter.corrected_repeat=10"]
    late = {"train_segmenter": "built", "evaluate": "built"}
    assert run(*often) == dict.fromkeys(ALL, "cached") | late
    after = predict("after", *often)
    assert after > before + 0.05, (before, after)
    assert run(*often) == dict.fromkeys(ALL, "cached")
    left = wsss("masks", "suggest", "tiny.yaml", "9", *often)["images"]
    assert not {found["id"] for found in left} & set(chosen), "a person has seen them"

    # gain_ext learns the same masks from the lines that the import printed
    ext = [word for override in use["gain_ext"] for word in ("--set", override)]
    first = dict.fromkeys(("prepare_data", "train_classifier"), "built")
    assert {
        name: state for name, state in run(*ext, "--until", "train_classifier").items() if state == "built"
    } == first

    # a slip of the pen mended: the same two stages, and no other
    slip = truth[chosen[0]].copy()
    slip[:8] = 255
    write_index_mask(tmp_path / "by hand" / f"{chosen[0]}.png", slip)
    assert run(*often) == dict.fromkeys(ALL, "cached") | late
