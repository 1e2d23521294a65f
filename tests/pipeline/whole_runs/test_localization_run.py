"""Localisation as a part of a run: which stages it needs, what is refused before, and the whole road on a tiny CUB."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from pipeline.config.advice import config_warnings
from pipeline.config.preflight import preflight
from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.plan import plan_run
from pipeline.engine.stage_table import TABLE
from pipeline.report.tables import METRICS, metric_rows
from stages.contracts import SilentProgress
from stages.data.check import check_data
from stages.errors import ConfigError, InputError
from tests.pipeline.whole_runs.here import wsss_here
from tests.stages.data.wsol_sets import write_cub, write_imagenet

ONLY = ("evaluate.segmentation=false", "evaluate.localization={}")


def config(*overrides: str) -> RunConfig:
    return load_model(RunConfig, find_config("demo"), ["data.num_train=4", "data.num_val=2", *overrides])


def own_data(data: str, *overrides: str) -> RunConfig:
    return load_model(RunConfig, find_config("demo"), [f"data={data}", *overrides])


def test_localization_alone_needs_neither_masks_nor_a_segmenter() -> None:
    assert TABLE.needed(config(*ONLY)) == ("prepare_data", "train_classifier", "evaluate")
    assert TABLE.needed(config("evaluate.localization={}")) == TABLE.names
    full = config("train_segmenter.supervision=full", "train_segmenter.init=random")
    assert "train_classifier" not in TABLE.needed(full)
    both = config("train_segmenter.supervision=full", "train_segmenter.init=random", "evaluate.localization={}")
    assert TABLE.needed(both) == ("prepare_data", "train_classifier", "train_segmenter", "evaluate")


def test_the_key_of_evaluate_has_what_localization_depends_on(tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        return plan_run(config(*overrides), tmp_path / "digests.json").keys["evaluate"]

    keys = {key(), key("evaluate.localization={}"), key("evaluate.localization={threshold: 0.3}"), key(*ONLY)}
    keys.add(key(*ONLY, "train_classifier.training.learning_rate=0.01"))
    assert len(keys) == 5
    unused = "train_segmenter.training.learning_rate=0.01"
    assert key(*ONLY, unused) == key(*ONLY), "the segmenter is not trained"


@pytest.mark.parametrize("write", [write_cub, write_imagenet])
def test_formats_of_one_label_an_image_train_with_a_softmax_and_the_key_says_so(write, tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    data = f"{{format: {write.__name__.removeprefix('write_')}, root: {root}}}"

    def trained(*overrides: str) -> dict:
        found = plan_run(own_data(data, *ONLY, *overrides), tmp_path / "digests.json")
        return dict(found.contents["train_classifier"])["config"]

    assert trained()["loss"] == "cross_entropy"
    assert trained("train_classifier.loss=cross_entropy") == trained()
    assert "loss" not in trained("train_classifier.loss=multilabel_soft_margin")


def test_nothing_to_measure_is_a_fault_of_the_config() -> None:
    with pytest.raises(ConfigError) as caught:
        config("evaluate.segmentation=false")
    assert "leaves nothing to measure" in "\n".join(caught.value.problems)


def test_val_without_boxes_and_masks_is_refused_before_training(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "imagenet")
    data = f"{{format: imagenet, root: {root}}}"
    assert preflight(own_data(data, *ONLY)).warnings == ()
    (root / "localization.txt").unlink()
    with pytest.raises(ConfigError) as caught:
        preflight(own_data(data, *ONLY))
    assert caught.value.problems == (
        "evaluate.localization: no image of val has a box and a label, or a mask; add boxes or masks to the data set, "
        "or set evaluate.localization=null",
    )
    preflight(config("evaluate.localization={}"))


def test_more_classes_than_a_mask_can_tell_apart_need_localization_alone(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "imagenet")
    for number in range(253):
        (root / "train" / f"z{number:03d}").mkdir()
        os.link(root / "train/n01/n01_0.JPEG", root / "train" / f"z{number:03d}" / f"z{number:03d}.JPEG")
    data = f"{{format: imagenet, root: {root}}}"
    preflight(own_data(data, *ONLY))
    with pytest.raises(ConfigError) as caught:
        preflight(own_data(data))
    assert caught.value.problems == (
        "evaluate.segmentation: masks can tell apart 254 classes, the data set has 255; set "
        "evaluate.segmentation=false and evaluate.localization={}",
    )


def test_what_is_not_run_is_not_checked() -> None:
    wrong = ("train_segmenter.net.backbone={name: vgg16}", "weights.vgg16=/none.pth")
    with pytest.raises(InputError):
        preflight(config(*wrong, "train_segmenter.init=classifier"))
    preflight(config(*wrong, "train_segmenter.init=classifier", *ONLY))
    preflight(config(*wrong, "train_segmenter.init=imagenet", *ONLY))


def test_another_size_than_in_training_is_remarked_on() -> None:
    run = config(*ONLY, "train_classifier.augment.short_side_px=128", "train_segmenter.augment.short_side_px=64")
    assert [text.split(":")[0] for text in config_warnings(run)] == [
        "train_classifier.augment.short_side_px is 128 and evaluate.localization.short_side_px is null (the file's "
        "size)"
    ]


def test_every_metric_has_a_row_of_its_own() -> None:
    names = ("top1_loc", "gt_known_loc", "top1_clas", "max_box_acc", "max_box_acc_threshold", "max_box_acc_v2", "pxap")
    rows = metric_rows({f"localization.{name}": 0.25 for name in names})
    assert [row.name for row in rows] == [f"localization.{name}" for name in names]
    assert {row.group for row in rows} == {"Localisation"}
    assert all(METRICS[row.name].meaning for row in rows)
    assert [row.text for row in rows if row.bar is None] == ["0.25"]


TINY = """
name: tiny-cub
data: {format: cub, root: cub}
train_classifier:
  backbone: {name: small}
  method: {name: cam}
  augment: {crop_px: 48, scale: [0.9, 1.1]}
  training: {steps: 40, batch_size: 8, learning_rate: 0.1}
