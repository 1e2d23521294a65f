"""Runs with real child processes: cache, force, interrupts, kills, and what is said of each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_stages.table import TABLE, FakeRun

from pipeline.engine import forecast
from pipeline.engine.failures import InternalFailure
from pipeline.engine.outcomes import RunOutcome, SilentListener, StageOutcome, StageStatus
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.records import prune
from pipeline.engine.run import Run
from pipeline.store.artifacts import Store
from stages.errors import ConfigError, DamagedFileError, DataError, EnvironmentFailure, MissingArtifactError

NAMES = ("collect", "combine", "finish")
ROOT = Path(__file__).parents[3]


class Notes(SilentListener):
    """A listener that keeps what it hears."""

    def __init__(self, on_log: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.started: list[str] = []
        self.logs: list[tuple[str, str]] = []
        self.counts: list[tuple[str, int, int]] = []
        self.outcomes: list[StageOutcome] = []
        self._on_log = on_log

    def stage_started(self, stage: str, key: str) -> None:
        self.started.append(stage)

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        self.counts.append((task, done, total))

    def info(self, text: str) -> None:
        self._hear("info", text)

    def warn(self, text: str) -> None:
        self._hear("warning", text)

    def output(self, text: str) -> None:
        self._hear("output", text)

    def _hear(self, level: str, text: str) -> None:
        self.logs.append((level, text))
        if self._on_log is not None:
            self._on_log(text)

    def stage_finished(self, outcome: StageOutcome) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def fake(**fields: Any) -> FakeRun:
    return FakeRun.model_validate(fields)


def states(outcome: RunOutcome) -> list[str]:
    return [stage.state for stage in outcome.stages]


def open_run(config: FakeRun, store: Store, **options: Any) -> Run:
    return Run(config, store, table=TABLE, **options)


def run(
    store: Store, config: FakeRun | None = None, listener: Notes | None = None, plan: Plan | None = None, **options: Any
) -> RunOutcome:
    return open_run(config or fake(), store, listener=listener, plan=plan).run_pipeline(**options)


def status(config: FakeRun, store: Store) -> list[StageStatus]:
    return open_run(config, store).status()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_builds_once_then_only_what_a_change_reaches(store: Store) -> None:
    notes = Notes()
    first = run(store, listener=notes)
    assert states(first) == ["built", "built", "built"]
    assert first.metrics == {"collect.items": 3, "collect.nan": None, "combine.length": 3, "finish.excluded": 0}
    assert notes.started == list(NAMES)
    assert notes.counts[-1] == ("collect", 3, 3)
    assert [outcome.path.parent.name for outcome in notes.outcomes if outcome.path] == list(NAMES)
    started = time.monotonic()
    again = run(store)
    assert states(again) == ["cached"] * 3
    assert time.monotonic() - started < 1
    assert again.metrics == first.metrics
    assert len(list((store.root / "runs").glob("fake-*.json"))) == 1
    changed = run(store, fake(combine={"factor": 2.0}, runtime={"threads": 1, "workers": 0}))
    assert states(changed) == ["cached", "built", "built"]
    assert states(run(store, force=["combine"], until="combine")) == ["cached", "built"]


def test_status_and_single_stages(store: Store) -> None:
    config = fake(combine={"is_used": False})
    assert [line.state for line in status(config, store)] == ["missing", "skipped", "missing"]
    with pytest.raises(MissingArtifactError) as caught:
        open_run(fake(), store, invocation="c.yaml --set a=b").run_stage("finish")
    expected = "finish rests on the artifact of combine, which is not in the store; make it with: "
    assert caught.value.message == expected + "wsss run c.yaml --set a=b --until combine"
    assert not store.root.exists()
    assert states(open_run(config, store).run_stage("collect")) == ["built"]
    # a stage that the whole run would skip can still be run by itself
    assert states(open_run(config, store).run_stage("combine")) == ["built"]
    assert open_run(config, store).ensure("combine").state == "skipped"
    (store.path("collect", str(status(config, store)[0].key)) / "1.txt").unlink()
    lines = status(config, store)
    assert [line.state for line in lines] == ["damaged", "skipped", "missing"]
    work, _ = store.work_dir("finish", str(lines[2].key))
    (work / "x").write_text("x")
    assert status(config, store)[2].state == "partial"
    assert open_run(config, store).finished_artifacts() == {}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("is_alone", [False, True])
def test_inputs_that_are_not_as_they_were_written_are_built_again_before_a_stage_reads_them(
    store: Store, is_alone: bool
) -> None:
    paths = {stage.stage: stage.path for stage in run(store).stages}
    combined = paths["combine"] / "sub" / "combined.json"
    before = combined.read_bytes()
    flip(combined)
    flip(paths["collect"] / "1.txt")
    shutil.rmtree(paths["finish"])
    notes = Notes()
    again = open_run(fake(), store, listener=notes).run_stage("finish") if is_alone else run(store, listener=notes)
    assert states(again)[-1] == "built"
    assert combined.read_bytes() == before, "of the right texts, which were built again too"
    assert [path.parent.name for path in sorted(store.root.glob("*/.damaged-*"))] == ["collect", "combine"]
    told = [text for level, text in notes.logs if level == "warning"]
    assert [text.split()[0] for text in told] == ["combine", "collect"]
    assert f"{combined}: the content differs from the manifest's sha256" in told[0]
    assert [problem for place in store.folders() for problem in store.verify(*place)] == []
    assert notes.started[-1] == "finish", "who listens knows whose progress follows"


def test_a_file_that_an_input_was_not_written_with_is_named_and_nothing_is_built(store: Store) -> None:
    paths = {stage.stage: stage.path for stage in run(store, until="combine").stages}
    shutil.rmtree(paths["combine"])
    (paths["collect"] / "9.txt").write_text("combine would read it")
    with pytest.raises(DamagedFileError, match="has files that it was not written with; remove them") as caught:
        run(store)
    assert caught.value.problems == (f"{paths['collect']}/9.txt is no file of this artifact",)


def test_what_a_run_used_is_kept_until_its_last_reader_is_done(store: Store) -> None:
    def prune_all(outcome: RunOutcome) -> None:
        assert prune(store, keep=0, dry_run=False) == []
        assert all(stage.path.is_dir() for stage in outcome.stages)

    open_run(fake(), store).run_pipeline(then=prune_all)
    assert len(prune(store, keep=0)) == 4


def test_from_needs_what_comes_before_it(store: Store) -> None:
    with pytest.raises(MissingArtifactError, match="make it with: wsss run CONFIG --until collect"):
        run(store, from_="combine")
    with pytest.raises(ConfigError, match="--from finish comes after --until combine; order: collect, combine, finish"):
        run(store, from_="finish", until="combine")
    with pytest.raises(ConfigError, match="there is no stage 'combin'; did you mean 'combine'"):
        run(store, force=["combin"])
    with pytest.raises(
        MissingArtifactError, match=r"finish rests on the artifact of collect and combine.* --until combine"
    ):
        run(store, from_="finish")
    run(store, until="collect")
    assert states(run(store, from_="combine", until="combine")) == ["cached", "built"]


@pytest.mark.parametrize(
    "options", [{"from_": "combine", "force": ["collect"]}, {"until": "collect", "force": ["finish"]}]
)
def test_a_forced_stage_that_would_not_run_is_refused(store: Store, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--force \w+: this run covers \w+ … \w+ only"):
        run(store, **options)


def test_what_seems_odd_is_said_before_the_first_stage(store: Store) -> None:
    notes = Notes()
    plan = plan_run(fake(), store.digest_cache, TABLE)
    run(store, plan=replace(plan, data=replace(plan.data, warnings=("two sizes",))), listener=notes, until="collect")
    assert notes.logs[0] == ("warning", "two sizes")


def test_networks_are_checked_before_the_first_stage(store: Store) -> None:
    notes = Notes()
    with pytest.raises(ConfigError, match="factor is negative") as caught:
        run(store, fake(is_checked=True, combine={"factor": -1.0}), listener=notes)
    assert caught.value.problems == ("combine.factor: -1.0",)
    assert ("info", "checked") in notes.logs
    assert notes.started == []
    assert list(store.artifacts()) == []


def test_deliberate_error_arrives_whole_and_the_outcome_says_failed(store: Store) -> None:
    notes = Notes()
    with pytest.raises(DataError) as caught:
        run(store, fake(runtime={"mischief": "input"}), listener=notes)
    assert caught.value.problems == ("a.jpg: truncated", "b.jpg: empty")
    assert [(outcome.stage, outcome.state) for outcome in notes.outcomes] == [("collect", "failed")]
    assert [line.state for line in status(fake(), store)] == ["partial", "missing", "missing"]


def test_a_fault_brings_its_traceback(store: Store) -> None:
    with pytest.raises(InternalFailure, match="collect failed: KeyError: 'unforeseen'") as caught:
        run(store, fake(runtime={"mischief": "fault"}))
    assert "in misbehave" in caught.value.trace


@pytest.mark.parametrize(
    ("mischief", "error", "text"),
    [
        (
            "kill",
            EnvironmentFailure,
            "collect: the child process was ended by SIGKILL; most likely the machine ran out",
        ),
        ("exit", InternalFailure, "collect: the child process ended with code 7 and no answer"),
        ("disk", EnvironmentFailure, "x: the disk is full; free some space, then run the same command again"),
    ],
)
def test_death_of_the_child_is_explained_and_the_work_continued(
    store: Store, mischief: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        run(store, fake(runtime={"mischief": mischief}))
    assert text in str(caught.value)
    assert [line.state for line in status(fake(), store)] == ["partial", "missing", "missing"]


def test_stray_prints_do_not_disturb_the_answer(store: Store) -> None:
    notes = Notes()
    outcome = run(store, fake(runtime={"mischief": "noise"}), listener=notes, until="collect")
    assert outcome.stages[0].warnings == ("this was noisy",)
    assert ("output", "stray print") in notes.logs
    assert ("output", "from a subprocess") in notes.logs
    assert ("warning", "this was noisy") in notes.logs


def test_code_of_the_users_with_our_names_is_not_imported(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pipeline", "stages"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path / "mine")
    assert states(run(store, until="collect")) == ["built"]


def test_interrupt_ends_the_whole_group_and_the_next_run_continues(store: Store, tmp_path: Path) -> None:
    """SIGTERM to the command, while a worker of the stage ignores SIGTERM and another waits."""
    notes_file = tmp_path / "pids"
    config = fake(runtime={"mischief": "offspring", "notes": str(notes_file)})

    def interrupt() -> None:
        wait_until(notes_file.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    notes = Notes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.engine.spawn.GRACE_S", 0.5)
        with pytest.raises(KeyboardInterrupt):
            run(store, config, listener=notes)
    assert notes.outcomes[-1].state == "failed"
    pids = [int(pid) for pid in notes_file.read_text().split()]
    wait_until(lambda: not any(map(is_alive, pids)), 5)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    record = next((store.root / "runs").glob("*.json"))
    assert '"state": "interrupted"' in record.read_text()
    assert states(run(store, until="collect")) == ["resumed"]
    (artifact,) = store.artifacts()
    assert artifact.run["resumed"], "its seconds are those of the last part only"
    assert artifact.run["runtime"]["mischief"] == "none"


PARENT = """
import sys
from pathlib import Path
from fake_stages.table import TABLE, FakeRun
from pipeline.engine.run import Run
from pipeline.store.artifacts import Store
Run(FakeRun.model_validate_json(sys.argv[1]), Store(Path(sys.argv[2])), table=TABLE).run_pipeline()
"""


def test_kill_9_of_the_command_ends_child_and_workers_and_a_second_worker_takes_over(
    store: Store, tmp_path: Path
) -> None:
    notes_file = tmp_path / "pids"
    config = fake(runtime={"mischief": "offspring", "notes": str(notes_file)})
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, config.model_dump_json(), str(store.root)],
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        wait_until(notes_file.exists)
    except BaseException:
        parent.kill()
        parent.wait()
        raise
    pids = [int(pid) for pid in notes_file.read_text().split()]
    assert all(map(is_alive, pids))

    def kill_parent(text: str) -> None:
        if text.startswith("waiting: "):
            parent.kill()

    notes = Notes(kill_parent)
    started = time.monotonic()
    outcome = run(store, until="collect", listener=notes)
    assert time.monotonic() - started < 15
    parent.wait()
    assert states(outcome) == ["resumed"]
    assert any(f"waiting: process {pids[0]} on " in text for _, text in notes.logs)
    assert not any(map(is_alive, pids))


def test_second_worker_waits_and_reuses(store: Store, tmp_path: Path) -> None:
    """Two commands at once: one builds, the other says that it waits and reports the artifact as cached."""
    key = status(fake(), store)[0].key
    lock = store.lock("collect", str(key))
    assert lock.try_acquire()

    def finish_the_work(text: str) -> None:
        if text.startswith("waiting: ") and not store.path("collect", str(key)).exists():
            work, _ = store.work_dir("collect", str(key))
            (work / "0.txt").write_text("by another")
            store.publish("collect", str(key), content={"mask_supervision": []}, run={"metrics": {"m": 1}})
            lock.release()

    outcome = run(store, until="collect", listener=Notes(finish_the_work))
    assert states(outcome) == ["cached"]
    assert outcome.stages[0].metrics == {"m": 1}


def test_store_that_cannot_be_written_is_an_environment_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure, match=r"file cannot be written .*choose another folder with --artifacts"):
        run(Store(tmp_path / "file"))


def test_the_parent_imports_neither_torch_nor_prefect() -> None:
    code = "import sys, pipeline.engine.run, pipeline.engine.records\n"
    code += "print([m for m in ('torch', 'prefect') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_nearly_full_disk_is_found_before_the_work(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(run(store, until="collect")) == ["built"]
    monkeypatch.setattr(forecast, "MIN_FREE_BYTES", 2**62)
    for again in (lambda: run(store), lambda: open_run(fake(), store).run_stage("combine")):
        with pytest.raises(EnvironmentFailure, match=r"MB free, at least .* MB are needed; free some space"):
            again()
    assert states(run(store, until="collect")) == ["cached"], "nothing is to be written"
