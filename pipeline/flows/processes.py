"""Processes that outlive the command which started them: start, recognise again, find what they left, end.

A pid alone names nothing: it is given to another process later.  So a process is its pid and the moment it started, and
nothing is ever signalled whose start is another one.  Processes carry a mark in their environment, which their children
inherit: so what a dead worker left is found even where its children have sessions of their own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
MAX_LOG_BYTES = 50 * 2**20
"""A log that is longer is set aside as ``.1`` before its process starts again."""

_POLL_S = 0.05
_STATE_FIELD, _PARENT_FIELD, _START_FIELD = 0, 1, 19
"""Of /proc/PID/stat, counted behind the command's name."""

_children: list[subprocess.Popen[bytes]] = []
"""Started by this process, which must collect their ends."""


@dataclass(frozen=True)
class ProcessId:
    """One process of this machine."""

    pid: int
    started: str
    """When, in the system's own words: compared for equality alone."""


def identify(pid: int) -> ProcessId | None:
    """The running process with this pid; None when there is none, or only a zombie."""
    for child in _children:
        if child.pid == pid:
            child.poll()
    if pid <= 0:
        return None
    started = _started_proc(pid) if _has_proc() else _started_ps(pid)
    return None if started is None else ProcessId(pid, started)


def _started_proc(pid: int) -> str | None:
    fields = _stat(pid)
    return None if not fields or fields[_STATE_FIELD] in "ZX" else fields[_START_FIELD]


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the command's name, which may hold spaces and brackets."""
    try:
        return (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _started_ps(pid: int) -> str | None:
    done = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = done.stdout.strip().partition(" ")
    return started.strip() if state and not state.startswith("Z") else None


def parent_of(pid: int) -> int:
    """The parent's pid; 0 when there is no such process."""
    if _has_proc():
        fields = _stat(pid)
        return int(fields[_PARENT_FIELD]) if fields else 0
    done = subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or 0)


def _has_proc() -> bool:
    return (PROC / "self" / "stat").exists()


def is_running(process: ProcessId | None) -> bool:
    """Whether exactly this process still runs."""
    return process is not None and identify(process.pid) == process


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> ProcessId:
    """Start a process in a session of its own, which ends with neither this process nor its terminal.

    Args:
        command: Program and arguments.
        environment: All of its variables.
        log: Where its output goes, appended.

    Raises:
        OSError: the program cannot be started, or the log not be written.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))
    with log.open("ab") as file:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    _children.append(child)
    return identify(child.pid) or ProcessId(child.pid, "ended")


def freeze(process: ProcessId) -> bool:
    """Stop exactly this process where it is; whether it was there.  Only killing ends it then."""
    return _signal(process, signal.SIGSTOP)


def end(processes: Iterable[ProcessId], *, grace_s: float) -> list[ProcessId]:
    """Ask processes to end, wait, kill what stays.

    Args:
        processes: Whom.
        grace_s: Seconds between the asking and the killing.

    Returns:
        Those that had to be killed.
    """
    left = [process for process in processes if _signal(process, signal.SIGTERM)]
    left = _wait(left, grace_s)
    for process in left:
        _signal(process, signal.SIGKILL)
    _wait(left, 5.0)
    return left


def _signal(process: ProcessId, number: int) -> bool:
    """Signal exactly this process; whether it was there."""
    if not is_running(process):
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process.pid, number)
        return True
    return False


def _wait(processes: Sequence[ProcessId], timeout_s: float) -> list[ProcessId]:
    end_at = time.monotonic() + timeout_s
    left = [process for process in processes if is_running(process)]
    while left and time.monotonic() < end_at:
        time.sleep(_POLL_S)
        left = [process for process in left if is_running(process)]
    return left


def find_marked(name: str, *values: str) -> dict[ProcessId, dict[str, str]]:
    """Processes of this user that were started with the variable ``name``, each with its environment.

    Looks at every process of the machine: about 0.01 ms each.

    Args:
        name: Of the variable.
        values: One of which it must have, none with spaces.
    """
    found = {}
    for pid, environment in _environments_proc(name) if _has_proc() else _environments_ps():
        process = identify(pid) if environment.get(name) in values else None
        if process is not None:
            found[process] = environment
    return found


def _environments_proc(name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Of the processes that have ``name`` among their variables."""
    for entry in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            block = (entry / "environ").read_bytes()
            if f"{name}=".encode() in block:
                pairs = (variable.partition("=") for variable in block.decode(errors="replace").split("\0"))
                yield int(entry.name), {key: text for key, _, text in pairs}


def _environments_ps() -> Iterator[tuple[int, dict[str, str]]]:
    """As ``ps`` prints them behind the command, where there is no /proc: values end at the first space."""
    done = subprocess.run(["ps", "axeww", "-o", "pid=,command="], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        pid, _, words = line.strip().partition(" ")
        if pid.isdigit():
            yield int(pid), dict(re.findall(r"(?:^| )([A-Za-z_][A-Za-z0-9_]*)=(\S*)", words))
