"""One Prefect task run per stage, named as the stage, whose state says whether it was built, cached or skipped.

The task only looks: the stage's body runs in a child process as without Prefect, and the store is the only cache.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import cast
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from pipeline.engine.outcomes import Listener, Pace, StageOutcome
from pipeline.report.tables import describe_value, format_seconds
from stages.errors import WsssError

PROGRESS_EVERY_S = 2.0
"""Least time between two updates of a progress artifact; one costs about 14 ms."""


def run_as_task(stage: str, body: Callable[[], StageOutcome]) -> StageOutcome:
    """Bring the stage's artifact into being by ``body``, in a task run that is called as the stage.

    Raises:
        WsssError: what ``body`` raised; the task run's message is its text.
    """
    named = _run_stage.with_options(name=stage, task_run_name=stage)
    return cast(StageOutcome, named(body, return_state=True).result())


@task(cache_policy=NO_CACHE, persist_result=False)
def _run_stage(body: Callable[[], StageOutcome]) -> State[StageOutcome]:
    try:
        outcome = body()
    except WsssError as error:
        # a deliberate error's first line says what to do; raised, it would stand behind Prefect's own words
        return Failed(message=str(error), data=error)
    name = "Completed" if outcome.state == "built" else outcome.state.capitalize()  # Cached, Skipped, Resumed
    message = "not needed by this config" if outcome.path is None else str(outcome.path)
    return Completed(name=name, message=message, data=outcome)


class PrefectListener:
    """Relays a run to the logger of the task run and a progress artifact, and to another listener."""

    def __init__(self, inner: Listener) -> None:
        """Relay to ``inner`` too."""
        self._inner, self._stage, self._pace = inner, "", Pace()
        self._artifact: UUID | None = None
        self._updated = 0.0

    def stage_started(self, stage: str, key: str) -> None:
        """Begin to follow ``stage``."""
        self._stage, self._pace = stage, Pace()
        self._artifact, self._updated = None, time.monotonic()
        get_run_logger().info("%s: key %s", stage, key)
        self._inner.stage_started(stage, key)

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        """Show progress and the time left, on the artifact at most every two seconds."""
        self._inner.step(task, done, total, unit=unit, **values)
        now = time.monotonic()
        left_s = self._pace.left_s(task, total, done, now)
        if now - self._updated >= PROGRESS_EVERY_S and total > 0:
            self._updated = now
            left = "" if left_s is None else f", {format_seconds(left_s)} left"
            numbers = "".join(f", {describe_value(name, value)}" for name, value in values.items())
            self._show(100.0 * done / total, f"{task}: {done}/{total} {unit}{left}{numbers}")

    def _show(self, percent: float, text: str) -> None:
        with contextlib.suppress(Exception):  # a server that hiccups must not end a training
            if self._artifact is None:
                key = self._stage.replace("_", "-")
                self._artifact = cast(UUID, create_progress_artifact(percent, key=key, description=text))
            else:
                update_progress_artifact(self._artifact, percent, description=text)

    def info(self, text: str) -> None:
        """Log a line of the stage."""
        get_run_logger().info("%s", text)
        self._inner.info(text)

    def warn(self, text: str) -> None:
        """Log a line that stands out."""
        get_run_logger().warning("%s", text)
        self._inner.warn(text)

    def output(self, text: str) -> None:
        """Log what a library printed."""
        get_run_logger().info("%s", text)
        self._inner.output(text)

    def stage_finished(self, outcome: StageOutcome) -> None:
        """Log how a stage ended."""
        if self._artifact is not None and outcome.state in ("built", "resumed"):
            self._show(100.0, outcome.state)
        get_run_logger().info(
            "%s: %s in %.1f s %s", outcome.stage, outcome.state, outcome.seconds, dict(outcome.metrics)
        )
        self._inner.stage_finished(outcome)
