"""Run records keep what runs need; pruning removes the rest, and nothing by default."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from fake_stages.table import TABLE, FakeRun

from pipeline.engine import records
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.records import RunRecord, find_run, load_named, prune, read_runs
from pipeline.store.artifacts import Store
from stages.errors import ConfigError, DamagedFileError, DataError, InputError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def finished(store: Store, factor: float, name: str = "fake") -> Plan:
    """A run whose three artifacts are in the store."""
    plan = plan_run(FakeRun.model_validate({"name": name, "combine": {"factor": factor}}), store.digest_cache, TABLE)
    with RunRecord.open(store, plan):
        for stage, key in plan.keys.items():
            if store.lookup(stage, key) is None:
                work, _ = store.work_dir(stage, key)
                (work / "x.txt").write_text("12345")
                store.publish(stage, key, content={"mask_supervision": []}, run={})
    return plan


def removed(store: Store, **options: object) -> list[str]:
    found = prune(store, dry_run=False, **options)
    assert not any(removal.path.exists() for removal in found)
    return sorted(removal.path.relative_to(store.root).as_posix() for removal in found)


def test_same_artifacts_under_the_same_name_are_one_record(store: Store) -> None:
    for _ in range(3):
        finished(store, 1.0)
    finished(store, 2.0)
    finished(store, 1.0, "other")
    records = read_runs(store)
    assert sorted((record.name, record.state) for record in records) == [("fake", "done")] * 2 + [("other", "done")]
    assert records[0].config["combine"] == {"factor": 1.0, "is_used": True}


def test_a_whole_name_comes_before_the_beginning_of_another(store: Store) -> None:
    finished(store, 1.0, "fake")
    finished(store, 2.0, "fake-2")
    assert find_run(store, "fake").config["combine"]["factor"] == 1.0
    assert find_run(store, "fake-2").config["combine"]["factor"] == 2.0
    with pytest.raises(InputError, match="'fak' means 2 runs"):
        find_run(store, "fak")


def test_last_is_the_newest_run_and_no_file(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(store, 1.0)
    assert find_run(store, "last").name == "fake"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last").write_text("name: mine")
    with pytest.raises(ConfigError, match=r"'last' means the newest run, and a file here .*; write \./last for"):
        load_named("last", [], str(store.root))


def test_records_say_how_the_run_ended(store: Store) -> None:
    plan = plan_run(FakeRun(), store.digest_cache, TABLE)
    with RunRecord.open(store, plan):
        assert [found.state for found in read_runs(store)] == ["running"]
    assert [found.state for found in read_runs(store)] == ["done"]
    with pytest.raises(DataError), RunRecord.open(store, plan):
        raise DataError("no")
    assert read_runs(store)[0].state == "failed"
    with pytest.raises(KeyboardInterrupt), RunRecord.open(store, plan) as record:
        raise KeyboardInterrupt
    assert {found.run_id: found.state for found in read_runs(store)}[record.run_id] == "interrupted"


def test_prune_keeps_what_runs_need_and_only_says_by_default(store: Store) -> None:
    plan = finished(store, 1.0)
    orphan, _ = store.work_dir("collect", "f" * 20)
    (orphan / "x").write_text("123")
    store.work_dir("finish", plan.keys["finish"])  # unfinished work of a kept run stays
    aside = store.set_aside("combine", plan.keys["combine"])
    expected = sorted([aside.relative_to(store.root).as_posix(), f"collect/.work-{'f' * 20}"])
    said = prune(store)
    assert sorted(removal.path.relative_to(store.root).as_posix() for removal in said) == expected
    assert {removal.reason: removal.size_bytes for removal in said if removal.path == orphan} == {
        "no kept run needs it": 3
    }
    assert orphan.exists()
    assert removed(store) == expected
    assert removed(store) == []
    assert store.lookup("collect", plan.keys["collect"]) is not None
    assert store.work_path("finish", plan.keys["finish"]).exists()


def test_prune_of_older_runs_keeps_what_the_newest_shares(store: Store) -> None:
    first = finished(store, 1.0)
    oldest = read_runs(store)[0]
    second = finished(store, 2.0)
    assert removed(store, keep=2) == []
    expected = [f"runs/{oldest.path.name}", *(f"{stage}/{first.keys[stage]}" for stage in ("combine", "finish"))]
    assert removed(store, keep=1) == sorted(expected)
    assert first.keys["collect"] == second.keys["collect"]
    assert all(store.lookup(stage, key) is not None for stage, key in second.keys.items())


def test_prune_keeps_runs_that_are_at_work_and_not_those_that_were_killed(store: Store) -> None:
    plan = finished(store, 1.0)
    with RunRecord.open(store, plan) as record:
        finished(store, 2.0)
        finished(store, 1.0)  # the same artifacts once more: a run at work keeps its record
        assert record.is_alive()
        removed(store, keep=0)
        assert all(store.lookup(stage, key) is not None for stage, key in plan.keys.items())
        assert [found.run_id for found in read_runs(store)] == [record.run_id]
        text = record.path.read_text()
    record.path.write_text(text)  # as a kill leaves it: running, and nobody holds the lock
    assert not read_runs(store)[0].is_alive()
    assert not list((store.root / ".locks").glob("run-*"))
    removed(store, keep=0)
    assert list(store.folders()) == []


def test_a_finished_run_is_done_whatever_is_wrong_with_the_records(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = finished(store, 1.0)
    (store.root / "runs" / "broken.json").write_text("{")
    with RunRecord.open(store, plan):
        pass

    def fill_the_disk(_: RunRecord, state: str) -> None:
        if state != "running":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunRecord, "_write", fill_the_disk)
    with pytest.raises(DataError), RunRecord.open(store, plan):
        raise DataError("the first error is the one to hear of")


def test_prune_leaves_alone_what_is_being_built(store: Store) -> None:
    work, _ = store.work_dir("collect", "e" * 20)
    (work / "x").write_text("1")
    lock = store.lock("collect", "e" * 20)
    assert lock.try_acquire()
    assert removed(store) == []
    assert work.exists()
    lock.release()
    assert removed(store) == [f"collect/.work-{'e' * 20}"]


def test_prune_refuses_when_a_record_does_not_read_back(store: Store) -> None:
    finished(store, 1.0)
    (store.root / "runs" / "broken.json").write_text("{")
    store.work_dir("collect", "e" * 20)
    with pytest.raises(DamagedFileError, match=r"broken\.json"):
        prune(store, dry_run=False)
    (store.root / "runs" / "broken.json").write_text("{}")
    with pytest.raises(DamagedFileError, match="is no run record"):
        prune(store, dry_run=False)
    with pytest.raises(ValueError, match="keep must be at least 0"):
        prune(store, keep=-1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"keys": ["collect"]}, "is no run record; remove it"),
        ({"keys": {"collect": 1}}, "is no run record; remove it"),
        ({"config": None}, "is no run record; remove it"),
        ({"started": 5}, "is no run record; remove it"),
        ({"started": float("nan")}, "NaN is no JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "is not readable JSON"),
        (b" " * (records.MAX_RECORD_BYTES + 1), "is no run record; remove it"),
        (None, "is no run record; remove it"),
    ],
)
def test_an_odd_record_is_one_line_and_keeps_everything(store: Store, change: object, expected: str) -> None:
    finished(store, 1.0)
    (path,) = (store.root / "runs").iterdir()
    odd = path.with_name("odd.json")
    if isinstance(change, dict):
        odd.write_text(json.dumps(json.loads(path.read_text()) | change))
    elif isinstance(change, bytes):
        odd.write_bytes(change)
    else:
        odd.mkdir()
    with pytest.raises(DamagedFileError) as caught:
        prune(store, keep=0, dry_run=False)
    assert str(odd) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    heard: list[str] = []
    assert [record.path for record in read_runs(store, damaged=heard.append)] == [path]
    assert heard == [caught.value.message]
    assert len(list(store.folders())) == 3


def test_records_that_go_while_they_are_read_are_left_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(store, 1.0)
    finished(store, 2.0)
    read_json = records.read_json

    def gone(path: Path) -> object:
        if json.loads(path.read_text())["config"]["combine"]["factor"] == 1.0:
            path.unlink()
        return read_json(path)

    monkeypatch.setattr(records, "read_json", gone)
    assert [record.config["combine"]["factor"] for record in read_runs(store)] == [2.0]


def test_prune_takes_nothing_that_a_run_found_which_began_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run begins when prune has decided already: it waits, or prune would see it."""
    plan = finished(store, 1.0)
    found: dict[str, object] = {}

    def begin() -> None:
        with RunRecord.open(store, plan):
            for stage, key in plan.keys.items():
                found[stage] = Store(store.root).lookup(stage, key)

    threads: list[threading.Thread] = []
    unneeded = records._unneeded

    def slow(*arguments: object) -> object:
        decided = unneeded(*arguments)
        threads.append(threading.Thread(target=begin))
        threads[0].start()
        time.sleep(0.5)
        return decided

    monkeypatch.setattr(records, "_unneeded", slow)
    prune(store, keep=0, dry_run=False)
    threads[0].join()
    assert list(found) == list(plan.keys)
    lost = [stage for stage, artifact in found.items() if artifact is not None and not artifact.path.exists()]
    assert lost == []


def test_two_prunes_at_once_are_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(store, 1.0)
    discard, inner = records.discard, []

    def beside(path: Path) -> None:
        if not inner:
            inner.append(())
            inner.extend(prune(store, keep=0, dry_run=False))
        discard(path)

    monkeypatch.setattr(records, "discard", beside)
    assert len(prune(store, keep=0, dry_run=False)) == 4, "a record and three artifacts"
    assert list(store.root.glob("[!.]*/*")) == []


def test_prune_of_an_artifact_behind_a_link_takes_the_link(store: Store, tmp_path: Path) -> None:
    plan = finished(store, 1.0)
    path, disk = store.path("collect", plan.keys["collect"]), tmp_path / "other disk"
    shutil.move(path, disk)
    path.symlink_to(disk)
    removals = {removal.path: removal for removal in prune(store, keep=0, dry_run=False)}
    assert path in removals
    assert not path.is_symlink()
    assert (disk / "x.txt").read_text() == "12345"
