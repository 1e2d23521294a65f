"""kill -9 while pseudo-masks appear: the command, the stage, one worker; the end is that of a run nobody killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.contracts import read_index_mask
from tests.pipeline.whole_runs.here import wsss_here
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="/proc")]

NUM_IMAGES = 48

CONFIG = tiny_yaml(
    data={"num_train": NUM_IMAGES, "size_px": 96, "num_classes": 3},
    prepare_data={"holdout_ratio": 0},
    make_attention={"shard_images": 7},
    make_masks={"refine": "crf", "crf": {"iterations": 150, "backend": "pydensecrf"}},
    runtime={"workers": 1, "processes": 2},
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and the artifacts up to the classifier."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tiny.yaml").write_text(CONFIG)
    wsss_here(folder, "run", "tiny.yaml", "--engine", "local", "--until", "train_classifier")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Whom to kill
# ---------------------------------------------------------------------------------------------------------------------


def processes() -> Iterator[tuple[int, int, str]]:
    """Process, parent and command line of everything that lives."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            yield int(path.name), parent, (path / "cmdline").read_text()
        except OSError:
            continue


def descendants(pid: int) -> dict[int, tuple[int, str]]:
    """Parent and command line of all that ``pid`` started, by process."""
    living = {process: (parent, line) for process, parent, line in processes()}
    found: dict[int, tuple[int, str]] = {}
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        for process, entry in living.items():
            if entry[0] == parent:
                found[process] = entry
                waiting.append(process)
    return found


def kill_command(run: subprocess.Popen[bytes]) -> None:
    os.killpg(run.pid, signal.SIGKILL)


def kill_stage(run: subprocess.Popen[bytes]) -> None:
    """The stage's process with all its workers: they are a group of their own."""
    groups = {os.getpgid(process) for process, (parent, _) in descendants(run.pid).items() if parent == run.pid}
    for group in groups - {run.pid}:
        os.killpg(group, signal.SIGKILL)
    assert groups - {run.pid}


def kill_worker(run: subprocess.Popen[bytes]) -> None:
    """One of the processes that refine; their parent is the fork server."""
    found = descendants(run.pid)
    servers = {process for process, (_, line) in found.items() if "multiprocessing.forkserver" in line}
    workers = [process for process, (parent, _) in found.items() if parent in servers]
    assert workers
    os.kill(workers[0], signal.SIGKILL)


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, "the stage ended before it could be killed"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------------------
# The test
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep_maps", "seed"), [("true", 1), ("false", 2)], ids=["stored", "fused"])
def test_three_kills_leave_no_trace(trained: Path, tmp_path: Path, keep_maps: str, seed: int) -> None:
    options = ["tiny.yaml", "--set", f"make_attention.keep_maps={keep_maps}"]
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    wsss_here(tmp_path, "run", *options, "--engine", "local", "--until", "make_attention")
    shutil.copytree(tmp_path / "artifacts", tmp_path / "quiet")
    quiet = wsss_here(tmp_path, "stage", "make_masks", *options, "--artifacts", "quiet")

    draw, there = random.Random(seed), 0
    for kill in draw.sample([kill_command, kill_stage, kill_worker], 3):
        there = begin_and_kill(tmp_path, options, kill, more_than=there + draw.randint(1, 8))
        assert there < NUM_IMAGES, "there is nothing left to do"
    last = wsss_here(tmp_path, "stage", "make_masks", *options)

    assert [stage["state"] for stage in last["stages"]] == ["resumed"]
    assert last["metrics"] == quiet["metrics"]
    folders = [Path(document["stages"][0]["path"]) for document in (quiet, last)]
    one, two = (read_all(tmp_path / folder) for folder in folders)
    assert len([name for name in one if name.startswith("masks/")]) == NUM_IMAGES
    assert one == two
    contents = [json.loads((tmp_path / folder / "manifest.json").read_text())["content"] for folder in folders]
    assert contents[0] == contents[1]


def begin_and_kill(
    folder: Path, options: list[str], kill: Callable[[subprocess.Popen[bytes]], None], *, more_than: int
) -> int:
    """Kill the stage once there are ``more_than`` masks; how many are there then, each of them whole."""

    def masks() -> list[Path]:
        return list((folder / "artifacts" / "make_masks").glob(".work-*/masks/*.png"))

    run = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.main", "stage", "make_masks", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(masks()) > more_than, run)
        started = descendants(run.pid)
        kill(run)
        assert run.wait(60) != 0
    finally:
        if run.poll() is None:
            run.kill()
            run.wait()
    end = time.monotonic() + 15
    while any(Path(f"/proc/{process}").exists() for process in started):
        assert time.monotonic() < end, "something outlived the kill"
        time.sleep(0.05)
    for path in masks():
        assert read_index_mask(path).shape == (96, 96)
    return len(masks())


def read_all(artifact: Path) -> dict[str, bytes]:
    """Every file but the manifest, which tells when and how it was built."""
    files = [path for path in artifact.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert not [path for path in files if path.name.startswith(".")], "half-written files"
    return {path.relative_to(artifact).as_posix(): path.read_bytes() for path in files}
