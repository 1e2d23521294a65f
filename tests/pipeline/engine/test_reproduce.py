"""A run built once more: equal bytes are equal, and where they are not, the metrics and the environment speak."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_stages.table import TABLE, FakeRun

from pipeline.engine.outcomes import SilentListener
from pipeline.engine.records import RunRecord, find_run, read_runs
from pipeline.engine.reproduce import Reproduction, judge, reproduce
from pipeline.engine.run import Run
from pipeline.store.artifacts import Store
from pipeline.store.provenance import ENVIRONMENT, describe_machine
from stages.errors import ConfigError, EnvironmentFailure, InputError, MissingArtifactError

EVERY = ("collect", "combine", "finish")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def run(store: Store, **fields: Any) -> RunRecord:
    """Run the fake stages and give the record."""
    outcome = Run(FakeRun.model_validate(fields), store, table=TABLE).run_pipeline()
    return next(record for record in read_runs(store) if record.path == outcome.record)


def again(store: Store, record: RunRecord, stage: str | None = None) -> list[Reproduction]:
    beside = Store(store.root.parent / "beside")
    heard: list[Reproduction] = []
    found = reproduce(record, store, beside, stage=stage, listener=SilentListener(), done=heard.append, table=TABLE)
    assert heard == found
    return found


def republish(store: Store, stage: str, key: str, change: Callable[[Path, dict[str, Any]], None]) -> None:
    """Put another artifact under the same key, as another machine would have built it."""
    old = store.require(stage, key)
    with store.lock(stage, key):
        work, _ = store.work_dir(stage, key)
        for name in old.content["files"]:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes((old.path / name).read_bytes())
        description = dict(old.run)
        change(work, description)
        content = {name: value for name, value in old.content.items() if name != "files"}
        store.publish(stage, key, content=content, run=description)


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    """Every artifact's files with content and inode: that nothing was written over or replaced."""
    files = [path for stage in EVERY for path in (root / stage).rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_ino) for path in files}


def test_the_same_machine_gives_the_same_bytes_and_touches_nothing(store: Store) -> None:
    record = run(store)
    before = snapshot(store.root)
    found = again(store, record)
    assert [stage.stage for stage in found] == [*EVERY]
    assert [stage.num_files for stage in found] == [3, 1, 1]
    assert [dict(stage.files) for stage in found] == [{}, {}, {}]
    assert [dict(stage.environment) for stage in found] == [{}, {}, {}]
    assert found[0].metrics == {"collect.items": (3, 3), "collect.nan": (None, None)}
    assert judge(found, 0.0) == "equal"
    assert snapshot(store.root) == before
    built = Store(store.root.parent / "beside")
    paths = [each.path("collect", record.keys["collect"]) / "0.txt" for each in (store, built)]
    assert paths[0].stat().st_ino != paths[1].stat().st_ino  # really built again


def test_one_stage_is_built_of_the_old_inputs(store: Store) -> None:
    record = run(store)
    (found,) = again(store, record, "combine")
    assert (found.stage, found.key, dict(found.files)) == ("combine", record.keys["combine"], {})
    folders = sorted(path.name for path in (store.root.parent / "beside").iterdir() if not path.name.startswith("."))
    assert folders == ["collect", "combine"]


def test_what_another_machine_built_is_told_with_its_environment(store: Store) -> None:
    record = run(store)

    def elsewhere(work: Path, description: dict[str, Any]) -> None:
        (work / "0.txt").write_text("item 0, but for the last bit\n")
        (work / "more.txt").write_text("1")
        (work / "2.txt").unlink()
        description["threads"] = 64
        description["packages"] = {**description["packages"], "torch": "2.6.0"}
        description["metrics"] = {**description["metrics"], "collect.items": 3.02}

    republish(store, "collect", record.keys["collect"], elsewhere)
    (found,) = again(store, record, "collect")
    assert found.files == {"0.txt": "different", "2.txt": "new", "more.txt": "missing"}
    assert found.num_files == 4
    assert list(found.environment) == ["threads", "torch"]
    assert found.environment["threads"][0] == 64
    assert found.environment["torch"][0] == "2.6.0"
    assert found.metrics["collect.items"] == (3.02, 3)
    assert judge([found], 0.01) == "close"  # 0.02 of 3.02 is less than a hundredth
    assert judge([found], 0.001) == "different"


def test_bytes_without_metrics_are_different_until_scores_say_otherwise() -> None:
    training = Reproduction("train", "k", 1.0, {}, {"weights": "different"}, 2, {})
    scores = Reproduction("evaluate", "k", 1.0, {}, {"metrics.json": "different"}, 1, {"miou": (0.500, 0.508)})
    assert judge([training], 1.0) == "different"
    before = Reproduction("prepare", "k", 1.0, {}, {}, 9, {"images": (6, 6)})
    assert judge([before, training], 1.0) == "different", "how many images there are says nothing of the weights"
    assert judge([training, scores], 0.01) == "close"
    assert judge([training, scores], 0.005) == "different"
    assert judge([replace(scores, metrics={"miou": (0.5, None)})], 1.0) == "different"
    assert judge([replace(scores, metrics={"miou": (None, None)})], 0.0) == "close"


def test_other_data_is_no_reproduction(store: Store) -> None:
    record = run(store, digest="before")
    text = json.loads(record.path.read_text())
    text["config"]["digest"] = "after"
    record.path.write_text(json.dumps(text))
    with pytest.raises(EnvironmentFailure, match="cannot be built again here") as error:
        again(store, find_run(store, "last"))
    assert error.value.problems == ("collect: digest", "combine: inputs", "finish: inputs")


def test_what_is_not_there_is_said(store: Store) -> None:
    record = run(store)
    with pytest.raises(ConfigError):
        again(store, record, "nothing")
    store.set_aside("combine", record.keys["combine"])
    with pytest.raises(MissingArtifactError, match="combine"):
        again(store, record, "combine")
    assert [stage.stage for stage in again(store, record)] == ["collect"]
    store.set_aside("collect", record.keys["collect"])
    with pytest.raises(MissingArtifactError, match="collect"):
        again(store, record)


def test_runs_are_found_by_the_beginning_of_their_name(store: Store) -> None:
    with pytest.raises(InputError, match="has no runs"):
        find_run(store, "last")
    first = run(store, name="demo")
    second = run(store, name="demo", combine={"factor": 2.0})
    other = run(store, name="other")
    assert find_run(store, "last").path == other.path
    assert find_run(store, "oth").path == other.path
    assert find_run(store, first.run_id).path == first.path
    assert find_run(store, second.path.stem).path == second.path
    with pytest.raises(InputError, match="'demo' means 2 runs") as error:
        find_run(store, "demo")
    assert error.value.problems == (f"{second.path.stem} (done)", f"{first.path.stem} (done)")
    with pytest.raises(InputError, match="no run 'dema'") as error:
        find_run(store, "dema")
    assert f"{other.path.stem} (done)" in error.value.problems
    with pytest.raises(InputError, match="no run ''"):
        find_run(store, "")


def test_the_environment_names_what_moves_the_last_bits() -> None:
    import torch

    found = describe_machine("cpu")
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["device"] == "cpu"
    assert any(name.startswith("torch's ") or "blas" in name for name in found["libraries"])
    assert set(ENVIRONMENT) <= found.keys()
