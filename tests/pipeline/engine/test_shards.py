"""Stages built in shards: the same artifact, however many processes share the work and whichever of them dies."""

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_stages.table import TABLE, FakeRun

from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.child import ChildProgress, Events, Request, build
from pipeline.engine.making import Built
from pipeline.engine.outcomes import StageOutcome
from pipeline.engine.plan import plan_run
from pipeline.engine.run import help_with, run_pipeline, run_stage, status
from pipeline.engine.shards import Shard, existing_shards, is_ordered, is_shard_of, link_files, place_order, shards_of
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
        return [message["text"] for message in self.sent if message["event"] == "log"]

    def bar(self) -> list[tuple[str, int, int]]:
        return [(m["task"], m["done"], m["total"]) for m in self.sent if m["event"] == "progress"]


class Notes:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.logs: list[str] = []
        self.outcomes: list[StageOutcome] = []

    def stage_started(self, stage: str, key: str) -> None: ...

    def progress(self, task: str, total: int, done: int, unit: str, values: Mapping[str, float]) -> None: ...

    def log(self, level: str, text: str) -> None:
        self.logs.append(text)

    def stage_finished(self, outcome: StageOutcome) -> None:
        self.outcomes.append(outcome)


def fake(shards: int = 4, items: int = ITEMS, **runtime: Any) -> FakeRun:
    return FakeRun.model_validate({"collect": {"items": items}, "runtime": {"shards": shards, **runtime}})


def request(store: Store, config: FakeRun, **fields: Any) -> Request:
    plan = plan_run(config, store.digest_cache, TABLE)
    return Request(
        table=TABLE.location,
        run=plan.run.model_dump(mode="json"),
        stage=STAGE,
        key=plan.keys[STAGE],
        content=dict(plan.contents[STAGE]),
        upstream={},
        data_root=None,
        artifacts=store.location,
        **{"force": False, **fields},
    )


def make(store: Store, config: FakeRun, pipe: Pipe | None = None, **fields: Any) -> Built:
    return build(request(store, config, **fields), ChildProgress(pipe or Pipe()))


def help_(store: Store, config: FakeRun) -> int:
    return make(store, config, only_parts=True).num_shards


def key_of(store: Store, items: int = ITEMS) -> str:
    return request(store, fake(items=items)).key


def contents(store: Store, items: int = ITEMS) -> bytes:
    """``content`` of the whole's manifest, as bytes, after a look at every file."""
    key = key_of(store, items)
    assert store.verify(STAGE, key) == []
    return json.dumps(store.manifest(STAGE, key)["content"], sort_keys=True).encode()


def no_shard_is_left(store: Store) -> bool:
    return not any(store.root.glob(f"{STAGE}-shard/*"))


def no_lock_is_held(store: Store) -> bool:
    stages_keys = [path.name.rsplit("-", 1) for path in (store.root / ".locks").iterdir()]
    locks = [store.lock(*where) for where in stages_keys if len(where[1]) == 20]
    is_free = all([lock.try_acquire() for lock in locks])
    for lock in locks:
        lock.release()
    return is_free and len(locks) > 1


@contextmanager
def held(store: Store, shard: Shard) -> Iterator[None]:
    """As if another process were at ``shard``."""
    lock = store.lock(*shard.place)
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
    make(alone, fake(shards=1))
    return alone


# ---------------------------------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, ITEMS, 3 * ITEMS])
def test_the_artifact_is_that_of_one_build(store: Store, whole: Store, count: int) -> None:
    """Also with more shards than items, some of which are empty then."""
    built = make(store, fake(count))
    assert (built.state, built.num_shards) == ("built", count)
    assert contents(store) == contents(whole)
    assert built.artifact is not None
    assert built.artifact.metrics == whole.require(STAGE, key_of(whole)).metrics
    assert built.artifact.run["shards"] == {"count": count, "hosts": {built.artifact.run["host"]: count}}
    assert no_shard_is_left(store)
    assert no_lock_is_held(store)
    assert make(store, fake(count)).state == "cached"


def test_shards_say_what_they_are_a_part_of(store: Store) -> None:
    assert help_(store, fake(4)) == 4
    shard = shards_of(STAGE, key_of(store), 4)[2]
    assert str(shard) == "shard 3 of 4"
    assert shard.place == ("collect-shard", key_of(store)[:12] + "00030004")
    artifact = store.require(*shard.place)
    assert (artifact.content["part"], artifact.content["whole"]) == ([2, 4], key_of(store))
    assert sorted(artifact.content["files"]) == ["5.txt", "6.txt", "7.txt"]
    assert artifact.metrics == {}
    assert is_shard_of(shard.place, STAGE, key_of(store))
    assert not is_shard_of(shard.place, "combine", key_of(store))


