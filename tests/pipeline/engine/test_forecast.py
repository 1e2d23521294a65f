"""Last times come from this machine's own whole builds; a full disk refuses a run before it leaves a trace."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main as cli
from pipeline.engine.forecast import MIN_FREE_BYTES, check_space, last_time
from pipeline.store.artifacts import Store
from stages.errors import EnvironmentFailure
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def publish(store: Store, number: int, seconds: float, **run: Any) -> None:
    """An artifact that was built ``number`` hours after the first one, on the host "here"."""
    key = f"{number:020x}"
    with store.lock("make_masks", key):
        store.work_dir("make_masks", key)
        described = {"host": "here", "seconds": seconds, "runtime": {"device": "cpu"}, **run}
        content = {"stage": "make_masks", "key": key, "version": 1, "config": {}, "inputs": {}, "mask_supervision": []}
        manifest = store.publish("make_masks", key, content=content, run=described).path / "manifest.json"
    os.utime(manifest, (3600 * number, 3600 * number))


def test_an_empty_store_knows_no_time_and_looking_writes_nothing(store: Store) -> None:
    assert last_time(store, "make_masks") is None
    assert not store.root.exists()


def test_the_newest_whole_build_of_this_machine_and_device_counts(store: Store) -> None:
    publish(store, 1, 10.0)
    publish(store, 2, 20.0)
    publish(store, 3, 3.0, resumed=True)
    publish(store, 4, 4.0, host="elsewhere")
    publish(store, 5, 5.0, runtime={"device": "cuda"})
    assert last_time(store, "make_masks", "cpu", host="here") == 20.0
    assert last_time(store, "make_masks", host="here") == 5.0, "any device"
    assert last_time(store, "make_masks", "cpu", host="elsewhere") == 4.0
    assert last_time(store, "make_masks", "cpu") is None, "this machine has another name"
    assert last_time(store, "evaluate", host="here") is None


def test_a_manifest_that_does_not_read_back_is_passed_over(store: Store) -> None:
    publish(store, 1, 10.0)
    publish(store, 2, 20.0)
    (store.path("make_masks", f"{2:020x}") / "manifest.json").write_text("{")
    assert last_time(store, "make_masks", host="here") == 10.0


def set_free(monkeypatch: pytest.MonkeyPatch, free: float) -> list[Path]:
    """Let every disk have ``free`` bytes; the folders that are asked for."""
    asked: list[Path] = []

    def usage(folder: Path) -> Usage:
        asked.append(Path(folder))
        return Usage(2**50, 0, int(free))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return asked


def test_just_enough_is_enough_and_a_byte_less_is_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set_free(monkeypatch, MIN_FREE_BYTES)
    check_space(store)
    assert asked == [store.root.parent], "the store is not there yet: the folder that it will be made in"
    set_free(monkeypatch, MIN_FREE_BYTES - 1)
    with pytest.raises(EnvironmentFailure) as caught:
        check_space(store)
    assert caught.value.message == (
        f"{store.root.parent}: 200 MB free, at least 200 MB are needed; free some space (wsss artifacts prune) or "
        "choose another disk with --artifacts DIR"
    )


def test_a_run_on_a_full_disk_ends_with_4_before_it_leaves_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "tiny.yaml").write_text(tiny_yaml())
    set_free(monkeypatch, 3e7)
    for words in (["run", "tiny.yaml", "--engine", "local"], ["stage", "prepare_data", "tiny.yaml"]):
        assert cli.main([*words, "--json"]) == 4
        error = json.loads(capsys.readouterr().out)["error"]
        assert (error["code"], "29 MB free" in error["message"]) == (4, True)
    assert not list(tmp_path.glob("artifacts/*/*"))
