"""Stages built in parts: the same artifact, however many processes share the work and whichever of them dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_stages.table import TABLE, FakeRun

from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.child import answer_stage
from pipeline.engine.outcomes import SilentListener
from pipeline.engine.plan import plan_run
from pipeline.engine.request import ChildProgress, Events, Request
from pipeline.engine.run import Run
from pipeline.store.artifacts import Store
from stages.contracts import Part
from stages.errors import ConfigError, DataError, EnvironmentFailure, MissingArtifactError
from tests.pipeline.whole_runs.here import stages_here

ROOT = Path(__file__).parents[3]
ITEMS = 11
STAGE = "collect"


class Pipe(Events):
    """Events that are kept instead of sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, event: str, **fields: object) -> None:
        self.sent.append({"event": event, **fields})

    def texts(self) -> list[str]:
        return [message["text"] for message in self.sent if message["event"] in ("info", "warn")]

    def bar(self) -> list[tuple[str, int, int]]:
        return [(m["task"], m["done"], m["total"]) for m in self.sent if m["event"] == "step"]


def fake(parts: int = 4, items: int = ITEMS, **runtime: Any) -> FakeRun:
    return FakeRun.model_validate({"collect": {"items": items}, "runtime": {"parts": parts, **runtime}})


def open_run(store: Store, config: FakeRun, **options: Any) -> Run:
    return Run(config, store, table=TABLE, **options)


def make(store: Store, config: FakeRun, pipe: Pipe | None = None, **fields: Any) -> dict[str, Any]:
    """What a child answers."""
    request = open_run(store, config)._request(STAGE) | {"num_parts": config.runtime.parts, **fields}
    return answer_stage(Request.model_validate(request), ChildProgress(pipe or Pipe()))


def help_(store: Store, config: FakeRun, part: str = "any", pipe: Pipe | None = None) -> int:
    return make(store, config, pipe, part=part)["num_parts"]


def key_of(store: Store, items: int = ITEMS) -> str:
    return plan_run(fake(items=items), store.digest_cache, TABLE).keys[STAGE]


def contents(store: Store, items: int = ITEMS) -> bytes:
    """``content`` of the manifest, as bytes, after a look at every file."""
    key = key_of(store, items)
    assert store.verify(STAGE, key) == []
    return json.dumps(store.manifest(STAGE, key)["content"], sort_keys=True).encode()


def work_files(store: Store) -> list[str]:
    return sorted(path.name for path in store.work_path(STAGE, key_of(store)).glob("*.txt"))


def no_lock_is_held(store: Store, count: int = 4) -> bool:
    parts = ["", *(f"{number}of{count}" for number in range(1, count + 1))]
    locks = [store.lock(STAGE, key_of(store), part=part) for part in parts]
    is_free = all([lock.try_acquire() for lock in locks])
    for lock in locks:
        lock.release()
    return is_free and not list((store.root / ".locks").glob("*.closing"))


def made(diary: Path) -> list[int]:
    return sorted(int(line.split()[1]) for line in diary.read_text().splitlines())


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@contextmanager
def held(store: Store, number: int, count: int = 4) -> Iterator[None]:
    """As if another process were at a part."""
    lock = store.lock(STAGE, key_of(store), part=f"{number}of{count}")
    assert lock.try_acquire()
    try:
        yield
    finally:
        lock.release()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


@pytest.fixture
def whole(tmp_path: Path) -> Store:
    """A store with the artifact built by one process as one."""
    alone = Store(tmp_path / "alone")
    make(alone, fake(1))
    return alone


# ---------------------------------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, ITEMS, 3 * ITEMS])
def test_the_artifact_is_that_of_one_build(store: Store, whole: Store, count: int) -> None:
    """Also with more parts than items, some of which are empty then."""
    answer = make(store, fake(count))
    assert answer["state"] == "built"
    assert contents(store) == contents(whole)
    artifact = store.require(STAGE, key_of(store))
    assert artifact.metrics == whole.require(STAGE, key_of(whole)).metrics
    assert artifact.run["parts"] == count
    assert sorted(path.name for path in artifact.path.iterdir()) == sorted(
        ["manifest.json", *(f"{number}.txt" for number in range(ITEMS))]
    )
    assert no_lock_is_held(store, count)
    assert make(store, fake(count))["state"] == "cached"


