"""The process in which a stage runs: ``python -m pipeline.child``.

Reads one JSON line from stdin, the request; stdin then stays open for as long as the parent lives, and its end kills
this process and everything it started.  Writes JSON lines to stdout: progress, log, and at the end result or error.
Whatever else is printed goes to stderr.  Holds the artifact's lock while it works.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter

from pipeline.failures import deliberate, to_message
from pipeline.provenance import describe_machine
from pipeline.stage_table import StageCall, StageSpec, StageTable
from pipeline.store import Artifact, Store
from stages.contracts import StageResult
from stages.errors import EnvironmentFailure

MIN_FREE_BYTES = 200 * 2**20
"""A stage does not start on a disk with less."""

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
    artifacts: Path
    force: bool


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
        self._state["values"] |= {name: _plain(float(value)) for name, value in values.items()}
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

    def flush(self) -> None:
        """Send the last state if it was held back."""
        if not self._is_sent:
            self._events.send("progress", **self._state)
            self._sent_at = time.monotonic()
            self._is_sent = True


@dataclass(frozen=True)
class Built:
    """What became of the request."""

    artifact: Artifact
    state: str
    """built, resumed, or cached when another process had built it meanwhile."""
    seconds: float
    warnings: tuple[str, ...]


def main() -> int:
    """Answer one request; the exit code says only whether there was an error, the lines say which."""
    descriptor = os.dup(1)
    os.dup2(2, 1)
    events = Events(descriptor)
    faulthandler.enable()
    request = TypeAdapter(CheckRequest | Request).validate_json(sys.stdin.buffer.readline())
    _die_with_parent()
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
    built = build(request, progress)
    return {
        "state": built.state,
        "path": str(built.artifact.path),
        "seconds": built.seconds,
        "metrics": built.artifact.metrics,
        "warnings": list(built.warnings),
    }


def build(request: Request, progress: ChildProgress) -> Built:
    """Build the artifact under its lock, or find that another process has built it meanwhile."""
    started = time.monotonic()
    store = Store(request.artifacts)
    stage, key = request.stage, request.key
    with store.lock(stage, key, waiting=lambda holder: progress.info(f"waiting: {holder} builds {stage} {key}")):
        damage: list[str] = []
        artifact = store.lookup(stage, key, damaged=damage.append)
        if artifact is not None and not request.force:
            return Built(artifact, "cached", time.monotonic() - started, artifact.warnings)
        if damage:
            aside = store.set_aside(stage, key)
            progress.warn(f"damaged artifact: {damage[0]}; set aside as {aside}, building it again")
        _check_free_space(store.root)
        work, is_resumed = store.work_dir(stage, key, fresh=request.force)
        if is_resumed:
            progress.info(f"continuing the unfinished work in {work}")
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        result = _call_stage(request, store, work, progress)
        seconds = time.monotonic() - started
        artifact = store.publish(
            stage,
            key,
            content=request.content | {"mask_supervision": sorted(result.mask_supervision)},
            run={
                "started": begun,
                "seconds": round(seconds, 3),
                "resumed": is_resumed,
                "runtime": request.run.get("runtime"),
                "metrics": _plain(result.metrics),
                "warnings": progress.warnings,
                **describe_machine(),
            },
        )
        return Built(artifact, "resumed" if is_resumed else "built", seconds, tuple(progress.warnings))


def _call_stage(request: Request, store: Store, work: Path, progress: ChildProgress) -> StageResult:
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
    return spec.function()(**spec.arguments(call), out=work, progress=progress, runtime=getattr(run, "runtime", None))


def load_table(location: str) -> StageTable:
    """The stage table at ``module:NAME``."""
    module, _, name = location.partition(":")
    return getattr(importlib.import_module(module), name)


def _check_free_space(root: Path) -> None:
    free = shutil.disk_usage(root).free
    if free < MIN_FREE_BYTES:
        raise EnvironmentFailure(
            f"{root}: {free / 2**20:.0f} MB free, at least {MIN_FREE_BYTES / 2**20:.0f} MB are needed; "
            "free some space (wsss artifacts prune) or choose another disk with --artifacts DIR"
        )


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON is any
    """``value`` as strict JSON: numpy scalars become numbers, nan and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _die_with_parent() -> None:
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
