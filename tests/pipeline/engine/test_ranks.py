"""A stage on several ranks: one artifact, one voice, the errors of a stage on one rank, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_training.table import TABLE, FakeRun

from pipeline.config.network_check import check_networks, needs_check
from pipeline.config.preflight import preflight
from pipeline.config.run_config import RunConfig
from pipeline.engine.failures import InternalFailure, to_message
from pipeline.engine.outcomes import SilentListener
from pipeline.engine.ranks import count_ranks, find_cause
from pipeline.engine.run import Run
from pipeline.engine.stage_table import TABLE as STAGE_TABLE
from pipeline.store.artifacts import Store
from stages.contracts import Runtime, SilentProgress, read_json
from stages.errors import ConfigError, EnvironmentFailure, WsssError


class Notes(SilentListener):
    def __init__(self) -> None:
        super().__init__()
        self.logs: list[tuple[str, str]] = []
        self.counts: list[tuple[str, int, int, str, dict[str, float]]] = []

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        self.counts.append((task, done, total, unit, dict(values)))

    def info(self, text: str) -> None:
        self.logs.append(("info", text))

    def warn(self, text: str) -> None:
        self.logs.append(("warning", text))

    def output(self, text: str) -> None:
        self.logs.append(("output", text))


def ensure(stage: str, config: Any, store: Store, *, listener: Notes | None = None, table: Any = STAGE_TABLE) -> Any:
    return Run(config, store, listener=listener, table=table).ensure(stage)


def status(config: Any, store: Store, table: Any = TABLE) -> Any:
    return Run(config, store, table=table).status()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def fake(notes: Path | None = None, **runtime: Any) -> FakeRun:
    return FakeRun.model_validate({"runtime": {"notes": None if notes is None else str(notes), **runtime}})


def is_alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def noted(folder: Path) -> list[int]:
    """Process ids of the ranks and of the stage's child, which is torch's agent."""
    ids = [[int(pid) for pid in (folder / str(rank)).read_text().split()] for rank in range(2)]
    (child,) = {parent for _, parent in ids}
    return [*(pid for pid, _ in ids), child]


# -- a good end -------------------------------------------------------------------------------------------------------


def test_two_ranks_make_one_artifact_and_only_the_main_one_speaks(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "notes").mkdir()
    notes = Notes()
    outcome = ensure("learn", fake(tmp_path / "notes"), store, listener=notes, table=TABLE)
    assert outcome.state == "built"
    (artifact,) = store.artifacts()
    assert (artifact.path / "learnt.txt").read_text() == "2 ranks"
    share = max(1, (os.cpu_count() or 1) // 2)
    assert artifact.metrics == {"ranks": 2, "threads": share, "nan": None}, "the ranks share the cores"
    assert artifact.mask_supervision == frozenset({"a"})
    assert artifact.warnings == ("a warning of rank 0",)
    assert ("learn", 1, 3, "steps", {}) in notes.counts
    assert notes.counts[-1] == ("learn", 3, 3, "steps", {"loss": 0.5})
    said = [line for line in notes.logs if line[0] != "output"]
    assert said == [("info", "on 2 devices"), ("warning", "a warning of rank 0")]
    assert {("output", f"a print of rank {rank}") for rank in range(2)} <= set(notes.logs)
    ids = {int((tmp_path / "notes" / str(rank)).read_text().split()[0]) for rank in range(2)}
    assert len(ids) == 2
    assert not any(map(is_alive, ids))


def test_one_device_starts_no_rank_and_the_number_of_devices_is_in_no_key(store: Store) -> None:
    outcome = ensure("learn", fake(devices=1), store, table=TABLE)
    assert outcome.metrics["ranks"] == 1
    assert ensure("learn", fake(devices=2), store, table=TABLE).state == "cached"


# -- bad ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mischief", "kind", "text", "exit_code"),
    [
        ("input", ConfigError, "a choice of rank 1 is wrong", 2),
        pytest.param("memory", EnvironmentFailure, "learn: out of memory; lower the batch", 4, marks=pytest.mark.slow),
        ("kill", EnvironmentFailure, "learn: the process of rank 1 was ended by SIGKILL; most likely the", 4),
        ("fault", InternalFailure, "learn failed: KeyError: 'unforeseen'", 1),
        pytest.param(
            "exit", InternalFailure, "learn: the process of rank 1 ended with code 7", 1, marks=pytest.mark.slow
        ),
    ],
)
def test_the_error_of_a_rank_is_the_error_of_the_stage_and_the_other_rank_ends(
    store: Store, tmp_path: Path, mischief: str, kind: type[WsssError], text: str, exit_code: int
) -> None:
    notes = Notes()
    (tmp_path / "notes").mkdir()
    started = time.monotonic()
    with pytest.raises(WsssError) as caught:
        ensure("learn", fake(tmp_path / "notes", mischief=mischief), store, listener=notes, table=TABLE)
    assert time.monotonic() - started < 60, "the rank that waits was not ended"
    assert type(caught.value) is kind
    assert caught.value.message.startswith(text)
    assert caught.value.exit_code == exit_code
    if mischief == "input":
        assert caught.value.problems == ("one", "two")
    pids = [int(pid) for path in (tmp_path / "notes").iterdir() for pid in path.read_text().split()]
    assert pids
    wait_until(lambda: not any(map(is_alive, pids)), 10)
    assert ("in misbehave" in getattr(caught.value, "trace", "")) == (mischief == "fault")
    assert not list(store.artifacts())


@pytest.mark.parametrize("victim", [pytest.param("rank", marks=pytest.mark.slow), "child"])
def test_kill_9_of_any_process_ends_all(store: Store, tmp_path: Path, victim: str) -> None:
    (tmp_path / "notes").mkdir()
    found: list[int] = []

    def kill() -> None:
        wait_until(lambda: len(list((tmp_path / "notes").glob("[01]"))) == 2)
        found.extend(noted(tmp_path / "notes"))
        os.kill(found[{"rank": 1, "child": 2}[victim]], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with pytest.raises(EnvironmentFailure, match="was ended by SIGKILL"):
        ensure("learn", fake(tmp_path / "notes", mischief="wait", at_rank=0), store, table=TABLE)
    thread.join()
    wait_until(lambda: not any(map(is_alive, found)), 10)
    assert len(set(found)) == 3
    assert [entry.state for entry in status(fake(), store, TABLE)] == ["partial"], "the work is kept, the lock is free"
    assert store.lock("learn", str(status(fake(), store, TABLE)[0].key)).try_acquire()


# -- the parts --------------------------------------------------------------------------------------------------------


def failed(error: WsssError | None, at: float = 0.0, *, code: int = 1) -> Any:
    """What torch tells of a rank that failed: with its error file, or with an exit code alone."""
    text = "<NONE>" if error is None else f"RankError: {json.dumps(to_message(error))}"
    return SimpleNamespace(exitcode=code, timestamp=at, message={"message": text} if error else text)


def test_the_cause_is_a_deliberate_error_then_a_signal_then_the_earliest() -> None:
    lost, reason = failed(InternalFailure("lost the connection"), 1.0), failed(ConfigError("reason"), 2.0)
    assert find_cause({0: lost, 1: reason}, "s").message == "reason"
    assert "rank 1 was ended by SIGKILL" in find_cause({0: lost, 1: failed(None, code=-9)}, "s").message
    ended, crashed = failed(None, code=-15), failed(None, code=-11)
    assert "rank 2 was ended by SIGSEGV" in find_cause({0: lost, 1: ended, 2: crashed}, "s").message
    early, late = failed(InternalFailure("early"), 1.0), failed(InternalFailure("late"), 2.0)
    assert find_cause({0: late, 1: early}, "s").message == "early"
    assert find_cause({0: reason, 1: ended}, "s").message == "reason"
    assert find_cause({0: ended, 1: ended}, "s").message.startswith("s: the process of rank 0 was ended by SIGTERM")
    assert (
        find_cause({1: failed(None, code=7)}, "s").message == "s: the process of rank 1 ended with code 7 and no answer"
    )


def test_only_a_stage_that_can_be_spread_is_called_on_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake(devices=3)
    assert count_ranks(run.learn, run.runtime) == 3
    assert count_ranks(run.learn, None) == 1
    assert count_ranks(None, run.runtime) == 1
    assert count_ranks(object(), run.runtime) == 1
    with pytest.raises(ConfigError, match=r"runtime.devices is 4, but one step has training.batch_size 3 images"):
        count_ranks(run.learn, Runtime(device="cpu", devices=4))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert count_ranks(run.learn, run.runtime) == 1, "a rank starts no ranks"


# -- refused before the first stage -----------------------------------------------------------------------------------


def test_more_devices_than_images_in_a_step_are_refused_with_the_other_problems_of_the_config() -> None:
    run = tiny("train_classifier", 6)
    with pytest.raises(ConfigError, match="the config cannot run as it is") as caught:
        preflight(run)
    (problem,) = caught.value.problems
    assert problem.startswith("train_classifier and train_segmenter: runtime.devices is 6, but one step has training.b")
    preflight(tiny("train_classifier", 5))


def test_a_number_of_devices_is_looked_up_before_the_data_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    run = tiny("train_classifier", 3)
    run = run.model_copy(update={"runtime": run.runtime.model_copy(update={"device": "auto"})})
    assert needs_check(run, ("prepare_data", "train_segmenter"))
    assert not needs_check(run, ("make_masks",))
    for devices in (1, "auto"):
        other = run.model_copy(update={"runtime": run.runtime.model_copy(update={"devices": devices})})
        assert not needs_check(other, ("prepare_data", "train_segmenter"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EnvironmentFailure, match=r"runtime.devices is 3, but torch finds 2 CUDA devices"):
        check_networks(run, SilentProgress())


# -- the real trainings -----------------------------------------------------------------------------------------------


def tiny(stage: str, devices: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "data": {"format": "synthetic", "num_train": 11, "num_val": 4, "size_px": 64, "num_classes": 3},
            "prepare_data": {"holdout_ratio": 0},
            "train_classifier": {
                "backbone": {"name": "small"},
                "method": {"name": "gain", "am_warmup_epochs": 1, "am_mode": "per_class"},
                "augment": {"crop_px": 64, "scale": [0.8, 1.2]},
                "training": {"steps": 4, "batch_size": 5, "learning_rate": 0.02},
            },
            "make_masks": {"threshold": 0.3},
            "train_segmenter": {
                "supervision": "full" if stage == "train_segmenter" else "weak",
                "init": "random",
                "net": {"name": "largefov", "backbone": {"name": "small"}, "dropout": 0.0},
                "augment": {"crop_px": 64},
                "training": {"steps": 4, "batch_size": 5, "learning_rate": 0.01},
            },
            "runtime": {"device": "cpu", "devices": devices, "workers": 1, "threads": 1},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train_classifier", "train_segmenter"])
def test_a_whole_training_on_two_devices_is_that_on_one(tmp_path: Path, stage: str) -> None:
    found = {}
    for devices in (1, 2):
        store, notes = Store(tmp_path / f"on-{devices}"), Notes()
        ensure("prepare_data", tiny(stage, devices), store)
        outcome = ensure(stage, tiny(stage, devices), store, listener=notes)
        assert outcome.path is not None
        found[devices] = outcome
        assert notes.counts[-1][1] == notes.counts[-1][2]
        assert (stage.replace("_", " "), 4, 4, "steps") in [count[:4] for count in notes.counts]
        assert {entry.stage: entry.state for entry in status(tiny(stage, 3 - devices), store, STAGE_TABLE)}[
            stage
        ] == "cached"
        assert sorted(store.root.glob(f"{stage}/*")) == [outcome.path]
    names = {devices: sorted(path.name for path in outcome.path.iterdir()) for devices, outcome in found.items()}
    assert names[1] == names[2]
    assert found[1].key == found[2].key
    one, two = (read_json(found[devices].path / "history.json") for devices in (1, 2))
    assert len({record["loss"] for record in one}) == 4
    for alone, together in zip(one, two, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert found[2].metrics == pytest.approx(found[1].metrics, abs=1e-4)
