"""What happens inside the stage's process: resume, damage, force, errors; called here without the process."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_stages.table import TABLE, FakeRun

from pipeline.engine import child
from pipeline.engine.failures import InternalFailure, deliberate, from_message, to_message
from pipeline.engine.plan import plan_run
from pipeline.engine.request import ChildProgress, Events, Request
from pipeline.store.artifacts import Store
from stages.errors import DataError, EnvironmentFailure, MissingArtifactError, WsssError


class Pipe(Events):
    """Events that are kept instead of sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, event: str, **fields: object) -> None:
        self.sent.append({"event": event, **fields})


def request(store: Store, stage: str = "collect", *, force: bool = False, **run: Any) -> Request:
    plan = plan_run(FakeRun.model_validate(run), store.digest_cache, TABLE)
    return Request(
        table=TABLE.location,
        run=plan.run.model_dump(mode="json"),
        stage=stage,
        key=plan.keys[stage],
        content=dict(plan.contents[stage]),
        upstream={name: plan.keys[name] for name in plan.upstream(stage)},
        data_root=plan.data.root,
        artifacts=store.location,
        force=force,
    )


def build(asked: Request, progress: ChildProgress) -> Any:
    """What the child answers, and the artifact."""
    answer = child.answer_stage(asked, progress)
    artifact = Store(Path(asked.artifacts)).require(asked.stage, asked.key)
    return SimpleNamespace(state=answer["state"], warnings=tuple(answer["warnings"]), artifact=artifact)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def texts(events: Pipe) -> list[str]:
    return [message["text"] for message in events.sent if message["event"] in ("info", "warn")]


def test_builds_then_reuses(store: Store) -> None:
    built = build(request(store), ChildProgress(Pipe()))
    again = build(request(store), ChildProgress(Pipe()))
    assert (built.state, again.state) == ("built", "cached")
    assert built.artifact == again.artifact
    assert sorted(path.name for path in built.artifact.path.iterdir()) == ["0.txt", "1.txt", "2.txt", "manifest.json"]
    assert built.artifact.content["version"] == 3
    assert built.artifact.content["config"] == {"items": 3, "supervised": []}
    assert built.artifact.metrics == {"collect.items": 3, "collect.nan": None}
    assert built.artifact.run["packages"]["numpy"]


def test_work_is_kept_after_an_error_and_continued(store: Store) -> None:
    with pytest.raises(DataError, match=r"two images are damaged\n  - a.jpg"):
        build(request(store, runtime={"mischief": "input", "at_item": 2}), ChildProgress(Pipe()))
    key = request(store).key
    assert store.lookup("collect", key) is None
    kept = {path.name: path.stat().st_mtime_ns for path in store.work_path("collect", key).glob("*.txt")}
    assert sorted(kept) == ["0.txt", "1.txt"]
    events = Pipe()
    resumed = build(request(store), ChildProgress(events))
    assert resumed.state == "resumed"
    assert texts(events) == [f"continuing the unfinished work in {store.work_path('collect', key)}"]
    assert (resumed.artifact.path / "0.txt").stat().st_mtime_ns == kept["0.txt"]
    progress = [message for message in events.sent if message["event"] == "step"]
    assert (progress[0]["done"], progress[-1]["done"], progress[-1]["total"]) == (2, 3, 3)
    assert progress[-1]["values"] == {"loss": pytest.approx(1 / 3)}
    fresh = Store(store.root.with_name("fresh"))
    build(request(fresh), ChildProgress(Pipe()))
    assert fresh.require("collect", key).content == resumed.artifact.content


def test_force_starts_anew_and_replaces(store: Store) -> None:
    first = build(request(store), ChildProgress(Pipe())).artifact
    (first.path / "stranger").write_text("x")
    work, _ = store.work_dir("collect", first.key)
    (work / "0.txt").write_text("doubtful work")
    forced = build(request(store, force=True), ChildProgress(Pipe()))
    assert forced.state == "built"
    assert (forced.artifact.path / "0.txt").read_text() == "item 0\n"
    assert not (forced.artifact.path / "stranger").exists()


