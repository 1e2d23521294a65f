"""Benchmarks print the document that every benchmark prints; their times are not judged here."""

import importlib.util
import itertools
import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pipeline.config.run_config import load_config

ROOT = Path(__file__).parents[1]


def run(name, *options):
    """A benchmark that ends well; what it printed."""
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--json", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def run_quick(name, *options):
    """The document, after a look at what every benchmark's has."""
    document = json.loads(run(name, *options).stdout)
    check_document(document, name)
    return document


def check_document(document, name):
    assert document["benchmark"] == name
    assert {"hardware", "commit"} <= document.keys()
    for ratio in document["ratios"]:
        assert ratio.keys() == {"name", "value", "kind", "target", "met"}
        if ratio["value"] is None:
            assert ratio["met"] is None
            continue
        better = ratio["value"] >= ratio["target"] if ratio["kind"] == "speedup" else ratio["value"] <= ratio["target"]
        assert ratio["met"] is better, ratio


@pytest.mark.slow
def test_step_cost_prints_its_document():
    done = run("step_cost")
    document = json.loads(done.stdout)
    check_document(document, "step_cost")
    assert {"milliseconds", "rounds"} <= document.keys()
    has_peer = importlib.util.find_spec("pytorch_grad_cam") is not None
    without = {ratio["name"] for ratio in document["ratios"] if ratio["value"] is None}
    peers = {ratio["name"] for ratio in document["ratios"] if " / grad-cam" in ratio["name"]}
    assert without == (set() if has_peer else peers)
    names = [ratio["name"] for ratio in document["ratios"]]
    assert len(set(names)) == len(names) == 9 + 3 + 8

    # what does not depend on the machine
    operations = [ratio for ratio in document["ratios"] if "operations" in ratio["name"]]
    assert [1 < ratio["value"] <= 1.02 for ratio in operations] == [True, True]
    assert document["adl_parameters_added"] == {"vgg16": 0, "resnet50": 0}
    assert len(document["largest_difference_to_grad_cam"]) == (2 if has_peer else 0)
    assert all(difference < 1e-3 for difference in document["largest_difference_to_grad_cam"].values())
    assert ("not installed" in done.stderr) is not has_peer


@pytest.mark.slow
def test_attention_methods_fills_its_table_once_and_shows_what_is_missing(tmp_path):
    fill = partial(run, "attention_methods", "--seeds", 0, "--out", tmp_path)
    fill("--only", "CAM,GAIN_ext")
    shown = fill("--show").stdout
    cells = json.loads(shown[shown.index("{") :])["cells"]
    for name in ("CAM", "GAIN_ext, 30 masks"):
        assert 0 <= cells[name]["miou"][0] <= cells[name]["oracle"][0] <= 1
        assert cells[name]["seconds"][0] > 0
    assert cells["ADL"]["miou"] == [], "not computed"
    folder = tmp_path / "attention_methods" / "synthetic_quick"
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    fill("--only", "CAM,GAIN_ext")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == written, "no cell is computed twice"
    subset = set((folder / "pixel-30.txt").read_text().split())
    scored = set(json.loads((folder / "score" / "index.json").read_text())["splits"]["train"])
    assert len(subset) == 30
    assert not subset & scored, "no image whose mask was trained on is scored"


@pytest.mark.slow
def test_evaluate_prints_its_document():
    document = run_quick("evaluate")
    assert {"images", "rounds", "milliseconds_per_image", "bytes_per_image", "cpu_has_bf16"} <= document.keys()
    assert document["prediction"].keys() == {"fp32", "bf16"}
    names = [ratio["name"] for ratio in document["ratios"]]
    assert names == ["update: torchmetrics / ours", "update: torchmetrics, unchecked / ours"]
    assert [ratio["kind"] for ratio in document["ratios"]] == ["speedup"] * 2


@pytest.mark.slow
def test_both_loops_of_train_step_have_the_same_losses():
    document = run_quick("train_step")
    assert {"milliseconds", "rounds"} <= document.keys()
    assert [(ratio["kind"], ratio["target"]) for ratio in document["ratios"]] == [("cost", 1.05)] * 2
    assert all(0 <= difference < 5e-3 for difference in document["largest_difference_of_losses"].values())


@pytest.mark.slow
def test_attention_throughput_agrees_with_its_peer_and_keeps_to_the_limits_on_disk():
    document = run_quick("attention_throughput", "--networks", "squeezenet1_1", "--device", "cpu")
    assert "load_average" in document
    found = document["networks"]["squeezenet1_1"]
    assert found["images_per_s"].keys() == {"peer", "peer, one input a pass", "ours", "ours, bf16"}
    assert found["correlation"] > 0.8
    assert len(document["ratios"]) == 2 + 2 + bool(document["cpu_has_bf16"])
    # what does not depend on the machine
    assert [ratio["met"] for ratio in document["ratios"] if ratio["kind"] == "cost"] == [True, True]


@pytest.mark.slow
def test_masks_scale_measures_both_paths_and_disk_grows_linearly():
    document = run_quick("masks_scale", "--processes", 1)
    assert "load_average" in document
    assert [(row["path"], row["images"]) for row in document["rows"]] == [
        (path, count) for path in ("two stages", "fused") for count in (40, 80, 160)
    ]
    disk = [ratio for ratio in document["ratios"] if "bytes" in ratio["name"]]
    assert [ratio["met"] for ratio in disk] == [True] * 2
    stored, fused = (row["bytes_per_image"] for row in document["rows"] if row["images"] == 160)
    assert fused < stored, "no map is on the disk"
    assert all(row["peak_mb"] > 50 for row in document["rows"])


def test_every_row_of_the_ladder_is_a_config_that_loads_and_differs_from_the_others():
    command = [sys.executable, "benchmarks/ablation.py", "--data", "VOC2012", "--labels", "labels.csv", "--commands"]
    printed = subprocess.run([*command, "--seeds", "0"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = set()
    for line in printed.splitlines():
        _, verb, config, *options = shlex.split(line)
        assert verb == "run"
        sets = [value for flag, value in itertools.pairwise(options) if flag == "--set"]
        loaded.add(load_config(ROOT / config, overrides=sets).model_dump_json())
    assert len(loaded) == len(printed.splitlines()) == 12


@pytest.mark.slow
def test_digests_are_measured_on_files_of_three_sizes():
    document = run_quick("digests")
    assert document["mb_per_s"].keys() == {"weights", "photographs", "masks"}
    assert all(rate > 0 for row in document["mb_per_s"].values() for rate in row.values())
    assert [ratio["kind"] for ratio in document["ratios"]] == ["speedup"] * 3
