"""Run a stage that trains as several processes, a device each, from the process that holds the artifact's lock.

Writes nothing itself: the stage's main rank does.  child → ``pipeline.engine.launcher`` (torchrun's agent) →
``pipeline.engine.rank`` for every device.  Each of them watches a pipe that the one before holds, so all end when any
before them is killed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.engine.spawn import run_child
from stages.contracts import Progress, Runtime, StageResult
from stages.training.distributed import num_ranks, resolve_devices


def count_ranks(config: object, runtime: Runtime | None) -> int:
    """Processes that a stage has to be called in; 1: this one.

    Args:
        config: The stage's; one that can be spread over devices has ``max_devices``.
        runtime: Asks for devices.

    Raises:
        ConfigError: more devices than ``max_devices``, or one device is named where several are asked for.
        EnvironmentFailure: there are fewer devices than were asked for.
    """
    most = getattr(config, "max_devices", None)
    if most is None or runtime is None or num_ranks() > 1:
        return 1
    return resolve_devices(runtime, most)


def run_on_ranks(request: BaseModel, num: int, work: Path, progress: Progress) -> StageResult:
    """Call the stage of ``request`` in ``num`` processes at once and wait for them.

    Args:
        request: A ``pipeline.engine.child.Request``.
        num: Processes, a device each.
        work: Folder that the stage writes to.
        progress: Hears of the main rank's progress; what libraries print goes to stderr.

    Returns:
        The main rank's.

    Raises:
        WsssError: what the stage raised on any of the ranks.
        InternalFailure: an exception that nobody foresaw.
        EnvironmentFailure: a rank was ended by a signal.
    """
    progress.info(f"on {num} devices")
    message = request.model_dump(mode="json")
    threads = 0 if _has_threads(message) else max(1, (os.cpu_count() or 1) // num)
    answer = run_child(
        {**message, "num_ranks": num, "work": str(work)},
        _Relay(progress),
        threads=threads,
        module="pipeline.engine.launcher",
    )
    return StageResult(metrics=answer["metrics"], mask_supervision=tuple(answer["mask_supervision"]))


def _has_threads(message: Mapping[str, Any]) -> bool:
    """Whether somebody has said how many threads a process should take; else the ranks share the cores."""
    return bool(message["run"].get("runtime", {}).get("threads")) or "OMP_NUM_THREADS" in os.environ


class _Relay:
    """Hands on what the launcher and its ranks say."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._begun: tuple[str, int, str] | None = None
        self._done = 0

    def progress(self, task: str, total: int, done: int, unit: str, values: Mapping[str, float | None]) -> None:
        """Begin the task where it is new, then advance by what was done since."""
        if self._begun != (task, total, unit) or done < self._done:
            self._progress.begin(task, total=total, done=done, unit=unit)
            self._begun, self._done = (task, total, unit), done
        if done > self._done:
            known = {name: float("nan") if value is None else value for name, value in values.items()}
            self._progress.advance(done - self._done, **known)
            self._done = done

    def log(self, level: str, text: str) -> None:
        """Hand on a line; the traceback of an error comes with the error."""
        if level == "info":
            self._progress.info(text)
        elif level == "warning":
            self._progress.warn(text)
        elif level == "output":
            sys.stderr.write(text + "\n")
