"""What is said of a run while it goes on and when it has ended.

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from stages.contracts import Progress, SilentProgress

State = Literal["built", "cached", "resumed", "skipped", "failed"]


class Listener(Progress, Protocol):
    """Who hears of a run: the terminal, Prefect, a test.  A stage's own progress arrives unchanged."""

    def stage_started(self, stage: str, key: str) -> None:
        """``stage`` is looked up, and built if need be."""
        ...

    def stage_finished(self, outcome: StageOutcome) -> None:
        """``outcome.state`` is failed when an error follows."""
        ...

    def output(self, text: str) -> None:
        """A line that a library printed, or the traceback of a fault."""
        ...


class SilentListener(SilentProgress):
    """Hears nothing."""

    def stage_started(self, stage: str, key: str) -> None:
        """Ignore."""

    def stage_finished(self, outcome: StageOutcome) -> None:
        """Ignore."""

    def output(self, text: str) -> None:
        """Ignore."""


@dataclass(frozen=True)
class StageOutcome:
    """What became of one stage in one run."""

    stage: str
    key: str | None
    """None for a skipped stage."""
    path: Path | None
    state: State
    seconds: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


Around = Callable[[str, Callable[[], StageOutcome]], StageOutcome]
"""Does something around one stage, such as a Prefect task run."""

Helpers = Callable[[str, int], AbstractContextManager[None]]
"""Asks others to help with a stage, which is built in so many parts, for as long as it is built."""


@dataclass(frozen=True)
class RunOutcome:
    """What became of a run."""

    run_id: str
    stages: tuple[StageOutcome, ...]
    record: Path
    """The file under ``runs/`` that keeps the run's artifacts from being pruned."""

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of all stages."""
        return {name: value for outcome in self.stages for name, value in outcome.metrics.items()}


@dataclass(frozen=True)
class StageStatus:
    """What the store holds for one stage of a config."""

    stage: str
    state: Literal["cached", "partial", "missing", "damaged", "skipped"]
    key: str | None
    path: Path | None
    size_bytes: int = 0
    built_at: str | None = None
    """ISO time at which the build began."""


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
