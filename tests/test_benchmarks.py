"""Benchmarks print the document that every benchmark prints; their times are not judged here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_step_cost_prints_its_document():
    command = [sys.executable, "benchmarks/step_cost.py", "--quick", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)

    assert document["benchmark"] == "step_cost"
    assert {"hardware", "commit", "milliseconds", "rounds"} <= document.keys()
    has_peer = importlib.util.find_spec("pytorch_grad_cam") is not None
    for ratio in document["ratios"]:
        assert ratio.keys() == {"name", "value", "kind", "target", "met"}
        if " / grad-cam" in ratio["name"] and not has_peer:
            assert (ratio["value"], ratio["met"]) == (None, None)
            continue
        better = ratio["value"] >= ratio["target"] if ratio["kind"] == "speedup" else ratio["value"] <= ratio["target"]
        assert ratio["met"] is better, ratio
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
    def run(*options):
        command = [
            sys.executable,
            "benchmarks/attention_methods.py",
            "--quick",
            "--json",
            "--seeds",
            "0",
            "--out",
            tmp_path,
        ]
        answer = subprocess.run([*map(str, command), *options], capture_output=True, text=True, cwd=ROOT, check=True)
        return json.loads(answer.stdout[answer.stdout.index("{") :])

    run("--only", "CAM,GAIN_ext")
    cells = run("--show")["cells"]
    for name in ("CAM", "GAIN_ext, 30 masks"):
        assert 0 <= cells[name]["miou"][0] <= cells[name]["oracle"][0] <= 1
        assert cells[name]["seconds"][0] > 0
    assert cells["ADL"]["miou"] == [], "not computed"
    folder = tmp_path / "attention_methods" / "synthetic_quick"
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    run("--only", "CAM,GAIN_ext")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == written, "no cell is computed twice"
    subset = set((folder / "pixel-30.txt").read_text().split())
    scored = set(json.loads((folder / "score" / "index.json").read_text())["splits"]["train"])
    assert len(subset) == 30
    assert not subset & scored, "no image whose mask was trained on is scored"


@pytest.mark.slow
def test_evaluate_prints_its_document():
    command = [sys.executable, "benchmarks/evaluate.py", "--quick", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    document = json.loads(answer.stdout)
    assert document["benchmark"] == "evaluate"
    assert {"hardware", "commit", "images", "rounds", "milliseconds_per_image", "bytes_per_image"} <= document.keys()
    names = [ratio["name"] for ratio in document["ratios"]]
    assert names == ["update: torchmetrics / ours", "update: torchmetrics, unchecked / ours"]
    for ratio in document["ratios"]:
        assert ratio.keys() == {"name", "value", "kind", "target", "met"}
        assert ratio["met"] is (ratio["value"] >= ratio["target"])


def run_quick(name, *options):
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--json", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["benchmark"] == name
    assert {"hardware", "commit", "load_average"} <= document.keys()
    for ratio in document["ratios"]:
        assert ratio.keys() == {"name", "value", "kind", "target", "met"}
        if ratio["value"] is None:
            assert ratio["met"] is None
            continue
        better = ratio["value"] >= ratio["target"] if ratio["kind"] == "speedup" else ratio["value"] <= ratio["target"]
        assert ratio["met"] is better, ratio
    return document


@pytest.mark.slow
def test_attention_throughput_agrees_with_its_peer_and_keeps_to_the_limits_on_disk():
    document = run_quick("attention_throughput", "--networks", "squeezenet1_1", "--device", "cpu")
    found = document["networks"]["squeezenet1_1"]
    assert found["images_per_s"].keys() == {"peer", "peer, one input a pass", "ours"}
    assert found["correlation"] > 0.8
    assert len(document["ratios"]) == 2 + 2
    # what does not depend on the machine
    assert [ratio["met"] for ratio in document["ratios"] if ratio["kind"] == "cost"] == [True, True]


@pytest.mark.slow
def test_masks_scale_measures_both_paths_and_disk_stays_below_its_projection():
    document = run_quick("masks_scale", "--processes", "1")
    assert [(row["path"], row["images"]) for row in document["rows"]] == [
        (path, count) for path in ("two stages", "fused") for count in (40, 80, 160)
    ]
    disk = [ratio for ratio in document["ratios"] if "bytes" in ratio["name"] or "projected" in ratio["name"]]
    assert [ratio["met"] for ratio in disk] == [True] * 4
    stored, fused = (row["bytes_per_image"] for row in document["rows"] if row["images"] == 160)
    assert fused < stored, "no map is on the disk"
    assert all(row["peak_mb"] > 50 for row in document["rows"])
