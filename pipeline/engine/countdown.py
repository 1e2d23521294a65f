"""How long the rest of a countable task will take."""

from __future__ import annotations


class Countdown:
    """Units done and the seconds that the rest will take, at the pace since it began."""

    def __init__(self, total: int, done: int, now: float) -> None:
        """Begin with ``done`` of ``total`` units that earlier work left."""
        self.total, self.done = total, done
        self._first, self._start = done, now

    def left_s(self, now: float) -> float | None:
        """Seconds to the end, or None before the first unit."""
        fresh = self.done - self._first
        if fresh <= 0 or now <= self._start:
            return None
        return (self.total - self.done) * (now - self._start) / fresh


class Pace:
    """The countdown of whatever task is under way; another task, or one that began anew, starts it again.

    The clock starts with the first units that are finished: before them a task loads, compiles and starts processes.
    """

    def __init__(self) -> None:
        """Begin before any task."""
        self._task = ""
        self._countdown = Countdown(0, 0, 0.0)
        self._is_started = False

    def left_s(self, task: str, total: int, done: int, now: float) -> float | None:
        """Seconds to the end of ``task``, of which ``done`` of ``total`` units are done; None where nothing tells.

        The first call that finds units finished starts the clock, and the next that finds more of them reads it.
        """
        if task != self._task or total != self._countdown.total or done < self._countdown.done:
            self._task, self._countdown, self._is_started = task, Countdown(total, done, now), False
        elif not self._is_started and done > self._countdown.done:
            self._countdown, self._is_started = Countdown(total, done, now), True
        self._countdown.done = done
        return self._countdown.left_s(now)