def test_one_bar_goes_over_all_parts(store: Store) -> None:
    pipe = Pipe()
    make(store, fake(4), pipe)
    bar = [line for line in pipe.bar() if line[0] == "collect in 4 parts"]
    assert (bar[0], bar[-1]) == (("collect in 4 parts", 0, ITEMS), ("collect in 4 parts", ITEMS, ITEMS))
    assert [line[1] for line in bar] == sorted(line[1] for line in bar)
    assert pipe.bar()[-1] == ("collect", ITEMS, ITEMS), "the last call finds all files"
    values = [message["values"] for message in pipe.sent if message["event"] == "step"]
    assert any(entry.get("part") == 4 and "loss" in entry for entry in values)


def test_warnings_of_the_parts_stand_once_in_order(store: Store) -> None:
    config = fake(3, mischief="noise", at_item=-1)
    assert help_(store, config, "2/3") == 1  # whoever built the part
    expected = ["part 0 was noisy", "this was noisy", "part 1 was noisy", "part 2 was noisy"]
    assert make(store, config)["warnings"] == expected
    assert store.manifest(STAGE, key_of(store))["run"]["warnings"] == expected


def test_an_error_keeps_what_is_finished(store: Store, whole: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        make(store, fake(4, mischief="input", at_item=7))
    assert no_lock_is_held(store)
    assert open_run(store, fake(4)).status()[0].state == "partial"
    diary = tmp_path / "diary"
    assert make(store, fake(4, diary=str(diary)))["state"] == "resumed"
    assert made(diary) == [7, 8, 9, 10]
    assert store.require(STAGE, key_of(store)).run["resumed"]
    assert contents(store) == contents(whole)


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 3), (4, 6), (1, 4)])
def test_a_change_of_the_count_keeps_what_is_finished(
    store: Store, whole: Store, tmp_path: Path, before: int, after: int
) -> None:
    with pytest.raises(DataError):
        make(store, fake(before, mischief="input", at_item=7))
    diary = tmp_path / "diary"
    assert make(store, fake(after, diary=str(diary)))["state"] == "resumed"
    assert made(diary) == [7, 8, 9, 10]
    assert contents(store) == contents(whole)


def test_what_is_lost_of_a_finished_part_is_made_again(store: Store, whole: Store) -> None:
    assert help_(store, fake(4)) == 4
    (store.work_path(STAGE, key_of(store)) / "3.txt").unlink()
    next(store.work_path(STAGE, key_of(store)).glob(".tmp-part-*")).write_text("{")
    make(store, fake(4))
    assert contents(store) == contents(whole)


def test_a_damaged_artifact_is_set_aside_and_built_again(store: Store, whole: Store) -> None:
    make(store, fake(4))
    (store.path(STAGE, key_of(store)) / "3.txt").unlink()
    answer = make(Store(store.root), fake(4))
    assert answer["state"] == "built"
    assert "3.txt is missing; set aside as" in answer["warnings"][0]
    assert contents(store) == contents(whole)


def test_force_builds_every_item_anew(store: Store, whole: Store, tmp_path: Path) -> None:
    """Whatever is there: the artifact, finished parts, unfinished work."""
    make(store, fake(4))
    key = key_of(store)
    (store.path(STAGE, key) / "0.txt").write_text("item X\n")
    work, _ = store.work_dir(STAGE, key)
    (work / "10.txt").write_text("doubtful")
    (work / ".tmp-part-1of4.json").write_text('{"units": 2, "warnings": []}')
    diary = tmp_path / "diary"
    assert make(store, fake(4, diary=str(diary)), force=True)["state"] == "built"
    assert made(diary) == list(range(ITEMS))
    assert contents(store) == contents(whole)


def test_the_old_artifact_stays_until_a_forced_build_replaces_it(store: Store) -> None:
    make(store, fake(4))
    old = store.require(STAGE, key_of(store))
    assert help_(store, fake(4)) == 0, "it is there"
    with pytest.raises(DataError):
        make(store, fake(4, mischief="input", at_item=7), force=True)
    assert Store(store.root).require(STAGE, key_of(store)) == old


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_helper_takes_what_is_free_waits_for_nobody_and_publishes_nothing(store: Store, whole: Store) -> None:
    with held(store, 2):
        assert help_(store, fake(4)) == 3
        assert help_(store, fake(4)) == 0
    assert store.lookup(STAGE, key_of(store)) is None
    assert work_files(store) == sorted(f"{number}.txt" for number in range(ITEMS) if number not in (2, 3, 4))
    assert make(store, fake(4))["state"] == "resumed"
    assert contents(store) == contents(whole)


def test_named_parts_from_a_scheduler_make_the_whole(store: Store, whole: Store) -> None:
    """Each process of an array builds its own, also where the config names no number of parts."""
    for number in (3, 1, 2):
        assert help_(store, fake(1), f"{number}/3") == 1
    assert help_(store, fake(1), "2/3") == 0, "it is finished"
    answer = make(store, fake(1))
    assert answer["state"] == "resumed"
    assert contents(store) == contents(whole)
    assert help_(store, fake(1), "2/3") == 0, "it is published"
    assert not store.work_path(STAGE, key_of(store)).exists()


