"""Start a stage in a process of its own, relay what it says, and see to it that it ends.

Writes nothing itself.  The child runs in a new session, so its whole group can be ended at once; it also watches the
pipe that this process holds, so it ends when this process is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline.engine.failures import InternalFailure, from_message
from stages.errors import EnvironmentFailure

PYTHON = (sys.executable, "-P")
"""How a process of ours begins: without -P a folder ``pipeline`` or ``stages`` of the user's, in the working directory,
would be imported in place of ours."""

GRACE_S = 5.0
"""Seconds between asking a child's process group to end and killing it."""

_TAIL_LINES = 40
_EXIT_S = 30.0


class ChildListener(Protocol):
    """Who hears what a child says."""

    def progress(self, task: str, total: int, done: int, unit: str, values: Mapping[str, float]) -> None:
        """``done`` of ``total`` units are finished."""
        ...

    def log(self, level: str, text: str) -> None:
        """One line; level is info, warning, error, or output for what a library printed."""
        ...


def run_child(
    request: Mapping[str, Any], listener: ChildListener, *, threads: int = 0, module: str = "pipeline.engine.child"
) -> dict[str, Any]:
    """Run one stage in a child and wait for it.

    Args:
        request: ``pipeline.engine.child.Request`` or ``CheckRequest`` as JSON.
        listener: Hears progress and log lines, in this thread.
        threads: Threads of the child's numeric libraries; 0 leaves their defaults.
        module: What the child runs; ``pipeline.engine.launcher`` speaks the same language.

    Returns:
        The child's result line.

    Raises:
        WsssError: what the stage raised.
        InternalFailure: an exception in the stage that nobody foresaw, or an exit without an answer.
        EnvironmentFailure: the child was ended by a signal.
    """
    process = subprocess.Popen(
        [*PYTHON, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=_environment(threads),
    )
    conversation = _Conversation(process)
    try:
        conversation.ask(request)
        for message in conversation.messages(listener):
            if message["event"] == "result":
                conversation.wait_for_exit()
                return message
            if message["event"] == "error":
                error = from_message(message)
                if isinstance(error, InternalFailure) and error.trace:
                    listener.log("error", error.trace)
                raise error
        raise conversation.unanswered(str(request.get("stage", "the check of the networks")))
    finally:
        conversation.end()


def _environment(threads: int) -> dict[str, str]:
    """This process's environment, and what must be set before the first import of the child."""
    environment = find_our_code() | {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONUNBUFFERED": "1"}
    if threads > 0:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(threads)
    return environment


def find_our_code() -> dict[str, str]:
    """This process's environment, completed so that a new interpreter imports the same code, whatever its folder."""
    environment = dict(os.environ)
    here = str(Path(__file__).resolve().parents[2])
    if here not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    return environment


class _Conversation:
    """One child and the threads that read its two outputs."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._lines: queue.Queue[tuple[str, str]] = queue.Queue()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (("event", process.stdout), ("output", process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._lines.put((name, line.decode(errors="replace").rstrip("\n")))

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send the request; the pipe stays open behind it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # died at once: unanswered() will say how
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def messages(self, listener: ChildListener) -> Iterator[dict[str, Any]]:
        """The child's last message, after relaying all before it; nothing when it ended without one."""
        quiet_since: float | None = None
        while True:
            try:
                name, line = self._lines.get(timeout=0.1)
            except queue.Empty:
                # a worker that outlives the child may hold its outputs open: do not wait for their end
                if self._process.poll() is not None:
                    quiet_since = quiet_since or time.monotonic()
                    if time.monotonic() - quiet_since > 1.0:
                        return
                continue
            if name == "output":
                self._hear(line, listener)
                continue
            message = _parse(line)
            if message is None:
                self._hear(line, listener)
            elif message["event"] == "progress":
                listener.progress(*(message[field] for field in ("task", "total", "done", "unit", "values")))
            elif message["event"] == "log":
                listener.log(message["level"], message["text"])
            else:
                yield message

    def _hear(self, line: str, listener: ChildListener) -> None:
        if line:
            self._tail.append(line)
            listener.log("output", line)

    def unanswered(self, stage: str) -> EnvironmentFailure | InternalFailure:
        """Why there was no answer."""
        code = self._process.wait()
        tail = tuple(self._tail)
        if code >= 0:
            return InternalFailure(f"{stage}: the child process ended with code {code} and no answer", tail)
        name = signal.Signals(-code).name
        hint = "; most likely the machine ran out of memory: lower the batch size, runtime.processes or runtime.workers"
        return EnvironmentFailure(
            f"{stage}: the child process was ended by {name}{hint if name == 'SIGKILL' else ''}; "
            "run the same command again: it continues from the unfinished work",
            tail,
        )

    def wait_for_exit(self) -> None:
        """Give the child time to end by itself after its answer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_S)

    def end(self) -> None:
        """Leave nothing of the child's process group alive: ask, wait, kill."""
        try:
            self._end_group()
        except KeyboardInterrupt:
            _signal_group(self._process.pid, signal.SIGKILL)  # a second Ctrl-C: at once
            raise
        finally:
            self._process.wait()
            with contextlib.suppress(OSError):
                if self._process.stdin is not None:
                    self._process.stdin.close()
            for reader in self._readers:
                reader.join(timeout=1.0)  # ends with the pipe; a process outside the group may still hold that

    def _end_group(self) -> None:
        if not _signal_group(self._process.pid, signal.SIGTERM):
            return
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            self._process.poll()
            if not _signal_group(self._process.pid, 0):
                return
            time.sleep(0.02)
        _signal_group(self._process.pid, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; whether there was anybody to hear it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # PermissionError: only zombies are left (macOS)
        return False
    return True


def _parse(line: str) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and "event" in message else None
