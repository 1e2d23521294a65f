"""What the process of a stage is asked, how it answers, and the call of the stage itself.

A request is one JSON line; the answer is JSON lines: ``step``, ``info``, ``warn``, and at the end ``result`` or
``error``.  The child and the ranks of a training share this.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pipeline.engine.building import to_plain
from pipeline.engine.failures import to_message
from pipeline.engine.stage_table import StageCall, StageSpec, StageTable
from pipeline.store.artifacts import Store
from stages.contracts import Part, Progress, StageResult
from stages.errors import WsssError

_STEP_EVERY_S = 0.1


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
    force: bool = False
    num_parts: int = 1
    part: str | None = None
    """Help another process: build ``3/8``, or ``any`` part that nobody holds, and publish nothing."""
    follows: bool = False
    """Help from the beginning to the end of that process's build, which then ends this one."""


class Events:
    """JSON lines to the parent, from any thread."""

    def __init__(self, descriptor: int) -> None:
        """Write to ``descriptor``."""
        self.descriptor = descriptor
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._close)

    def send(self, event: str, **fields: object) -> None:
        """Send one line; a parent that is gone is not an error here, its end ends this process anyway."""
        line = memoryview((json.dumps({"event": event, **fields}) + "\n").encode())
        with self._lock:
            while line:
                try:
                    line = line[os.write(self.descriptor, line) :]
                except OSError:
                    return

    def _close(self) -> None:
        # a forked worker that outlives this process must not keep the parent waiting for more lines
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class ChildProgress:
    """The Progress of a stage in a child: sends at most ten steps a second and the last, keeps the warnings."""

    def __init__(self, events: Events) -> None:
        """Send through ``events``."""
        self.warnings: list[str] = []
        self.events = events
        self._step: dict[str, Any] = {}
        self._sent_at = 0.0
        self._is_sent = True

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        """Say where ``task`` stands."""
        if is_new := [task, total, unit] != [self._step.get(name) for name in ("task", "total", "unit")]:
            self.flush()
        plain = {name: to_plain(float(value)) for name, value in values.items()}
        self._step = {"task": task, "done": done, "total": total, "unit": unit, "values": plain}
        self._is_sent = False
        if is_new or done >= total or time.monotonic() - self._sent_at >= _STEP_EVERY_S:
            self.flush()

    def info(self, text: str) -> None:
        """Say one line."""
        self.events.send("info", text=text)

    def warn(self, text: str) -> None:
        """Say one line and keep it for the manifest."""
        self.warnings.append(text)
        self.events.send("warn", text=text)

    def fail(self, error: WsssError) -> None:
        """Say how it ended, from any thread."""
        self.events.send("error", **to_message(error))

    def flush(self) -> None:
        """Send the last step if it was held back."""
        if not self._is_sent:
            self.events.send("step", **self._step)
            self._sent_at = time.monotonic()
            self._is_sent = True


def load_table(location: str) -> StageTable:
    """The stage table at ``module:NAME``."""
    module, _, name = location.partition(":")
    return getattr(importlib.import_module(module), name)


def prepare_call(request: Request, store: Store) -> tuple[StageSpec, Any, StageCall]:
    """The stage, the run and what the stage is called with; every artifact that it rests on must be there.

    Raises:
        MissingArtifactError: one of them is not.
    """
    table = load_table(request.table)
    run = table.run_type.model_validate(request.run)
    spec = table.spec(request.stage)
    inputs = spec.inputs(run)
    # of what lies further back the manifest is enough: whose masks were used
    artifacts = {
        name: (None if name in inputs else store.lookup(name, key)) or store.require(name, key)
        for name, key in request.upstream.items()
    }
    call = StageCall(
        run=run,
        inputs={name: artifacts[name].path for name in inputs},
        data_root=request.data_root,
        exclude=frozenset().union(*(artifact.mask_supervision for artifact in artifacts.values())),
    )
    return spec, run, call


def call_stage(
    spec: StageSpec, arguments: Mapping[str, Any], work: Path, progress: Progress, part: Part | None = None
) -> StageResult:
    """Call the stage's function in this process."""
    more = {} if part is None else {"part": part}
    return spec.function()(**arguments, **more, out=work, progress=progress)


def die_with(descriptor: int) -> None:
    """End this process and its whole group once ``descriptor`` becomes readable or ends; watched in a thread."""

    def watch() -> None:
        while os.read(descriptor, 4096):
            pass
        # DataLoader workers, pools and ranks are in this process's group; none of them may outlive the command
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
