"""What every lock of the store can do, whether the kernel keeps it (locks) or a heartbeat (leases).

A lock belongs to the process that took it: forked children neither hold nor release it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self


class ArtifactLock(ABC):
    """Exclusive right to build, replace or remove one artifact, from ``with`` to its end or the process's death."""

    poll_s = 0.2
    """Seconds between two tries while waiting."""

    def __init__(self, waiting: Callable[[str], None] | None = None) -> None:
        """Prepare a lock.

        Args:
            waiting: Called once with a description of the holder when the lock is held elsewhere.
        """
        self._waiting = waiting

    @abstractmethod
    def try_acquire(self, *, patience_s: float = 0.0) -> bool:
        """Take the lock now or not at all.

        Args:
            patience_s: How long to watch a silent holder before taking it for alive, where only its heartbeat tells.

        Raises:
            EnvironmentFailure: the place of the lock cannot be read or written.
        """

    @abstractmethod
    def holder(self) -> str:
        """Who holds the lock, in words."""

    @property
    @abstractmethod
    def is_held(self) -> bool:
        """Whether this process has taken the lock and not released it; it may have been taken over meanwhile."""

    @abstractmethod
    def check_held(self) -> None:
        """Make sure, just before something is published, that the lock is still this process's.

        Raises:
            EnvironmentFailure: it was never taken, another worker has taken it over, or nobody can tell.
        """

    @abstractmethod
    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""

    def __enter__(self) -> Self:
        """Wait until the lock is ours."""
        is_told = False
        while not self.try_acquire():
            if not is_told and self._waiting is not None:
                self._waiting(self.holder())
            is_told = True
            time.sleep(self.poll_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release."""
        self.release()
