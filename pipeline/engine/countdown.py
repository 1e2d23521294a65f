"""How long the rest of a countable task will take."""

from __future__ import annotations


class Pace:
    """The seconds left of whatever task is under way; another task, or one that began anew, starts the clock again.

    The clock starts with the first units that are finished: before them a task loads, compiles and starts processes.
    """

    def __init__(self) -> None:
        """Begin before any task."""
        self._task: tuple[str, int] | None = None
        self._done = self._first = 0
        self._start: float | None = None

    def left_s(self, task: str, total: int, done: int, now: float) -> float | None:
        """Seconds to the end of ``task``, of which ``done`` of ``total`` units are done; None where nothing tells.

        The first call that finds units finished starts the clock, and the next that finds more of them reads it.
        """
        if self._task != (task, total) or done < self._done:
            self._task, self._start = (task, total), None
        elif self._start is None and done > self._done:
            self._first, self._start = done, now
        self._done = done
        if self._start is None or done <= self._first or now <= self._start:
            return None
        return (total - done) * (now - self._start) / (done - self._first)
