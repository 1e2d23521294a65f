"""Start a stage in a process of its own, relay what it says, and see to it that it ends.

Writes nothing itself.  The child runs in a new session, so its whole group can be ended at once; it also watches the
pipe that this process holds, so it ends when this process is killed.
"""

from __future__ import annotations

import contextlib
import json
import math
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
from typing import IO, Any

from pipeline.engine.failures import InternalFailure, from_message
from pipeline.engine.outcomes import Listener
from stages.errors import EnvironmentFailure

PYTHON = (sys.executable, "-P")
"""How a process of ours begins: without -P a folder ``pipeline`` or ``stages`` of the user's, in the working directory,
would be imported in place of ours."""

GRACE_S = 5.0
"""Seconds between asking a child's process group to end and killing it."""

_TAIL_LINES = 40
_EXIT_S = 30.0


def run_child(request: Mapping[str, Any], listener: Listener, *, threads: int = 0) -> dict[str, Any]:
    """Run one stage in a child and wait for it; see ``Child``."""
    child = Child(request, threads=threads)
    try:
        return child.answer(listener)
    finally:
        child.end()


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


class Child:
    """One child, asked one thing, and the threads that read its two outputs."""

    def __init__(self, request: Mapping[str, Any], *, threads: int = 0) -> None:
        """Start it.

        Args:
            request: ``pipeline.engine.request.Request`` or ``CheckRequest`` as JSON.
            threads: Threads of the child's numeric libraries; 0 leaves their defaults.
        """
        self._stage = str(request.get("stage", "the check of the networks"))
        self._process = subprocess.Popen(
            [*PYTHON, "-m", "pipeline.engine.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=_environment(threads),
        )
        self._lines: queue.Queue[tuple[str, str]] = queue.Queue()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (("event", self._process.stdout), ("output", self._process.stderr))
        ]
        for reader in self._readers:
            reader.start()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # died at once: answer() will say how
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()  # and stays open: its end would end the child

    def _read(self, name: str, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._lines.put((name, line.decode(errors="replace").rstrip("\n")))

    def answer(self, listener: Listener) -> dict[str, Any]:
        """The child's result line, after relaying all before it to ``listener`` in this thread.

        Raises:
            WsssError: what the stage raised.
            InternalFailure: an exception in the stage that nobody foresaw, or an exit without an answer.
            EnvironmentFailure: the child was ended by a signal.
        """
        for message in self._messages(listener):
            if message["event"] == "result":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_EXIT_S)
                return message
            if message["event"] == "error":
                raise from_message(message)
        raise self._unanswered()

    def _messages(self, listener: Listener) -> Iterator[dict[str, Any]]:
        """Whatever the child says that is not for the listener; ends when it ended without an answer."""
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
            message = _parse(line) if name == "event" else None
            if message is None:
                if line:
                    self._tail.append(line)
                    listener.output(line)
            elif message["event"] == "step":
                values = {key: math.nan if value is None else value for key, value in message["values"].items()}
                listener.step(message["task"], message["done"], message["total"], unit=message["unit"], **values)
            elif message["event"] == "info":
                listener.info(message["text"])
            elif message["event"] == "warn":
                listener.warn(message["text"])
            else:
                yield message

    def _unanswered(self) -> EnvironmentFailure | InternalFailure:
        """Why there was no answer."""
        stage, code = self._stage, self._process.wait()
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
