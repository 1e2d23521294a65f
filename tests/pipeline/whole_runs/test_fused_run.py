"""``make_attention.keep_maps: false`` in a run: keys, inputs, refusals, parts; a whole run beside one with maps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.run import Run
from pipeline.store.artifacts import Store
from stages.errors import ConfigError
from tests.pipeline.whole_runs.here import wsss_here
from tests.pipeline.whole_runs.test_whole_flow import SYNTHETIC, run, write_config

FUSED = "make_attention.keep_maps=false"


def load(*overrides: str) -> RunConfig:
    return load_model(RunConfig, find_config("demo"), ["data.num_train=4", *overrides])


def plan(folder: Path, *overrides: str) -> Plan:
    return plan_run(load(*overrides), folder / "digests.json")


def test_without_maps_the_masks_rest_on_the_classifier(tmp_path: Path) -> None:
    kept, fused = plan(tmp_path), plan(tmp_path, FUSED)
    assert set(kept.inputs("make_masks")) == {"prepare_data", "make_attention"}
    changed = {stage for stage in kept.keys if kept.keys[stage] != fused.keys[stage]}
    assert changed == {"make_attention", "make_masks", "train_segmenter", "evaluate"}
    assert fused.contents["make_attention"]["config"]["keep_maps"] is False
    assert set(fused.inputs("make_masks")) == {"prepare_data", "train_classifier", "make_attention"}
    other = plan(tmp_path, FUSED, "make_attention.scales=[1.0]")
    assert other.keys["make_masks"] != fused.keys["make_masks"]


@pytest.mark.parametrize(("override", "count"), [("seed=0", 8), (FUSED, 1)])
def test_parts_of_nothing_are_not_made(override: str, count: int) -> None:
    run = load("runtime.parts=8", override)
    parts = {stage: Run(run, Store(Path("unused"))).count_parts(stage) for stage in ("make_attention", "make_masks")}
    assert parts == {"make_attention": count, "make_masks": 8}


def test_a_sweep_without_maps_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, FUSED, "make_masks.sweep={num_images: 2}")
    assert caught.value.problems[0].startswith("make_masks.sweep compares thresholds on stored maps")
    assert len(caught.value.problems) == 1


# ---------------------------------------------------------------------------------------------------------------------
# A whole run
# ---------------------------------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.main", *arguments, "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> dict:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error + out
    return json.loads(out)


def masks_of(folder: Path, document: dict) -> tuple[dict[str, str], dict[str, str]]:
    """Checksum by file of the masks, and of everything, as the manifest has them."""
    (path,) = [stage["path"] for stage in document["stages"] if stage["stage"] == "make_masks"]
    files = json.loads((folder / path / "manifest.json").read_text())["content"]["files"]
    sums = {name: entry["sha256"] for name, entry in files.items()}
    return {name: value for name, value in sums.items() if not name.startswith("stats/")}, sums


@pytest.mark.slow
def test_a_run_without_maps_is_the_run_with_them_but_for_the_score_of_attention(tmp_path: Path) -> None:
    write_config(tmp_path, SYNTHETIC)
    kept = run(tmp_path)
    fused = run(tmp_path, "--set", FUSED)
    assert [stage["state"] for stage in fused["stages"]] == ["cached"] * 2 + ["built"] * 4
    attention = {name for name in kept["metrics"] if name.startswith("attention.")}
    assert attention >= {"attention.miou", "attention.miou_oracle", "attention.bytes_per_image"}
    assert fused["metrics"] == {name: value for name, value in kept["metrics"].items() if name not in attention}
    assert masks_of(tmp_path, fused)[0] == masks_of(tmp_path, kept)[0]
    report = (tmp_path / fused["report"]).read_text()
    assert "pseudo-mask" in report
    assert "mIoU of the attention maps by threshold" not in report

    shared = ("stage", "make_masks", "tiny.yaml", "--set", FUSED, "--set", "runtime.parts=3", "--artifacts", "shared")
    wsss_here(tmp_path, "run", *shared[2:], "--engine", "local", "--until", "make_attention")
    both = [finish(process) for process in [start(tmp_path, *shared), start(tmp_path, *shared)]]
    assert [masks_of(tmp_path, document)[1] for document in both] == [masks_of(tmp_path, fused)[1]] * 2
