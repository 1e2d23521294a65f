"""One process at a time per artifact: an flock that ends with its holder, however the holder ends.

Writes a lock file that stays; it holds one line about the holder for those who wait.
The lock is the descriptor: it is closed on exec, and in every forked child, so a DataLoader worker that outlives the
holder does not keep it.
Where the file system has no flock, a lease beside the file takes its place, and a file ``use-leases`` in the folder
says so to every other process, on whatever machine: the two kinds do not see each other.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.store.lease_places import LeaseFolder
from pipeline.store.leases import LeaseLock
from pipeline.store.lock_protocol import ArtifactLock
from stages.errors import EnvironmentFailure

USE_LEASES = "use-leases"
"""A file of this name in the folder of the locks turns flock off there; a user may make it too, for a mount whose flock
does not reach other machines."""

_HELD_ELSEWHERE = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
_NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}

_open_locks: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _open_locks:
        os.close(descriptor)
    _open_locks.clear()


os.register_at_fork(after_in_child=_close_in_child)


class KeyLock(ArtifactLock):
    """Exclusive lock on one file, held from ``with`` to its end or to the death of the process."""

    def __init__(
        self,
        path: Path,
        *,
        waiting: Callable[[str], None] | None = None,
        lost: Callable[[EnvironmentFailure], None] | None = None,
    ) -> None:
        """Prepare a lock.

        Args:
            path: The lock file; made when missing, never removed.
            waiting: Called once with a description of the holder when the lock is held elsewhere.
            lost: As of LeaseLock, where a lease takes the place of flock.
        """
        super().__init__(waiting)
        self.path = path
        self._descriptor: int | None = None
        self._lease = LeaseLock(LeaseFolder(path.with_name(f"{path.name}.lease")), lost=lost)

    @property
    def _is_lease(self) -> bool:
        return (self.path.parent / USE_LEASES).exists()

    def try_acquire(self, *, patience_s: float = 0.0) -> bool:
        """Take the lock now or not at all; ``patience_s`` matters only where a lease takes the place of flock.

        Raises:
            EnvironmentFailure: the file may not be written, or flock failed.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise EnvironmentFailure(
                f"{self.path} cannot be opened ({error.strerror}); choose --artifacts DIR"
            ) from error
        if self._is_lease:
            os.close(descriptor)
            return self._lease.try_acquire(patience_s=patience_s)
        _open_locks.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._close(descriptor)
            if error.errno in _HELD_ELSEWHERE:
                return False
            if error.errno in _NO_FLOCK:
                self._turn_to_leases(error)
                return self._lease.try_acquire(patience_s=patience_s)
            raise EnvironmentFailure(
                f"{self.path} cannot be locked ({error.strerror}); choose a local disk with --artifacts DIR"
            ) from error
        if self._is_lease:  # made by another process since the look above
            self._close(descriptor)
            return self._lease.try_acquire(patience_s=patience_s)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        self._descriptor = descriptor
        return True

    def holder(self) -> str:
        """Who holds the lock, in words."""
        if self._is_lease:
            return self._lease.holder()
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {found['pid']} on {found['host']} since {found['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    @property
    def is_held(self) -> bool:
        """Whether this process has taken it and not released it; a forked child has not."""
        return self._lease.is_held or self._descriptor in _open_locks

    def check_held(self) -> None:
        """The kernel keeps an flock for as long as the descriptor is open; a lease is asked.

        Raises:
            EnvironmentFailure: it is not held, or no longer.
        """
        if self._descriptor is None:
            self._lease.check_held()
        elif not self.is_held:
            raise EnvironmentFailure(f"{self.path}: this process does not hold the lock")

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        self._lease.release()
        if self._descriptor is not None:
            self._close(self._descriptor)
            self._descriptor = None

    def _turn_to_leases(self, error: OSError) -> None:
        """Let every process use leases here, and say so once per folder."""
        marker = self.path.parent / USE_LEASES
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError as failure:
            raise EnvironmentFailure(
                f"{self.path}: this file system has no working flock ({error.strerror}) and {marker} cannot be "
                f"written ({failure.strerror}); choose a local disk with --artifacts DIR"
            ) from failure
        sys.stderr.write(f"{self.path.parent}: this file system has no flock ({error.strerror}); using leases there\n")

    @staticmethod
    def _close(descriptor: int) -> None:
        if descriptor in _open_locks:
            _open_locks.discard(descriptor)
            os.close(descriptor)
