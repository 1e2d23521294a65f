"""The process in which a stage runs: ``python -m pipeline.engine.child``.

Reads one JSON line from stdin, the request; stdin then stays open for as long as the parent lives, and its end kills
this process and everything it started.  Writes JSON lines to stdout: progress, log, and at the end result or error.
Whatever else is printed goes to stderr.  Holds the artifact's lock while it works.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter

from pipeline.engine.failures import deliberate, to_message
from pipeline.engine.making import Built, Job, build_alone, to_plain
from pipeline.engine.ranks import count_ranks, run_on_ranks
from pipeline.engine.shards import shard_count
from pipeline.engine.sharing import SharedBuild
from pipeline.engine.stage_table import StageCall, StageSpec, StageTable
from pipeline.store.artifacts import Store, open_store
from stages.contracts import Part, Progress, StageResult
from stages.errors import EnvironmentFailure, WsssError

_PROGRESS_EVERY_S = 0.1


class CheckRequest(BaseModel):
    """The table's check of a run, instead of a stage."""

    table: str
    run: dict[str, Any]
    check: Literal[True]


class Request(BaseModel):
    """One stage."""

    table: str
    run: dict[str, Any]
    stage: str
    key: str
    content: dict[str, Any]
    """What the key is the hash of."""
    upstream: dict[str, str]
    """Key of every stage that this one rests on."""
    data_root: Path | None
    artifacts: str
    """A folder or a URL."""
    force: bool
    only_parts: bool = False
    """Help another process: build the shards that nobody holds, wait for nobody, put nothing together."""


class Events:
    """JSON lines to the parent, from any thread."""

    def __init__(self, descriptor: int) -> None:
        """Write to ``descriptor``."""
        self._descriptor = descriptor
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._close)

    def send(self, event: str, **fields: object) -> None:
        """Send one line; a parent that is gone is not an error here, its end ends this process anyway."""
        line = memoryview((json.dumps({"event": event, **fields}) + "\n").encode())
        with self._lock:
            while line:
                try:
                    line = line[os.write(self._descriptor, line) :]
                except OSError:
                    return

    def _close(self) -> None:
        # a forked worker that outlives this process must not keep the parent waiting for more lines
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class ChildProgress:
    """The Progress of a stage in a child: sends at most ten updates a second, keeps the warnings."""

    def __init__(self, events: Events) -> None:
        """Send through ``events``."""
        self.warnings: list[str] = []
        self._events = events
        self._state: dict[str, Any] = {}
        self._sent_at = 0.0
        self._is_sent = True

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        """Say where ``task`` stands."""
        is_new = (task, total, unit) != tuple(self._state.get(name) for name in ("task", "total", "unit"))
        if is_new:
            self.flush()
        plain = {name: to_plain(float(value)) for name, value in values.items()}
        self._state = {"task": task, "total": total, "done": done, "unit": unit, "values": plain}
        self._is_sent = False
        if is_new or done >= total or time.monotonic() - self._sent_at >= _PROGRESS_EVERY_S:
            self.flush()

    def begin(self, task: str, *, total: int, done: int = 0, unit: str = "images") -> None:
        """Start a countable task."""
        self.flush()
        self._state = {"task": task, "total": total, "done": done, "unit": unit, "values": {}}
        self._is_sent = False
        self.flush()

    def advance(self, count: int = 1, **values: float) -> None:
        """Count finished units."""
        if not self._state:
            return
        self._state["done"] += count
        self._state["values"] |= {name: to_plain(float(value)) for name, value in values.items()}
        self._is_sent = False
        if time.monotonic() - self._sent_at >= _PROGRESS_EVERY_S or self._state["done"] >= self._state["total"]:
            self.flush()

    def info(self, text: str) -> None:
        """Say one line."""
        self._events.send("log", level="info", text=text)

    def warn(self, text: str) -> None:
        """Say one line and keep it for the manifest."""
        self.warnings.append(text)
        self._events.send("log", level="warning", text=text)

    def fail(self, error: WsssError) -> None:
        """Say how it ended, from any thread."""
        self._events.send("error", **to_message(error))

    def flush(self) -> None:
        """Send the last state if it was held back."""
        if not self._is_sent:
            self._events.send("progress", **self._state)
            self._sent_at = time.monotonic()
            self._is_sent = True


