# ruff: noqa: D102
"""The engine's coming interface over today's functions; goes when the engine has it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.config.run_config import RunConfig
from pipeline.engine.outcomes import Around, RunOutcome, StageOutcome
from pipeline.engine.outcomes import Listener as OldListener
from pipeline.engine.outcomes import SilentListener as OldSilentListener
from pipeline.engine.plan import Plan
from pipeline.engine.run import help_with, run_pipeline, run_stage
from pipeline.store.artifacts import Store

PARTS = "runtime.shards"


class Listener(Protocol):
    """The coming listener."""

    def stage_started(self, stage: str, key: str) -> None: ...
    def stage_finished(self, outcome: StageOutcome) -> None: ...
    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None: ...
    def info(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def output(self, text: str) -> None: ...


class ToOld:
    """A coming listener in front of one of today's."""

    def __init__(self, old: OldListener) -> None:
        self._old = old
        self.stage_started, self.stage_finished = old.stage_started, old.stage_finished

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        self._old.progress(task, total, done, unit, values)

    def info(self, text: str) -> None:
        self._old.log("info", text)

    def warn(self, text: str) -> None:
        self._old.log("warning", text)

    def output(self, text: str) -> None:
        self._old.log("output", text)


class HeardByOld:
    """Base of a coming listener that today's engine talks to."""

    def progress(self: Any, task: str, total: int, done: int, unit: str, values: Mapping[str, float]) -> None:
        self.step(task, done, total, unit=unit, **values)

    def log(self: Any, level: str, text: str) -> None:
        {"info": self.info, "warning": self.warn}.get(level, self.output)(text)


@dataclass
class Run:
    """The coming Run."""

    config: RunConfig
    store: Store
    listener: Any = field(default_factory=OldSilentListener)
    invocation: str = "CONFIG"
    plan: Plan | None = None
    around: Around | None = None
    helpers: Callable[[str, int], AbstractContextManager[None]] | None = None

    def run_pipeline(
        self, *, from_: str | None = None, until: str | None = None, force: Collection[str] = ()
    ) -> RunOutcome:
        return run_pipeline(
            self.config, self.store, from_=from_, until=until, force=force, around=self.around, **self._rest()
        )

    def run_stage(self, stage: str, *, force: bool = False) -> RunOutcome:
        return run_stage(stage, self.config, self.store, force=force, around=self.around, **self._rest())

    def help_with(self, stage: str, part: str = "any") -> int:
        assert part == "any", "today's engine takes any part"
        rest = self._rest()
        rest.pop("recruit")
        return help_with(stage, self.config, self.store, **rest)

    def _rest(self) -> dict[str, Any]:
        helpers, num_parts = self.helpers, self.config.runtime.shards
        recruit = None if helpers is None else lambda stage: helpers(stage, num_parts)
        return {
            "listener": self.listener,
            "invocation": self.invocation,
            "plan": self.plan,
            "recruit": recruit,
        }
