"""``wsss masks``: what it tells a person to do next, and that the lines to paste mean what they say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.cli import main as cli
from pipeline.config.run_config import load_config
from stages.contracts import write_index_mask
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.synthetic_images import generate_synthetic
from tests.pipeline.whole_runs.here import wsss_here
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

pytest.importorskip("pycocotools")

Wsss = Callable[..., str]


@pytest.fixture
def wsss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Wsss:
    """A command in a folder with a data set, the run of which is indexed; gives what was said."""
    monkeypatch.chdir(tmp_path)
    generate_synthetic(SyntheticConfig(num_train=4, num_val=2, size_px=64, num_classes=2), tmp_path / "data")

    def call(*words: str) -> str:
        assert cli.main(list(words)) == 0
        return capsys.readouterr().out

    return call


def index(folder: Path, **data: object) -> None:
    """Write the config and build its first stage."""
    config = yaml.safe_load(tiny_yaml())
    config["data"] = {"format": "custom", "root": "data", "images": "JPEGImages", **data}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    wsss_here(folder, "run", "tiny.yaml", "--engine", "local", "--until", "prepare_data")


def draw(folder: Path, *names: str) -> None:
    for name in names:
        write_index_mask(folder / f"{name}.png", np.ones((64, 64), dtype=np.uint8))


def options(said: str) -> list[list[str]]:
    """The overrides of each printed line of options."""
    lines = re.findall(r"^  (--set .*)$", said, flags=re.MULTILINE)
    return [[word for word in shlex.split(line) if word != "--set"] for line in lines]


LISTS = {f"{split}_list": f"data/ImageSets/Segmentation/{split}.txt" for split in ("train", "val")}


def test_an_import_prints_what_makes_either_training_learn_it(wsss: Wsss, tmp_path: Path) -> None:
    index(tmp_path, **LISTS)
    draw(tmp_path / "edited", "train_00001", "train_00002")
    words = ("masks", "import", "edited", "--format", "voc", "--config", "tiny.yaml", "--out", "by hand")
    said = wsss(*words, "--ids", "by hand.txt")
    segmenter, classifier = options(said)
    assert load_config(tmp_path / "tiny.yaml", segmenter).train_segmenter.corrected_masks == Path("by hand")
    run = load_config(tmp_path / "tiny.yaml", classifier)
    assert run.data.scan().listing.splits["train_score"] == ("train_00001", "train_00002")
    assert run.train_classifier.method.pixel_labelled(run.data.scan().listing.split("train")) == (
        "train_00001",
        "train_00002",
    )
    assert "(copy" not in said
    assert "val is drawn" not in said
    said = wsss(*words, "--force")
    assert len(options(said)) == 1
    assert "with --ids FILE also gain_ext's classifier learns them" in said


def test_an_import_says_what_is_to_be_done_before(wsss: Wsss, tmp_path: Path) -> None:
    """The data set has masks in a folder of its own, and draws val from images with masks."""
    index(tmp_path, masks="SegmentationClass")
    listing = load_config(tmp_path / "tiny.yaml").data.scan().listing
    val = listing.splits["val"][0]
    draw(tmp_path / "edited", listing.splits["train"][0], val)
    said = wsss(
        "masks", "import", "edited", "--format", "voc", "--config", "tiny.yaml", "--out", "hands", "--ids", "hands.txt"
    )
    assert f"warning: {val}: no training image, which no training takes; move such masks out of hands" in said
    assert (
        "gain_ext's classifier learns them (copy them into data/SegmentationClass; give data.train_list and "
        "data.val_list, since without lists val is drawn from masked images) with" in said
    )
    assert options(said)[1] == ["train_classifier.method={name: gain_ext, pixel_list: hands.txt}"]


def test_without_a_config_there_is_the_line_for_the_segmenter(wsss: Wsss, tmp_path: Path) -> None:
    draw(tmp_path / "edited", "train_00001")
    named = ("--images", "data/JPEGImages", "--classes", "auk,bee")
    said = wsss("masks", "import", "edited", "--format", "voc", "--out", "12", *named)
    assert options(said) == [['train_segmenter.corrected_masks="12"']], "a path, though it looks like a number"


def test_an_export_to_label_studio_says_how_to_start_it(wsss: Wsss, tmp_path: Path) -> None:
    draw(tmp_path / "masks", "train_00001")
    named = ("--images", "data/JPEGImages", "--classes", "auk,bee")
    said = wsss("masks", "export", "masks", "--format", "labelstudio", "--out", "out", *named)
    assert f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={tmp_path}/data\n" in said
    assert f"the path {tmp_path}/data/JPEGImages; then import tasks.json" in said
    assert "?d=JPEGImages/train_00001.jpg" in (tmp_path / "out" / "tasks.json").read_text()
    assert "LABEL_STUDIO" not in wsss("masks", "export", "masks", "--format", "coco", "--out", "coco", *named)