def main() -> int:
    """Answer one request; the exit code says only whether there was an error, the lines say which."""
    descriptor = os.dup(1)
    os.dup2(2, 1)
    events = Events(descriptor)
    faulthandler.enable()
    request = TypeAdapter(CheckRequest | Request).validate_json(sys.stdin.buffer.readline())
    die_with_parent()
    progress = ChildProgress(events)
    doing = request.stage if isinstance(request, Request) else "the check of the networks"
    try:
        answer = answer_stage(request, progress) if isinstance(request, Request) else answer_check(request, progress)
    except Exception as error:
        progress.flush()
        events.send("error", **to_message(deliberate(error, doing)))
        return 1
    progress.flush()
    events.send("result", **answer)
    return 0


def answer_check(request: CheckRequest, progress: ChildProgress) -> dict[str, Any]:
    """Run the table's check; nothing to report when it raises nothing."""
    table = load_table(request.table)
    table.check(table.run_type.model_validate(request.run), progress)
    return {}


def answer_stage(request: Request, progress: ChildProgress) -> dict[str, Any]:
    """Build the artifact and describe it."""
    started = time.monotonic()
    built = build(request, progress)
    path = open_store(request.artifacts).path(request.stage, request.key)
    return {
        "state": built.state,
        "path": str(path if built.artifact is None else built.artifact.path),
        "seconds": time.monotonic() - started,
        "metrics": {} if built.artifact is None else built.artifact.metrics,
        "warnings": list(built.warnings),
        "num_shards": built.num_shards,
    }


def build(request: Request, progress: ChildProgress) -> Built:
    """Build the artifact under its lock, or find that another process has built it meanwhile.

    With ``runtime.shards`` the work is shared with every process that does the same.
    """
    store = open_store(request.artifacts)
    store.on_lost = partial(end_at_once, progress)
    table = load_table(request.table)
    job = Job(
        stage=request.stage,
        key=request.key,
        content=request.content,
        runtime=request.run.get("runtime"),
        call=partial(call_stage, request, store),
        upstream=request.upstream,
    )
    count = shard_count(table.spec(request.stage), table.run_type.model_validate(request.run))
    if count == 1:
        return build_alone(job, store, progress, force=request.force)
    shared = SharedBuild(job, count, store, progress, units=lambda: _count_units(request, store))
    return shared.help() if request.only_parts else shared.build(force=request.force)


def end_at_once(progress: ChildProgress, error: EnvironmentFailure) -> None:
    """Another worker has the lock: say so, and end with everything that this process started."""
    progress.fail(error)
    os.killpg(0, signal.SIGKILL)


def _count_units(request: Request, store: Store) -> int:
    spec, _, call = _prepare(request, store)
    return 0 if spec.shard_units is None else spec.shard_units(call)


def call_stage(request: Request, store: Store, work: Path, progress: Progress, part: Part | None = None) -> StageResult:
    """Call the stage, in several processes where it is to train on several devices."""
    spec, run, call = _prepare(request, store)
    arguments, runtime = spec.arguments(call), getattr(run, "runtime", None)
    if part is not None:
        arguments = {**arguments, "part": part}
    if (num := count_ranks(arguments.get("config"), runtime)) > 1:
        return run_on_ranks(request, num, work, progress)
    return spec.function()(**arguments, out=work, progress=progress, runtime=runtime)


def _prepare(request: Request, store: Store) -> tuple[StageSpec, Any, StageCall]:
    """The stage, the run and what the stage is called with; every artifact that it rests on must be there."""
    table = load_table(request.table)
    run = table.run_type.model_validate(request.run)
    spec: StageSpec = table.spec(request.stage)
    artifacts = {name: store.require(name, key) for name, key in request.upstream.items()}
    call = StageCall(
        run=run,
        inputs={name: artifacts[name].path for name in spec.inputs(run)},
        data_root=request.data_root,
        exclude=frozenset().union(*(artifact.mask_supervision for artifact in artifacts.values())),
    )
    return spec, run, call


def load_table(location: str) -> StageTable:
    """The stage table at ``module:NAME``."""
    module, _, name = location.partition(":")
    return getattr(importlib.import_module(module), name)


def die_with_parent() -> None:
    """Watch stdin for its end in a thread; the stage itself and its workers get an empty stdin."""
    watched = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)

    def watch() -> None:
        while os.read(watched, 4096):
            pass
        # DataLoader workers, pools and ranks are in this process's group; none of them may outlive the command
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


if __name__ == "__main__":
    sys.exit(main())