def test_a_build_waits_for_a_part_that_another_holds_and_says_so_once(store: Store, whole: Store) -> None:
    pipe, done = Pipe(), []
    thread = threading.Thread(target=lambda: done.append(make(Store(store.root), fake(4), pipe)))
    with held(store, 3):
        thread.start()
        wait_until(lambda: any(text.startswith("waiting: ") for text in pipe.texts()))
        time.sleep(1.2)
        assert not done
    thread.join(30)
    (waiting,) = [text for text in pipe.texts() if text.startswith("waiting: ")]
    assert waiting.startswith(f"waiting: process {os.getpid()} on ")
    assert waiting.endswith(" builds part 3 of 4")
    assert done[0]["state"] == "built", "nobody finished it, so it was taken over"
    assert contents(store) == contents(whole)


def test_nothing_is_published_while_a_helper_with_other_parts_is_at_work(store: Store, whole: Store) -> None:
    pipe, done = Pipe(), []
    thread = threading.Thread(target=lambda: done.append(make(Store(store.root), fake(2), pipe)))
    with held(store, 5, 7):
        thread.start()
        wait_until(lambda: any(text.endswith("builds part 5 of 7") for text in pipe.texts()))
        assert help_(store, fake(3)) == 0, "the parts are being put together"
        assert store.lookup(STAGE, key_of(store)) is None
    thread.join(30)
    assert done[0]["state"] == "built"
    assert contents(store) == contents(whole)


def closing_sign(store: Store) -> Path:
    """What stands while parts are put together."""
    path = store.root / ".locks" / f"{STAGE}-{key_of(store)}.closing"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def held_stage(store: Store) -> Iterator[None]:
    """As if another process built the stage."""
    lock = store.lock(STAGE, key_of(store))
    assert lock.try_acquire()
    try:
        yield
    finally:
        lock.release()


def test_a_sign_that_a_dead_process_left_keeps_nobody_out(store: Store, whole: Store) -> None:
    closing_sign(store).touch()
    assert help_(store, fake(4)) == 4
    make(store, fake(4))
    assert contents(store) == contents(whole)


def test_a_build_takes_the_sign_of_a_dead_process_away_when_it_begins(store: Store, whole: Store) -> None:
    closing_sign(store).touch()
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(make(Store(store.root), fake(2, item_s=0.3))))
    thread.start()
    wait_until(lambda: work_files(store))
    assert not closing_sign(store).exists()
    assert help_(Store(store.root), fake(2, item_s=0.01)) == 1
    thread.join(30)
    assert contents(store) == contents(whole)


def test_a_helper_that_comes_too_late_leaves_no_folder(store: Store) -> None:
    make(store, fake(4))
    assert help_(store, fake(4)) == 0
    closing_sign(store).touch()
    with held_stage(store):
        assert help_(Store(store.root), fake(4), "2/4") == 0
    assert not store.work_path(STAGE, key_of(store)).exists()


def test_leases_of_helpers_are_waited_for_once(store: Store, whole: Store) -> None:
    """Beside the file of a part's lock lies that of its lease; both are one lock."""
    closing_sign(store).with_name("use-leases").touch()
    pipe, done = Pipe(), []
    with held(store, 3, 5):
        thread = threading.Thread(target=lambda: done.append(make(Store(store.root), fake(4), pipe)))
        thread.start()
        wait_until(lambda: any(text.endswith("builds part 3 of 5") for text in pipe.texts()))
    thread.join(60)
    assert done[0]["state"] == "built", "it waited for a lock of its own"
    assert contents(store) == contents(whole)


