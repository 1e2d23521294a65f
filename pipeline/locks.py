"""One process at a time per artifact: an flock that ends with its holder, however the holder ends.

Writes a lock file that stays; it holds one line about the holder for those who wait.
The lock is the descriptor: it is closed on exec, and in every forked child, so a DataLoader worker that outlives the
holder does not keep it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from stages.errors import EnvironmentFailure

_HELD_ELSEWHERE = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
_POLL_S = 0.2

_open_locks: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _open_locks:
        os.close(descriptor)
    _open_locks.clear()


os.register_at_fork(after_in_child=_close_in_child)


class KeyLock:
    """Exclusive lock on one file, held from ``with`` to its end or to the death of the process."""

    def __init__(self, path: Path, *, waiting: Callable[[str], None] | None = None) -> None:
        """Prepare a lock.

        Args:
            path: The lock file; made when missing, never removed.
            waiting: Called once with a description of the holder when the lock is held elsewhere.
        """
        self.path = path
        self._waiting = waiting
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock now or not at all.

        Raises:
            EnvironmentFailure: the file system has no flock, or the file may not be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise EnvironmentFailure(
                f"{self.path} cannot be opened ({error.strerror}); choose --artifacts DIR"
            ) from error
        _open_locks.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._close(descriptor)
            if error.errno in _HELD_ELSEWHERE:
                return False
            raise EnvironmentFailure(
                f"{self.path}: this file system has no working flock ({error.strerror}); "
                "choose a local disk with --artifacts DIR"
            ) from error
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        self._descriptor = descriptor
        return True

    def holder(self) -> str:
        """Who holds the lock, in words."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {found['pid']} on {found['host']} since {found['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._descriptor is not None:
            self._close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> KeyLock:
        """Wait until the lock is ours."""
        is_told = False
        while not self.try_acquire():
            if not is_told and self._waiting is not None:
                self._waiting(self.holder())
            is_told = True
            time.sleep(_POLL_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release."""
        self.release()

    @staticmethod
    def _close(descriptor: int) -> None:
        _open_locks.discard(descriptor)
        os.close(descriptor)
