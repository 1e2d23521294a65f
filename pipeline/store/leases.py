"""Locks for places without flock: a numbered lease that its holder renews and that others take when it falls silent.

Reads and writes ``<place>/<generation>``, small JSON objects; the newest generation decides.  To acquire is to create
the next generation exclusively; the newest object always stays, so numbers only grow and a number is won once.
A holder writes a new counter every 2 s.  Whoever waits takes the lock when the object has not changed for 8 s of the
waiter's own monotonic clock: clocks of machines are never compared.  A holder that ended on the waiter's own machine is
known to be dead at once.

What a lease cannot promise: a holder that stood still (a suspended machine, a cut network) learns of its loss only when
it comes back, at its next heartbeat, at most about 2 s later.  Until then two may work on one key, so everything that
publishes calls ``check_held`` just before.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.store.lease_places import LeasePlace
from pipeline.store.lock_protocol import ArtifactLock
from stages.errors import EnvironmentFailure

RENEW_S = 2.0
"""Seconds between two heartbeats."""

STALE_S = 8.0
"""A lease that has not changed for so many seconds is free; takeover is within 10 s of the holder's death."""

_JOIN_S = 5.0

_sightings: dict[str, tuple[int, bytes, float]] = {}
"""Place → generation, content and when this process first saw them, on its monotonic clock."""


class LeaseLock(ArtifactLock):
    """A lock kept by a heartbeat; the same protocol as KeyLock."""

    def __init__(
        self,
        place: LeasePlace,
        *,
        waiting: Callable[[str], None] | None = None,
        lost: Callable[[EnvironmentFailure], None] | None = None,
    ) -> None:
        """Prepare a lock.

        Args:
            place: Where the lease's generations lie.
            waiting: Called once with a description of the holder when the lock is held elsewhere.
            lost: Called once, from the heartbeat's thread, when another has taken the lock over; the work under it
                must stop then.
        """
        super().__init__(waiting)
        self.poll_s = place.poll_s
        self._place = place
        self._lost = lost
        self._held: _Held | None = None

    def try_acquire(self, *, patience_s: float = 0.0) -> bool:
        """Take the lock now, or after ``patience_s`` in which its holder gave no sign of life, or not at all."""
        deadline = time.monotonic() + patience_s
        with _explained(self._place):
            first = self._newest() if patience_s > 0 else None
            while not self._try_now():
                if time.monotonic() >= deadline or self._newest() != first:
                    return False
                time.sleep(self.poll_s)
        return True

    def holder(self) -> str:
        """Who holds the lock, in words."""
        with contextlib.suppress(Exception):  # only words, and the holder may be writing just now
            record = _parse(self._newest()[1])
            return f"process {record['pid']} on {record['host']} since {record['since']}"
        return "another process"

    @property
    def is_held(self) -> bool:
        """Whether this process has taken it and not released it."""
        return self._held is not None and self._held.pid == os.getpid()

    def check_held(self) -> None:
        """Renew the lease; raises where that cannot be done, since nobody knows then who has the lock."""
        held = self._held
        if held is None or not self.is_held:
            raise EnvironmentFailure(f"{self._place}: this process does not hold the lock")
        with _explained(self._place):
            is_ours = held.renew()
        if not is_ours:
            raise _loss(self._place)

    def release(self) -> None:
        """Mark the lease as free; nothing in a forked child, and nothing where it was lost."""
        held, self._held = self._held, None
        if held is not None and held.pid == os.getpid():
            held.end()

    def _try_now(self) -> bool:
        newest, data = self._newest()
        if newest and not self._is_free(newest, data):
            return False
        held = _Held(self._place, newest + 1, self._lost)
        if not held.create():
            return False
        # a slow acquirer may have won a number that was won and cleared away long ago: the newest decides
        if max(self._place.generations(), default=0) != held.generation:
            self._place.remove(held.generation)
            return False
        for number in self._place.generations():
            if number < held.generation:
                self._place.remove(number)
        held.start()
        self._held = held
        return True

    def _newest(self) -> tuple[int, bytes | None]:
        newest = max(self._place.generations(), default=0)
        return newest, self._place.read(newest) if newest else None

    def _is_free(self, generation: int, data: bytes | None) -> bool:
        if data is None:  # removed since the listing: there is a newer one
            return False
        record = _parse(data)
        if record.get("released") or _has_ended_here(record):
            return True
        now = time.monotonic()
        seen = _sightings.get(str(self._place))
        if seen is None or seen[:2] != (generation, data):
            _sightings[str(self._place)] = (generation, data, now)
            return False
        return now - seen[2] > STALE_S


class _Held:
    """One generation that this process won, and the thread that renews it."""

    def __init__(self, place: LeasePlace, generation: int, lost: Callable[[EnvironmentFailure], None] | None) -> None:
        self.generation, self.pid = generation, os.getpid()
        self._place, self._lost = place, lost
        self._counter = 0
        self._is_ours = True
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._record = {
            "owner": secrets.token_hex(8),
            "pid": self.pid,
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": _machine(),
            "process_started": _process_start(self.pid),
        }

    def create(self) -> bool:
        return self._place.create(self.generation, self._data())

    def start(self) -> None:
        self._thread.start()

    def renew(self) -> bool:
        """Write the next counter; False once another has the lock."""
        with self._writing:
            if self._is_ours:
                self._counter += 1
                self._is_ours = self._place.replace(self.generation, self._data())
            return self._is_ours

    def end(self) -> None:
        """Stop renewing and say so; where that cannot be said, the silence does."""
        self._stop.set()
        if threading.current_thread() is not self._thread:  # it is where ``lost`` ends the work itself
            self._thread.join(_JOIN_S)
        if self._is_ours and not self._thread.is_alive():
            self._record["released"] = True
            with contextlib.suppress(Exception):
                self._place.replace(self.generation, self._data())

    def _beat(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                is_ours = self.renew()
            except Exception:
                continue  # out of reach: once the place is back, the next beat says whose the lock is
            if not is_ours:
                if self._lost is not None:
                    self._lost(_loss(self._place))
                return

    def _data(self) -> bytes:
        return json.dumps({**self._record, "counter": self._counter}).encode()


def _loss(place: LeasePlace) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{place}: another worker has taken over the lock, since this one gave no sign of life for {STALE_S:.0f} s "
        "(suspended, or cut off from the store); nothing was published. Run the same command again: it waits for the "
        "other worker and reuses what that makes"
    )


@contextlib.contextmanager
def _explained(place: LeasePlace) -> Any:  # noqa: ANN401 - a context manager
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(
            f"{place} cannot be used ({error.strerror or error}); choose --artifacts DIR"
        ) from error


def _parse(data: bytes | None) -> Mapping[str, Any]:
    """The record; empty for one that is being written."""
    try:
        record = json.loads(data or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# Processes of this machine
# ---------------------------------------------------------------------------------------------------------------------


def _has_ended_here(record: Mapping[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended; False where that cannot be known."""
    if not _machine() or record.get("machine") != _machine():
        return False
    return _process_start(record.get("pid", 0)) != record.get("process_started")


@cache
def _machine() -> str:
    """This boot of this machine and this process's view of its processes; empty where Linux does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks; None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