def test_one_bar_goes_over_all_shards(store: Store) -> None:
    pipe = Pipe()
    make(store, fake(4), pipe)
    bar = [line for line in pipe.bar() if line[0] == "in 4 shards"]
    assert (bar[0], bar[-1]) == (("in 4 shards", 0, ITEMS), ("in 4 shards", ITEMS, ITEMS))
    assert [line[1] for line in bar] == sorted(line[1] for line in bar)
    assert pipe.bar()[-1] == ("putting 4 shards together", ITEMS, ITEMS)
    values = [message["values"] for message in pipe.sent if message["event"] == "progress"]
    assert any(entry.get("shard") == 4 and "loss" in entry for entry in values)


def test_warnings_of_the_shards_stand_once_in_order(store: Store) -> None:
    built = make(store, fake(3, mischief="noise", at_item=-1))
    expected = ("part 0 was noisy", "this was noisy", "part 1 was noisy", "part 2 was noisy")
    assert built.warnings == expected
    assert store.manifest(STAGE, key_of(store))["run"]["warnings"] == list(expected)


def test_an_error_keeps_what_is_finished(store: Store, whole: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        make(store, fake(4, mischief="input", at_item=7))
    assert no_lock_is_held(store)
    assert status(fake(4), store, TABLE)[0].state == "partial"
    pipe = Pipe()
    diary = tmp_path / "diary"
    built = make(store, fake(4, diary=str(diary)), pipe)
    assert "continuing: 2 of 4 shards are there" in pipe.texts()
    assert [int(line.split()[1]) for line in diary.read_text().splitlines()] == [7, 8, 9, 10]
    assert built.state == "resumed"
    assert built.artifact is not None
    assert built.artifact.run["resumed"]
    assert contents(store) == contents(whole)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_change_of_the_count_keeps_what_is_finished(store: Store, whole: Store, tmp_path: Path, count: int) -> None:
    """Published shards and the begun one: each of the 7 finished items is made once."""
    with pytest.raises(DataError):
        make(store, fake(4, mischief="input", at_item=7))
    diary = tmp_path / "diary"
    built = make(store, fake(count, diary=str(diary)))
    assert [int(line.split()[1]) for line in diary.read_text().splitlines()] == [7, 8, 9, 10]
    assert built.state == "resumed"
    assert contents(store) == contents(whole)
    assert no_shard_is_left(store)


def test_unfinished_work_of_one_build_is_continued_in_shards(store: Store, whole: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        make(store, fake(1, mischief="input", at_item=6))
    diary = tmp_path / "diary"
    with pytest.raises(DataError):
        make(store, fake(4, diary=str(diary), mischief="input", at_item=9))
    begun = shards_of(STAGE, key_of(store), 4)[2]
    assert sorted(store.require(*begun.place).content["files"]) == ["6.txt", "7.txt"], "what was lent is not kept twice"
    make(store, fake(4, diary=str(diary)))
    assert [int(line.split()[1]) for line in diary.read_text().splitlines()] == [6, 7, 8, 9, 10]
    assert contents(store) == contents(whole)


def test_a_copy_where_no_links_can_be_made(
    store: Store, whole: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(DataError):
        make(store, fake(1, mischief="input", at_item=6))
    make(store, fake(4))
    assert contents(store) == contents(whole)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("b/one", ".tmp-x", "manifest.json"):
        (tmp_path / "a" / name).write_text(name)
    link_files(tmp_path / "a", tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").rglob("*")] == ["b", "one"]


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_damaged_shard_is_named_set_aside_and_built_again(store: Store, whole: Store, damage: str) -> None:
    help_(store, fake(4))
    shard = shards_of(STAGE, key_of(store), 4)[1]
    file = store.path(*shard.place) / "3.txt"
    file.unlink() if damage == "lost" else file.write_text("item X\n")
    built = make(store, fake(4))
    assert len(built.warnings) == 1
    assert built.warnings[0].startswith(f"damaged artifact: {file}")
    assert f".damaged-{shard.place[1]}-0, building it again" in built.warnings[0]
    assert contents(store) == contents(whole)


def test_a_shard_of_another_artifact_under_our_key_is_not_taken(store: Store, whole: Store) -> None:
    help_(store, fake(4))
    shard = shards_of(STAGE, key_of(store), 4)[1]
    path = store.path(*shard.place) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["content"]["whole"] = key_of(store)[:12] + "0" * 8
    path.write_text(json.dumps(manifest))
    built = make(store, fake(4))
    assert "is a shard of another artifact" in built.warnings[0]
    assert contents(store) == contents(whole)


def test_a_damaged_whole_is_set_aside_and_built_again(store: Store, whole: Store) -> None:
    make(store, fake(4))
    (store.path(STAGE, key_of(store)) / "3.txt").unlink()
    built = make(store, fake(4))
    assert (built.state, built.num_shards) == ("built", 4)
    assert "3.txt is missing; set aside as" in built.warnings[0]
    assert contents(store) == contents(whole)


# ---------------------------------------------------------------------------------------------------------------------
# Force
# ---------------------------------------------------------------------------------------------------------------------


def test_force_builds_every_item_anew(store: Store, whole: Store, tmp_path: Path) -> None:
    """Whatever is there: the artifact, finished shards, unfinished work of the whole."""
    make(store, fake(4))
    key = key_of(store)
    (store.path(STAGE, key) / "0.txt").write_text("item X\n")
    for shard in (*shards_of(STAGE, key, 4)[:2], *shards_of(STAGE, key, 3)[1:]):
        work, _ = store.work_dir(*shard.place)
        (work / "0.txt").write_text("doubtful")
        store.publish(*shard.place, content={"whole": key, "mask_supervision": []}, run={"warnings": []})
    work, _ = store.work_dir(STAGE, key)
    (work / "10.txt").write_text("doubtful")
    diary = tmp_path / "diary"
    built = make(store, fake(4, diary=str(diary)), force=True)
    assert built.state == "built"
    assert [int(line.split()[1]) for line in diary.read_text().splitlines()] == list(range(ITEMS))
    assert contents(store) == contents(whole)
    assert no_shard_is_left(store)


def test_the_old_artifact_stays_until_a_forced_build_replaces_it(store: Store, whole: Store) -> None:
    make(store, fake(4))
    old = store.require(STAGE, key_of(store))
    assert help_(store, fake(4)) == 0, "it is there"
    with pytest.raises(DataError):
        make(store, fake(4, mischief="input", at_item=7), force=True)
    assert store.require(STAGE, key_of(store)) == old
    assert is_ordered(store, old)
    assert make(store, fake(4)).state == "cached"
    assert help_(store, fake(4)) == 2, "helpers know that it is to be built again"
    assert store.require(STAGE, key_of(store)) == old
    make(store, fake(4), force=True)
    new = store.require(STAGE, key_of(store))
    assert new.run != old.run
    assert not is_ordered(store, new)
    assert contents(store) == contents(whole)
    assert no_shard_is_left(store)
    place_order(store, STAGE, old.key, old)
    assert help_(store, fake(4)) == 0, "an order for an artifact that was replaced meanwhile"


def test_a_forced_build_takes_nothing_from_before_out_of_the_cache_of_another_machine(
    store: Store, whole: Store, tmp_path: Path
) -> None:
    """Such as a shard that comes back after the discarding, unfinished work of one, and of the whole."""
    with pytest.raises(DataError):
        make(store, fake(4, mischief="input", at_item=0), force=True)
    first, second, third, _ = shards_of(STAGE, key_of(store), 4)
    for place in (first.place, second.place, (STAGE, key_of(store))):
        work, _ = store.work_dir(*place)
        for number in range(ITEMS):
            (work / f"{number}.txt").write_text("stale")
    store.publish(*first.place, content={"whole": first.whole, "mask_supervision": []}, run={"units": 2})
    assert help_(store, fake(4, mischief="input", at_item=-1)) == 4
    assert store.manifest(*third.place)["run"]["order"] == store.manifest(*first.place)["run"]["order"]
    built = make(store, fake(4))
    assert built.num_shards == 0
    assert contents(store) == contents(whole)
    assert no_shard_is_left(store)


def test_two_forced_builds_at_once_both_end(store: Store, whole: Store, tmp_path: Path) -> None:
    make(store, fake(4))
    before = store.require(STAGE, key_of(store)).run
    results: list[Built] = []
    config = fake(4, item_s=0.02)
    threads = [
        threading.Thread(target=lambda: results.append(make(Store(store.root), config, force=True))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(60)
    assert len(results) == 3
    assert all(built.artifact is not None and built.artifact.run != before for built in results)
    assert contents(store) == contents(whole)
    assert no_shard_is_left(store)
    assert no_lock_is_held(store)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_helper_takes_what_is_free_and_waits_for_nobody(store: Store, whole: Store) -> None:
    shards = shards_of(STAGE, key_of(store), 4)
    with held(store, shards[1]):
        started = time.monotonic()
        built = make(store, fake(4), only_parts=True)
        assert time.monotonic() - started < 5
        assert (built.artifact, built.state, built.num_shards) == (None, "helped", 3)
        assert help_(store, fake(4)) == 0
    assert store.lookup(STAGE, key_of(store)) is None
    assert [shard.part.index for shard in existing_shards(store, STAGE, key_of(store))] == [0, 2, 3]
    built = make(store, fake(4))
    assert (built.state, built.num_shards) == ("resumed", 1)
    assert contents(store) == contents(whole)


def test_a_build_waits_for_a_shard_that_another_holds_and_says_so_once(store: Store, whole: Store) -> None:
    shard = shards_of(STAGE, key_of(store), 4)[2]
    pipe = Pipe()
    done: list[Built] = []
    thread = threading.Thread(target=lambda: done.append(make(Store(store.root), fake(4), pipe)))
    with held(store, shard):
        thread.start()
        wait_until(lambda: any(text.startswith("waiting: ") for text in pipe.texts()))
        time.sleep(1.2)
        assert not done
        assert store.lookup(STAGE, key_of(store)) is None
    thread.join(30)
    waiting = [text for text in pipe.texts() if text.startswith("waiting: ")]
    assert len(waiting) == 1
    assert waiting[0].startswith(f"waiting: process {os.getpid()} on ")
    assert waiting[0].endswith(" builds shard 3 of 4")
    assert (done[0].state, done[0].num_shards) == ("built", 4), "nobody finished it, so it was taken over"
    assert contents(store) == contents(whole)


def test_whoever_comes_second_finds_it_put_together(store: Store) -> None:
    """The lock of the whole is held while another process puts the shards together."""
    key = key_of(store)
    lock = store.lock(STAGE, key)
    pipe = Pipe()
    done: list[Built] = []
    thread = threading.Thread(target=lambda: done.append(make(Store(store.root), fake(2, item_s=0.1), pipe)))
    thread.start()
    wait_until(lambda: any(store.root.glob(f"{STAGE}-shard/.work-*/*.txt")))
    assert lock.try_acquire()
    wait_until(lambda: any(text.endswith("puts the shards together") for text in pipe.texts()))
    store.work_dir(STAGE, key)
    other = store.publish(STAGE, key, content={"mask_supervision": []}, run={"metrics": {"by": "another"}})
    lock.release()
    thread.join(30)
    assert (done[0].state, done[0].artifact) == ("built", other)


def test_a_helper_that_ends_too_late_leaves_nothing(store: Store) -> None:
    """One build of the whole, not in shards, overtook it."""
    done: list[Built] = []
    config = fake(2, item_s=0.15)
    thread = threading.Thread(target=lambda: done.append(make(Store(store.root), config, only_parts=True)))
    thread.start()
    wait_until(lambda: any(store.root.glob(f"{STAGE}-shard/.work-*/*.txt")))
    make(store, fake(1))
    assert not no_shard_is_left(store), "the helper is at it still"
    thread.join(30)
    assert done[0].num_shards == 1
    assert no_shard_is_left(store)


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


PROCESS = """
import sys
from pathlib import Path
from fake_stages.table import TABLE, FakeRun
from pipeline.engine.run import run_stage
from pipeline.store.artifacts import Store
outcome = run_stage("collect", FakeRun.model_validate_json(sys.argv[1]), Store(Path(sys.argv[2])), table=TABLE)
print(outcome.stages[0].state)
"""


def start(store: Store, config: FakeRun) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, config.model_dump_json(), str(store.root)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_commands_share_the_shards_and_each_is_built_once(store: Store, whole: Store, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    config = fake(6, diary=str(diary), item_s=0.4)
    processes = [start(store, config) for _ in range(2)]
    states = sorted(process.communicate(timeout=100)[0].strip() for process in processes)
    assert states[0] == "built"
    assert set(states) <= {"built", "resumed"}, "resumed: it began when a shard was there"
    lines = [line.split() for line in diary.read_text().splitlines()]
    assert sorted(int(number) for _, number in lines) == list(range(ITEMS))
    assert len(Counter(pid for pid, _ in lines)) == 2
    assert contents(store) == contents(whole)
    assert no_shard_is_left(store)


def test_kill_9_of_one_leaves_the_rest_to_the_other(store: Store, whole: Store, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    config = fake(3, diary=str(diary), item_s=0.4)
    processes = [start(store, config) for _ in range(2)]
    try:
        wait_until(lambda: diary.exists() and len({line.split()[0] for line in diary.read_text().splitlines()}) == 2)
        victim = diary.read_text().split()[0]
        os.kill(int(victim), signal.SIGKILL)  # the stage's process; its command fails then
        answers = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = sorted(process.returncode for process in processes)
    assert codes == [0, 1]
    assert any("was ended by SIGKILL" in errors for _, errors in answers)
    made = [int(line.split()[1]) for line in diary.read_text().splitlines()]
    assert sorted(made) == list(range(ITEMS)), "the finished items of the dead process's shard are continued"
    assert contents(store) == contents(whole)
    assert no_shard_is_left(store)
    assert no_lock_is_held(store)


# ---------------------------------------------------------------------------------------------------------------------
# The runner
# ---------------------------------------------------------------------------------------------------------------------


def test_recruits_are_asked_around_a_sharded_build_only(store: Store, tmp_path: Path) -> None:
    asked: list[str] = []

    @contextmanager
    def recruit(stage: str) -> Iterator[None]:
        asked.append(f"{stage} begins")
        yield
        asked.append(f"{stage} ends")

    config = fake(3)
    outcome = run_pipeline(config, store, recruit=recruit, table=TABLE)
    assert [stage.state for stage in outcome.stages] == ["built"] * 3
    assert asked == ["collect begins", "collect ends"], "combine cannot be made in shards"
    run_pipeline(config, store, recruit=recruit, table=TABLE)
    assert len(asked) == 2, "it is cached"
    run_stage(STAGE, config, store, recruit=recruit, force=True, table=TABLE)
    assert len(asked) == 4
    run_pipeline(fake(1, items=5), store, recruit=recruit, table=TABLE)
    assert len(asked) == 4
    with pytest.raises(EnvironmentFailure):
        run_stage(STAGE, fake(3, items=6, mischief="kill"), store, recruit=recruit, table=TABLE)


def test_help_with_a_stage(store: Store, whole: Store) -> None:
    notes = Notes()
    assert help_with(STAGE, fake(4), store, listener=notes, table=TABLE) == 4
    assert [(outcome.state, outcome.path) for outcome in notes.outcomes] == [
        ("helped", store.path(STAGE, key_of(store)))
    ]
    assert not (store.root / "runs").exists()
    assert status(fake(4), store, TABLE)[0].state == "partial"
    outcome = run_stage(STAGE, fake(4), store, table=TABLE)
    assert outcome.stages[0].state == "resumed"
    assert contents(store) == contents(whole)
    assert help_with(STAGE, fake(4), store, listener=notes, table=TABLE) == 0
    assert len(notes.outcomes) == 1, "no process is started for an artifact that is there"
    assert status(fake(4), store, TABLE)[0].state == "cached"


def test_help_with_what_cannot_be_helped(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"collect is not built in shards.*runtime.shards must be above 1"):
        help_with(STAGE, fake(1), store, table=TABLE)
    with pytest.raises(ConfigError, match=r"combine is not built in shards.*one of collect"):
        help_with("combine", fake(4), store, table=TABLE)
    spec = TABLE.spec("combine")
    monkeypatch.setitem(spec.__dict__, "shard_units", lambda call: 1)
    with pytest.raises(
        MissingArtifactError, match=r"rests on the artifact of collect.*wsss run CONFIG --until collect"
    ):
        help_with("combine", fake(4), store, table=TABLE)
    notes = Notes()
    with pytest.raises(DataError):
        help_with(STAGE, fake(4, mischief="input"), store, listener=notes, table=TABLE)
    assert [outcome.state for outcome in notes.outcomes] == ["failed"]


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


def test_attention_and_masks_in_shards_are_those_of_one_build(tmp_path: Path) -> None:
    """Six shards: of four files of attention, so that two are empty, and of eleven masks."""
    config = load_model(RunConfig, find_config("demo"), TINY)
    sharded = load_model(RunConfig, find_config("demo"), [*TINY, "runtime.shards=6"])
    one, many = Store(tmp_path / "one"), Store(tmp_path / "many")
    with stages_here():
        run_pipeline(config, one, until="train_classifier")
        shutil.copytree(one.root, many.root)
        run_pipeline(config, one, until="make_masks")
        outcome = run_pipeline(sharded, many, until="make_masks")
    assert [stage.state for stage in outcome.stages] == ["cached", "cached", "built", "built"]
    for stage in outcome.stages[2:]:
        assert stage.key is not None
        here, there = (store.require(stage.stage, stage.key) for store in (one, many))
        assert json.dumps(dict(here.content), sort_keys=True) == json.dumps(dict(there.content), sort_keys=True)
        assert here.metrics == there.metrics == stage.metrics
        assert here.warnings == there.warnings
        assert many.verify(stage.stage, stage.key) == []
        assert there.run["shards"]["count"] == 6
    assert not list(many.root.glob("*-shard/*"))