def test_a_second_build_shares_the_work_before_it_waits(store: Store, whole: Store, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    config = fake(6, diary=str(diary), item_s=0.4)
    processes = [start(store, config) for _ in range(2)]
    states = sorted(process.communicate(timeout=100)[0].strip() for process in processes)
    assert states in (["built", "cached"], ["cached", "resumed"])
    assert made(diary) == list(range(ITEMS))
    assert len(Counter(line.split()[0] for line in diary.read_text().splitlines())) == 2
    assert contents(store) == contents(whole)
    assert no_lock_is_held(store, 6)


PROCESS = """
import sys
from pathlib import Path
from fake_stages.table import TABLE, FakeRun
from pipeline.engine.run import Run
from pipeline.store.artifacts import Store
run = Run(FakeRun.model_validate_json(sys.argv[1]), Store(Path(sys.argv[2])), table=TABLE)
print(run.run_stage("collect").stages[0].state if len(sys.argv) == 3 else run.help_with("collect", sys.argv[3]))
"""


def start(store: Store, config: FakeRun, *part: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, config.model_dump_json(), str(store.root), *part],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("victim", ["helper", "owner"])
def test_kill_9_of_one_leaves_its_part_to_the_other(store: Store, whole: Store, tmp_path: Path, victim: str) -> None:
    diary = tmp_path / "diary"
    config = fake(3, diary=str(diary), item_s=1.5)
    owner = start(store, config)
    helper = start(store, config, "any") if victim == "helper" else start(store, config)
    try:
        wait_until(lambda: diary.exists() and len({line.split()[0] for line in diary.read_text().splitlines()}) == 2)
        holder = store.lock(STAGE, key_of(store)).holder().split()[1]  # the process of the stage, not the command
        (other,) = {line.split()[0] for line in diary.read_text().splitlines()} - {holder}
        os.kill(int(holder if victim == "owner" else other), signal.SIGKILL)
        answers = [process.communicate(timeout=100) for process in (owner, helper)]
    finally:
        owner.kill()
        helper.kill()
    assert sorted(process.returncode for process in (owner, helper)) == [0, 1], answers
    assert "was ended by SIGKILL" in "".join(errors for _, errors in answers)
    assert made(diary) == list(range(ITEMS)), "the finished items of the dead process's part are continued"
    assert contents(store) == contents(whole)
    assert no_lock_is_held(store, 3)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


class Notes(SilentListener):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, int, int]] = []

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        self.steps.append((task, done, total))


def test_two_devices_take_parts_in_a_process_each(store: Store, whole: Store, tmp_path: Path) -> None:
    """Two processes on the CPU in place of two GPUs."""
    diary, notes = tmp_path / "diary", Notes()
    config = fake(1, diary=str(diary), item_s=0.3, devices=2, device="cpu")
    run = open_run(store, config, listener=notes)
    assert run.count_parts(STAGE) == 8
    assert run.count_parts("combine") == 1
    assert run.run_stage(STAGE).stages[0].state == "built"
    assert made(diary) == list(range(ITEMS))
    assert len(Counter(line.split()[0] for line in diary.read_text().splitlines())) == 2
    assert contents(store) == contents(whole)
    assert notes.steps[-1] == ("collect", ITEMS, ITEMS)
    artifact = store.require(STAGE, key_of(store))
    assert (artifact.run["parts"], artifact.run["runtime"]["devices"]) == (8, 1)


def test_a_forced_build_has_the_help_of_all_devices(store: Store, whole: Store, tmp_path: Path) -> None:
    make(store, fake(1))
    diary = tmp_path / "diary"
    config = fake(4, diary=str(diary), item_s=0.5, devices=2, device="cpu")
    assert open_run(Store(store.root), config).run_stage(STAGE, force=True).stages[0].state == "built"
    assert made(diary) == list(range(ITEMS))
    assert len(Counter(line.split()[0] for line in diary.read_text().splitlines())) == 2
    assert contents(store) == contents(whole)


def test_a_helping_process_that_fails_is_a_warning(store: Store, whole: Store, tmp_path: Path) -> None:
    """It is killed at an item that the main process then makes."""
    notes, diary = Notes(), tmp_path / "diary"
    config = fake(2, diary=str(diary), item_s=0.3, devices=2, device="cpu")

    def kill_one() -> None:
        wait_until(lambda: diary.exists() and len({line.split()[0] for line in diary.read_text().splitlines()}) == 2)
        first, second = list(dict.fromkeys(line.split()[0] for line in diary.read_text().splitlines()))
        items = {
            pid: min(int(n) for p, n in map(str.split, diary.read_text().splitlines()) if p == pid)
            for pid in (first, second)
        }
        os.kill(int(max(items, key=items.__getitem__)), signal.SIGKILL)  # helpers come from the end

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    outcome = open_run(store, config, listener=notes).run_stage(STAGE).stages[0]
    thread.join()
    assert outcome.state == "built"
    assert made(diary) == list(range(ITEMS))
    assert contents(store) == contents(whole)
    assert any("the process on cpu ended (collect: the child process was ended by SIGKILL" in t for t in notes.warnings)