def test_damaged_artifact_is_named_set_aside_and_rebuilt(store: Store) -> None:
    path = build(request(store), ChildProgress(Pipe())).artifact.path
    (path / "1.txt").unlink()
    events = Pipe()
    rebuilt = build(request(store), ChildProgress(events))
    aside = path.with_name(f".damaged-{path.name}-0")
    expected = f"damaged artifact: {path}/1.txt is missing; set aside as {aside}, building it again"
    assert texts(events) == [expected]
    assert rebuilt.warnings == (expected,)
    assert rebuilt.state == "built"
    assert (aside / "0.txt").exists()


def test_stage_gets_its_inputs_the_data_root_and_who_to_leave_out(store: Store, tmp_path: Path) -> None:
    run = {"collect": {"supervised": ["b", "a"]}, "root": str(tmp_path)}
    for stage in ("collect", "combine"):
        build(request(store, stage, **run), ChildProgress(Pipe()))
    finished = build(request(store, "finish", **run), ChildProgress(Pipe())).artifact
    assert json.loads((finished.path / "finished.json").read_text()) == {"exclude": ["a", "b"], "combined": True}
    combined = store.require("combine", request(store, "combine", **run).key)
    assert json.loads((combined.path / "sub" / "combined.json").read_text())["root"] == str(tmp_path)


def test_missing_input_is_named(store: Store) -> None:
    with pytest.raises(MissingArtifactError, match="run the stage collect again"):
        build(request(store, "combine"), ChildProgress(Pipe()))


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (MemoryError(), EnvironmentFailure, "make_masks: out of memory; lower the batch size"),
        (OSError(errno.ENOSPC, "x", "/d/f"), EnvironmentFailure, "make_masks: /d/f: the disk is full; free some space"),
        (PermissionError(errno.EACCES, "x", "/d/f"), EnvironmentFailure, "make_masks: /d/f: permission denied"),
        (OSError(errno.EROFS, "x"), EnvironmentFailure, "make_masks: the file system is read-only"),
        (FileNotFoundError(errno.ENOENT, "gone", "/d/f"), InternalFailure, "make_masks failed: FileNotFoundError"),
        (
            IsADirectoryError(errno.EISDIR, "x", "/t", None, "/d"),
            EnvironmentFailure,
            "make_masks: /d: a folder stands where a file",
        ),
        (FileExistsError(errno.EEXIST, "x", "/d"), EnvironmentFailure, "make_masks: /d: a file stands where a folder"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), EnvironmentFailure, "make_masks: out of memory"),
        (KeyError("k"), InternalFailure, "make_masks failed: KeyError: 'k'"),
        (DataError("d", ["one", "two"]), DataError, "d"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), EnvironmentFailure, "make_masks: out of memory (CUDA)"),
    ],
)
def test_errors_keep_kind_text_and_problems_on_the_way(error: Exception, kind: type[WsssError], text: str) -> None:
    sent: Mapping[str, Any] = json.loads(json.dumps(to_message(deliberate(error, "make_masks"))))
    arrived = from_message(sent)
    assert type(arrived) is kind
    assert arrived.message.startswith(text)
    assert arrived.exit_code == kind.exit_code
    assert arrived.problems == (("one", "two") if kind is DataError else ())


def test_unforeseen_error_brings_its_traceback() -> None:
    with pytest.raises(KeyError) as caught:
        _ = {}["k"]
    arrived = from_message(to_message(deliberate(caught.value, "evaluate")))
    assert isinstance(arrived, InternalFailure)
    assert arrived.exit_code == 1
    assert "test_child.py" in arrived.trace
    assert arrived.trace.rstrip().endswith("KeyError: 'k'")


def test_progress_is_held_back_but_never_lost() -> None:
    events = Pipe()
    progress = ChildProgress(events)
    for number in range(1000):
        progress.step("train", number, 1000, unit="steps", loss=0.5)
    progress.step("score", 0, 1)
    counts = [message["done"] for message in events.sent if message["task"] == "train"]
    assert counts[-1] == 999
    assert len(counts) < 100
    assert events.sent[-1]["task"] == "score"


def test_events_are_whole_lines_and_a_gone_parent_is_no_error() -> None:
    reader, writer = os.pipe()
    events = Events(writer)
    events.send("info", text="two\nlines")
    assert json.loads(os.read(reader, 1000)) == {"event": "info", "text": "two\nlines"}
    os.close(reader)
    events.send("info", text="nobody hears this")
    os.close(writer)
    events.descriptor = -1