make_masks: {}
train_segmenter:
  init: random
  net: {name: largefov, backbone: {name: small}}
  augment: {crop_px: 48}
  training: {steps: 2, batch_size: 4, learning_rate: 0.01}
evaluate: {segmentation: false, localization: {}}
runtime: {device: cpu, workers: 0, processes: 1, threads: 1}
"""


def test_from_birds_to_boxes(tmp_path: Path) -> None:
    write_cub(tmp_path / "cub", num_train=16, num_test=8)
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert wsss_here(tmp_path, "data", "check", "tiny.yaml")["problems"] == []
    first = wsss_here(tmp_path, "run", "tiny.yaml", "--engine", "local")
    states = {stage["stage"]: stage["state"] for stage in first["stages"]}
    assert states == {
        **dict.fromkeys(TABLE.names, "skipped"),
        **dict.fromkeys(("prepare_data", "train_classifier", "evaluate"), "built"),
    }
    metrics = first["metrics"]
    assert metrics["localization.top1_clas"] == 1.0, "red and blue are told apart"
    assert metrics["localization.max_box_acc"] >= 0.75
    assert metrics["localization.max_box_acc"] >= metrics["localization.gt_known_loc"]
    assert metrics["localization.top1_loc"] <= metrics["localization.gt_known_loc"]
    assert metrics["localization.pxap"] > 0.5
    assert "MaxBoxAccV2" in (tmp_path / first["report"]).read_text()
    again = wsss_here(tmp_path, "run", "tiny.yaml", "--engine", "local")
    assert {stage["state"] for stage in again["stages"]} == {"cached", "skipped"}
    assert again["metrics"] == metrics


def test_data_check_names_what_is_wrong_in_either_layout(tmp_path: Path) -> None:
    cub, imagenet = write_cub(tmp_path / "cub"), write_imagenet(tmp_path / "imagenet")
    (cub / "classes.txt").unlink()
    (imagenet / "val_labels.txt").unlink()
    for root, data in ((cub, "cub"), (imagenet, "imagenet")):
        run = own_data(f"{{format: {data}, root: {root}}}")
        assert check_data(run.data, SilentProgress(), processes=1).problems


def test_the_example_of_the_page_is_a_config(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "localization.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "birds.yaml"
    path.write_text(blocks[-1], encoding="utf-8")
    run = load_model(RunConfig, path, [f"data.root={write_cub(tmp_path / 'cub')}"])
    assert TABLE.needed(run) == ("prepare_data", "train_classifier", "evaluate")
    assert preflight(run).warnings == ()
    for block, data_set in zip(blocks[:-1], (write_cub, write_imagenet), strict=True):
        (tmp_path / "data.yaml").write_text(block + blocks[-1].replace("data: {format: cub, root: CUB_200_2011}\n", ""))
        root = data_set(tmp_path / data_set.__name__)
        preflight(load_model(RunConfig, tmp_path / "data.yaml", [f"data.root={root}"]))
