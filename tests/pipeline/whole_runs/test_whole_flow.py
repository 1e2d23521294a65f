"""The whole road on tiny generated images: build, cache, change, kill, resume, hide the masks.

The run that is killed is the command with its processes; the others are given here, and must not differ from it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.ops.metrics.confusion import read_confusions
from tests.pipeline.whole_runs.here import wsss_here

STAGES = ["prepare_data", "train_classifier", "make_attention", "make_masks", "train_segmenter", "evaluate"]

TINY = """
name: tiny
data: {data}
train_classifier:
  backbone: {{name: small}}
  method: {{name: cam}}
  augment: {{crop_px: 64, scale: [0.8, 1.2]}}
  training: {{steps: 3, batch_size: 4, learning_rate: 0.05}}
make_attention: {{scales: [1.0], shard_images: 5}}
make_masks: {{threshold: 0.3, crf: {{iterations: 2, backend: numba}}}}
train_segmenter:
  init: classifier
  net: {{name: largefov, backbone: {{name: small}}}}
  augment: {{crop_px: 64}}
  training: {{steps: {steps}, batch_size: 4, learning_rate: 0.01}}
evaluate: {{scales: [1.0]}}
runtime: {{device: cpu, workers: 0, processes: 1, threads: 1}}
"""

SYNTHETIC = "{format: synthetic, num_train: 12, num_val: 4, size_px: 64, num_classes: 3}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_config(tmp_path, SYNTHETIC)
    return tmp_path


def write_config(folder: Path, data: str, *, steps: int = 3) -> None:
    (folder / "tiny.yaml").write_text(TINY.format(data=data, steps=steps))


def states(document: dict) -> list[str]:
    return [stage["state"] for stage in document["stages"]]


def run(folder: Path, *arguments: str) -> dict:
    return wsss_here(folder, "run", "tiny.yaml", "--engine", "local", *arguments)


def test_build_then_cached_then_one_number_changed(folder: Path):
    first = run(folder)
    assert [stage["stage"] for stage in first["stages"]] == STAGES
    assert states(first) == ["built"] * 6
    metrics = first["metrics"]
    for name in ("classifier.map", "attention.miou", "attention.miou_oracle", "masks.miou", "segmenter.miou"):
        assert 0 <= metrics[name] <= 1, name
    assert set(metrics["segmenter.iou"]) >= {"background"}
    assert Path(folder / first["report"]).read_text().startswith("<!DOCTYPE html>")

    began = time.monotonic()
    second = run(folder)
    assert states(second) == ["cached"] * 6
    assert second["metrics"] == metrics
    assert time.monotonic() - began < 30  # no stage body ran; the promised 5 s are measured, not tested

    changed = run(folder, "--set", "make_masks.crf.iterations=1")
    assert states(changed) == ["cached"] * 3 + ["built"] * 3

    forced = run(folder, "--force", "train_segmenter")
    assert states(forced) == ["cached"] * 4 + ["built"] * 2
    assert forced["metrics"] == metrics, "the same seed on the same machine gives the same numbers"

    full = run(folder, "--set", "train_segmenter.supervision=full")
    assert states(full) == ["cached", "cached", "skipped", "skipped", "built", "built"]


@pytest.mark.slow
def test_a_kill_in_the_middle_of_the_segmenter_changes_nothing(folder: Path):
    write_config(folder, SYNTHETIC, steps=60)
    quiet = run(folder, "--artifacts", "quiet")["metrics"]
    process = start(folder)
    wait_for(lambda: list((folder / "artifacts/train_segmenter").glob(".work-*")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "artifacts/evaluate").exists() or not list((folder / "artifacts/evaluate").glob("[0-9a-f]*"))

    process = start(folder)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    resumed = json.loads(out)
    assert states(resumed)[:4] == ["cached"] * 4
    assert states(resumed)[4] in {"built", "resumed"}
    assert resumed["metrics"] == quiet


def start(folder: Path) -> subprocess.Popen[str]:
    """The command as a user gives it: each stage and its workers are processes."""
    words = ("run", "tiny.yaml", "--engine", "local", "--json", "--set", "runtime.processes=2")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.main", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process: subprocess.Popen, *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def write_made_set(folder: Path) -> None:
    """The generated set as anybody's own data, whose masks can be deleted."""
    options = ["--num-train", "12", "--num-val", "4", "--size-px", "64", "--num-classes", "3"]
    wsss_here(folder, "data", "synthetic", "made", *options)
    data = (
        "{format: custom, root: made, images: JPEGImages, masks: SegmentationClass, classes: [auk, bee, cod], "
        "train_list: made/ImageSets/Segmentation/train.txt, val_list: made/ImageSets/Segmentation/val.txt}"
    )
    write_config(folder, data)


def training_ids(folder: Path) -> list[str]:
    return (folder / "made/ImageSets/Segmentation/train.txt").read_text().split()


def test_the_weak_flow_never_needs_the_training_masks(folder: Path):
    write_made_set(folder)
    with_masks = run(folder, "--artifacts", "with")
    for name in training_ids(folder):
        (folder / f"made/SegmentationClass/{name}.png").unlink()
    without = run(folder, "--artifacts", "without")
    assert "masks.miou" in with_masks["metrics"]
    assert "masks.miou" not in without["metrics"]
    assert without["metrics"]["segmenter.miou"] == with_masks["metrics"]["segmenter.miou"]


def test_gain_ext_records_its_masks_scores_none_of_them_and_reads_no_other(folder: Path):
    write_made_set(folder)
    train = training_ids(folder)
    (folder / "subset.txt").write_text("\n".join(train[:3]))
    mining = "alpha: 0.1, judge: self, am_warmup_epochs: 0"
    method = (
        "--set",
        f"train_classifier.method={{name: gain_ext, pixel_list: subset.txt, pixel_repeat: 2, {mining}}}",
    )
    found = run(folder, *method)
    classifier, evaluated = (folder / found["stages"][number]["path"] for number in (1, 5))
    manifest = json.loads((classifier / "manifest.json").read_text())
    assert manifest["content"]["mask_supervision"] == train[:3]
    assert sorted(read_confusions(evaluated / "confusions.npz")["attention"].ids) == train[3:]

    for name in train[3:]:
        (folder / f"made/SegmentationClass/{name}.png").unlink()
    blind = run(folder, *method, "--artifacts", "blind")
    assert states(blind) == ["built"] * 6
    again = folder / blind["stages"][1]["path"]
    name = "classifier.safetensors"
    assert (again / name).read_bytes() == (classifier / name).read_bytes()
