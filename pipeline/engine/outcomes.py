"""What is said of a run while it goes on and when it ended: listeners, outcomes, states.

Records and protocols only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

State = Literal["built", "cached", "resumed", "skipped", "failed", "helped"]
"""helped: shards of the stage were built for another run, which puts them together."""


class Listener(Protocol):
    """Who hears of a run: the terminal, Prefect, a test."""

    def stage_started(self, stage: str, key: str) -> None:
        """``stage`` is looked up, and built if need be."""
        ...

    def progress(self, task: str, total: int, done: int, unit: str, values: Mapping[str, float]) -> None:
        """``done`` of ``total`` units of ``task`` are finished; at most ten times a second."""
        ...

    def log(self, level: str, text: str) -> None:
        """One line; level is info, warning, error, or output for what a library printed."""
        ...

    def stage_finished(self, outcome: StageOutcome) -> None:
        """``outcome.state`` is failed when an error follows."""
        ...


class SilentListener:
    """Hears nothing."""

    def stage_started(self, stage: str, key: str) -> None:
        """Ignore."""

    def progress(self, task: str, total: int, done: int, unit: str, values: Mapping[str, float]) -> None:
        """Ignore."""

    def log(self, level: str, text: str) -> None:
        """Ignore."""

    def stage_finished(self, outcome: StageOutcome) -> None:
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

Recruit = Callable[[str], AbstractContextManager[None]]
"""Asks others for help with a stage that is built in shards, for as long as it is built."""


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
