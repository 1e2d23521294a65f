"""Write files in threads beside the work that makes them, and say what a full disk means for a stage.

Writes whatever it is given; knows no format.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stages.errors import EnvironmentFailure

_THREADS = 2
"""Compressing a mask takes milliseconds and lets go of the interpreter; syncing it to a disk takes longer."""
_MOST_WAITING = 16
"""Files that are held in memory at most; whoever makes more of them waits."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class BackgroundWriter:
    """A few threads that write while the caller goes on; a context manager, which ends when all is written.

    A file that could not be written raises its error out of the next call, or at the end.
    """

    def __init__(self, *, threads: int = _THREADS, most_waiting: int = _MOST_WAITING) -> None:
        """Start no thread yet.

        Args:
            threads: How many write at once.
            most_waiting: Files handed over and not written; one more keeps the caller waiting.
        """
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="write")
        self._most_waiting = most_waiting
        self._waiting: deque[Future[object]] = deque()

    def submit(self, function: Callable[..., object], *arguments: object) -> None:
        """Call ``function(*arguments)`` soon, in a thread."""
        while self._waiting and (len(self._waiting) >= self._most_waiting or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(function, *arguments))

    def submit_last(self, function: Callable[..., object], *arguments: object) -> None:
        """The same after everything that was handed over before; not at all where some of that failed."""
        self.submit(_call_after, tuple(self._waiting), function, arguments)

    def finish(self) -> None:
        """Wait until everything is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _call_after(before: Sequence[Future[object]], function: Callable[..., object], arguments: Sequence[Any]) -> None:
    """Threads take what they are given in order, so those before have begun and none of them waits for this one."""
    for future in before:
        future.result()
    function(*arguments)


@contextmanager
def explain_full_disk(folder: Path, finished: Callable[[], str]) -> Iterator[None]:
    """Turn the error of a full disk into one that says what was not lost.

    Args:
        folder: Where the stage writes.
        finished: What is there by then ("120 of 1,464 masks").

    Raises:
        EnvironmentFailure: the disk or the quota is used up.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise EnvironmentFailure(
            f"{folder}: the disk is full ({error.strerror}); {finished()} are finished and stay valid: free some space "
            "(wsss artifacts prune), then run the same command again, which makes the rest"
        ) from error