def test_helpers_are_asked_around_a_build_in_parts_only(store: Store) -> None:
    asked: list[str] = []

    @contextmanager
    def helpers(stage: str, count: int) -> Iterator[None]:
        asked.append(f"{stage} {count} begins")
        yield
        asked.append(f"{stage} ends")

    run = open_run(store, fake(3), helpers=helpers)
    assert [stage.state for stage in run.run_pipeline().stages] == ["built"] * 3
    assert asked == ["collect 3 begins", "collect ends"], "combine has no parts"
    open_run(store, fake(3), helpers=helpers).run_pipeline()
    assert len(asked) == 2, "it is cached"
    open_run(store, fake(3), helpers=helpers).run_stage(STAGE, force=True)
    assert len(asked) == 4
    open_run(store, fake(1, items=5), helpers=helpers).run_pipeline()
    assert len(asked) == 4
    with pytest.raises(EnvironmentFailure):
        open_run(store, fake(3, items=6, mischief="kill"), helpers=helpers).run_stage(STAGE)


def test_help_with_a_stage(store: Store, whole: Store) -> None:
    run = open_run(store, fake(4))
    assert run.help_with(STAGE) == 4
    assert run.status()[0].state == "partial"
    assert open_run(store, fake(4)).run_stage(STAGE).stages[0].state == "resumed"
    assert contents(store) == contents(whole)
    assert run.help_with(STAGE) == 0


@pytest.mark.parametrize("part", ["9/8", "0/8", "x", "1", "1/0", "-1/8", "3/8/2", "", "any more"])
def test_a_part_that_is_none_is_refused(store: Store, part: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a part such as 3/8 \(1/8 … 8/8\) or any, found"):
        open_run(store, fake(4)).help_with(STAGE, part)
    assert not store.root.exists()


def test_help_with_what_cannot_be_helped(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"set runtime.parts above 1.*or name the part of collect"):
        open_run(store, fake(1)).help_with(STAGE)
    with pytest.raises(ConfigError, match=r"combine has no parts; --part goes with collect"):
        open_run(store, fake(4)).help_with("combine", "1/2")
    with pytest.raises(EnvironmentFailure, match=r"builds 0123, config and code here give [0-9a-f]{20}; bring both"):
        open_run(store, fake(4)).help_with(STAGE, key="0123")
    spec = TABLE.spec("combine")
    monkeypatch.setitem(spec.__dict__, "num_units", lambda call: 1)
    with pytest.raises(
        MissingArtifactError, match=r"rests on the artifact of collect.*wsss run CONFIG --until collect"
    ):
        open_run(store, fake(4)).help_with("combine")
    with pytest.raises(DataError):
        open_run(store, fake(4, mischief="input")).help_with(STAGE)


def test_parts_cover_everything_once() -> None:
    for count in (1, 2, 3, 7, 12):
        for total in (0, 1, 5, 7, 100):
            parts = [Part(index, count).positions(total) for index in range(count)]
            assert [position for part in parts for position in part] == list(range(total))
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match="a part is numbered 0 … 3, got 4"):
        Part(4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# The real stages
# ---------------------------------------------------------------------------------------------------------------------

TINY = [
    "data={format: synthetic, num_train: 11, num_val: 2, size_px: 64, num_classes: 3}",
    "train_classifier.augment={crop_px: 64}",
    "train_classifier.training={steps: 2, batch_size: 4, learning_rate: 0.05}",
    "make_attention={scales: [1.0], shard_images: 3}",
    "make_masks={threshold: 0.3, crf: {iterations: 2}}",
    "runtime={device: cpu, workers: 0, processes: 1, threads: 1}",
]


def test_attention_and_masks_in_parts_are_those_of_one_build(tmp_path: Path) -> None:
    """Six parts: of four files of attention, so that two are empty, and of eleven masks."""
    config = load_model(RunConfig, find_config("demo"), TINY)
    parted = load_model(RunConfig, find_config("demo"), [*TINY, "runtime.parts=6"])
    one, many = Store(tmp_path / "one"), Store(tmp_path / "many")
    with stages_here():
        Run(config, one).run_pipeline(until="train_classifier")
        shutil.copytree(one.root, many.root)
        Run(config, one).run_pipeline(until="make_masks")
        outcome = Run(parted, many).run_pipeline(until="make_masks")
    assert [stage.state for stage in outcome.stages] == ["cached", "cached", "built", "built"]
    for stage in outcome.stages[2:]:
        assert stage.key is not None
        here, there = (store.require(stage.stage, stage.key) for store in (one, many))
        assert json.dumps(dict(here.content), sort_keys=True) == json.dumps(dict(there.content), sort_keys=True)
        assert here.metrics == there.metrics == stage.metrics
        assert here.warnings == there.warnings
        assert many.verify(stage.stage, stage.key) == []
        assert there.run["parts"] == 6
