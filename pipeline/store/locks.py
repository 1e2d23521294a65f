"""One process at a time per artifact, by filelock: an flock, or a lease where the mount has no flock.

Writes ``.locks/<name>``, which is what an flock locks and holds one line about the holder for those who wait, and
``.locks/<name>.lease``, which its holder renews.  An flock ends with its holder, however the holder ends; a lease when
it was not renewed for LEASE_S, or at once when the holder ended on the waiter's own machine.  Forked children hold
neither.  A lease does not fence: who was suspended learns of its loss late, so ``check_held`` comes before publishing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from filelock import FileLock, LeaseSettingsMismatch, SoftFileLease, Timeout

from stages.errors import EnvironmentFailure

USE_LEASES = "use-leases"
"""A file of this name in the folder of the locks turns flock off there, for every process on whatever machine."""

LEASE_S = 15.0
"""A lease that was not renewed for so many seconds of the waiter's own clock is free; the same for every process."""

HEARTBEAT_S = 3.0
"""Seconds between two renewals."""

_POLL_S = 0.2
_NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


class ArtifactLock:
    """Exclusive right to build, replace or remove one artifact, from ``with`` to its end or the process's death."""

    def __init__(
        self,
        path: Path,
        *,
        waiting: Callable[[str], None] | None = None,
        lost: Callable[[EnvironmentFailure], None] | None = None,
    ) -> None:
        """Prepare a lock on ``path``, a file that is made when missing and never removed.

        ``waiting`` is called once with a description of the holder when the lock is held elsewhere; ``lost`` once, from
        another thread, when a lease was lost: the work under it must stop then.
        """
        self.path = path
        self._waiting = waiting
        self._flock = FileLock(path, thread_local=False, fallback_to_soft=False)
        self._lease = SoftFileLease(
            f"{path}.lease",
            thread_local=False,
            lease_duration=LEASE_S,
            heartbeat_interval=HEARTBEAT_S,
            on_compromise=lambda _: None if lost is None else lost(self._loss()),
        )
        self._nameless: dict[int, float] = {}
        """When a lease that names no holder was last written → when this process first saw it."""

    @property
    def _uses_leases(self) -> bool:
        return (self.path.parent / USE_LEASES).exists()

    def __enter__(self) -> Self:
        """Wait until the lock is ours."""
        while not self.try_acquire():
            if self._waiting is not None:
                self._waiting(self.holder())
                self._waiting = None
            time.sleep(_POLL_S)
        return self

    def __exit__(self, *_: object) -> None:
        """Release."""
        self.release()

    def try_acquire(self, *, patience_s: float = 0.0) -> bool:
        """Take the lock now or not at all; a lease is watched ``patience_s`` for a sign of life of its holder.

        Raises:
            EnvironmentFailure: the lock cannot be written or read, or both kinds of locks are in use.
        """
        try:
            is_ours = self._try_flock() if not self._uses_leases else self._try_lease(patience_s)
        except (OSError, LeaseSettingsMismatch) as error:
            words = getattr(error, "strerror", None) or error
            raise EnvironmentFailure(
                f"{self.path} cannot be opened and locked ({words}); make it a file that can be written, or choose "
                "another store with --artifacts DIR (WSSS_CACHE for the cache of a bucket)"
            ) from error
        if is_ours:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            with contextlib.suppress(OSError):  # only words
                self.path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        return is_ours

    def _try_flock(self) -> bool:
        try:
            self._flock.acquire(blocking=False)
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            with contextlib.suppress(FileExistsError):
                (self.path.parent / USE_LEASES).touch(exist_ok=False)
                sys.stderr.write(f"{self.path.parent}: no flock here ({error.strerror}); using leases from now on\n")
            return self._try_lease(0.0)
        if self._uses_leases:  # made by another process since the look above
            self._flock.release()
            return self._try_lease(0.0)
        if os.path.lexists(self._lease.lock_file):
            self._flock.release()
            raise EnvironmentFailure(
                f"{self._lease.lock_file}: expected no lease, since {USE_LEASES} beside it is missing, found one; "
                "make that file again, or remove the lease once no run is at work on this store"
            )
        return True

    def _try_lease(self, patience_s: float) -> bool:
        seen = self._renewed_ns()
        try:
            self._lease.acquire(
                timeout=patience_s, poll_interval=_POLL_S, cancel_check=lambda: self._renewed_ns() != seen
            )
        except Timeout:
            now = time.monotonic()
            if seen is None or self._lease.owner is not None or now - self._nameless.setdefault(seen, now) <= LEASE_S:
                return False
            raise EnvironmentFailure(
                f"{self._lease.lock_file}: expected a lease, found a file that names no holder (a machine went down "
                "while writing it?); remove it once no run is at work on this store"
            ) from None
        return True

    def _renewed_ns(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return os.lstat(self._lease.lock_file).st_mtime_ns
        return None

    def holder(self) -> str:
        """Who holds the lock, in words."""
        words = ""
        with contextlib.suppress(OSError, ValueError):
            words = self.path.read_text(encoding="utf-8").strip()
        return words or "another process"

    @property
    def is_held(self) -> bool:
        """Whether this process has taken it and not released it; a forked child has not."""
        return self._flock.is_locked or self._lease.is_locked

    def check_held(self) -> None:
        """Make sure, just before something is published, that the lock is still this process's.

        Raises:
            EnvironmentFailure: it was never taken, a lease was lost, or the store turned to leases meanwhile.
        """
        if not self.is_held:
            raise EnvironmentFailure(f"{self.path}: this process does not hold the lock")
        if self._flock.is_locked and self._uses_leases:
            raise EnvironmentFailure(
                f"{self.path}: held by flock, but {USE_LEASES} was made beside it meanwhile, so another worker may be "
                "at the same artifact; nothing was published. Run the same command again"
            )
        if self._lease.is_locked:
            owner = self._lease.owner
            if owner is None or owner.token != self._lease.token or self._lease.compromise is not None:
                raise self._loss()
            with contextlib.suppress(OSError):
                os.utime(self._lease.lock_file)  # the full LEASE_S from now, also after standing still

    def release(self) -> None:
        """Give the lock back; harmless when it is not held, was lost, or is a parent process's."""
        for lock in (self._flock, self._lease):
            if lock.is_locked:
                with contextlib.suppress(OSError):  # a mount that is gone: the lease ends by itself
                    lock.release(force=True)

    def _loss(self) -> EnvironmentFailure:
        return EnvironmentFailure(
            f"{self._lease.lock_file}: the lease was lost, since it was not renewed for {LEASE_S:.0f} s (this machine "
            "was suspended, or the store out of reach), and another worker may have taken over the lock; nothing was "
            "published. Run the same command again: it goes on, or waits for the other worker and reuses its result"
        )
