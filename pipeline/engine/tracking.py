"""A run in TensorBoard, Weights & Biases or MLflow: they hear the one stream of progress that everybody hears.

Curves are the values beside a stage's progress (``loss=…``), one point a second; numbers are the stages' metrics.
Each tracker's own variables say where it writes and as whom (``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI=…``); what
they leave open goes into the store.  Paths of the config are not sent.
A tracker works in a thread of its own, so that a slow server holds no training up, and one that fails is warned of once
and left out from then on.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from pipeline.engine.outcomes import Listener, StageOutcome
from stages.errors import ConfigError

PROJECT = "wsss"
"""The project (W&B) or experiment (MLflow) of every run whose user names no other one."""
POINT_EVERY_S = 1.0
"""Least time between two points of a curve; the first and the last one always count."""
CLOSE_TIMEOUT_S = 60.0
"""Most seconds that the end of a run waits for what is not yet sent."""


@dataclass(frozen=True)
class Point:
    """Numbers of one moment."""

    values: Mapping[str, float]
    curve: str = ""
    """The task whose curves these are points of, ``train_classifier``; empty for the metrics of a finished stage."""
    step: int = 0
    time_s: float = 0.0
    """Unix time."""


class Tracker(Protocol):
    """One run in one tracker; any call may raise whatever its library raises."""

    place: str
    """Where to look at it."""

    def log(self, points: Sequence[Point]) -> None:
        """Write what came since the last call."""
        ...

    def close(self, *, is_done: bool) -> None:
        """End the run there: done, or failed."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ConfigError: naming each, and how to install it.
    """
    missing = [name for name in dict.fromkeys(names) if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"track: {' and '.join(missing)} {verb} not installed; pip install 'wsss-pipeline[{','.join(missing)}]', "
            "or leave out with --set track=[]"
        )


@contextmanager
def tracked(
    listener: Listener, names: Sequence[str], *, config: BaseModel, name: str, folder: Path
) -> Iterator[Listener]:
    """``listener`` with the trackers beside it, until ``with`` ends.

    Args:
        listener: Hears everything as before, and of each tracker where it writes or why it does not.
        names: Of the trackers.
        config: Of the run, for their tables.
        name: Of the run there.
        folder: Where trackers write whose variables name no other place.
    """
    senders: list[_Sender] = []
    values = dict(_flatten(config.model_dump()))
    for tracker in dict.fromkeys(names):
        try:
            opened = _TRACKERS[tracker](name, values, folder)
        except Exception as error:  # libraries raise what they like
            listener.warn(_failed(tracker, error))
        else:
            senders.append(_Sender(tracker, opened))
            listener.info(f"{tracker}: {opened.place}")
    if not senders:
        yield listener
        return
    following = _TrackedListener(listener, senders)
    is_done = False
    try:
        yield following
        is_done = True
    finally:
        following.close(is_done=is_done)


def _failed(tracker: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{tracker} does not follow this run any more ({reason or type(error).__name__}); the run goes on without it"


class _Sender:
    """A tracker in its thread."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self._tracker = name, tracker
        self.error: Exception | None = None
        """What it failed with; nothing is sent from then on."""
        self._points: queue.SimpleQueue[Point | bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker {name}")
        self._thread.start()

    def send(self, point: Point) -> None:
        """Let the tracker have ``point`` soon."""
        self._points.put(point)

    def close(self, *, is_done: bool) -> None:
        """Send the rest and end the tracker's run; one that takes too long fails."""
        self._points.put(is_done)
        self._thread.join(timeout=CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self.error = TimeoutError(f"it does not answer within {CLOSE_TIMEOUT_S:.0f} s")

    def _work(self) -> None:
        try:
            while True:
                found = [self._points.get()]
                while not self._points.empty():
                    found.append(self._points.get())
                self._tracker.log([point for point in found if isinstance(point, Point)])
                if isinstance(found[-1], bool):
                    self._tracker.close(is_done=found[-1])
                    return
        except Exception as error:
            self.error = error


class _TrackedListener:
    """Passes everything on, and to the trackers what is a number."""

    def __init__(self, inner: Listener, senders: Sequence[_Sender]) -> None:
        self._inner, self._senders = inner, list(senders)
        self._curve = ""
        self._task, self._count, self._done = "", {}, 0
        self._held: Point | None = None
        self._sent_at = 0.0

    def stage_started(self, stage: str, key: str) -> None:
        self._task = ""
        self._inner.stage_started(stage, key)

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        self._inner.step(task, done, total, unit=unit, **values)
        is_new = task != self._task or done < self._done
        if is_new:
            self._flush()
            # a task that begins again, such as another round of a training, is another curve
            count = self._count[task] = self._count.get(task, 0) + 1
            self._curve = task.replace(" ", "_") + (f"_{count}" if count > 1 else "")
            self._sent_at = 0.0
        self._task, self._done = task, done
        if not values:
            return
        self._held = Point(dict(values), self._curve, done, time.time())
        # the last step is often told twice, at the end with what is known by then: it waits for the task's end
        if time.monotonic() - self._sent_at >= POINT_EVERY_S and done < total:
            self._flush()
            self._sent_at = time.monotonic()

    def info(self, text: str) -> None:
        self._inner.info(text)

    def warn(self, text: str) -> None:
        self._inner.warn(text)

    def output(self, text: str) -> None:
        self._inner.output(text)

    def stage_finished(self, outcome: StageOutcome) -> None:
        self._flush()
        numbers = {name: float(value) for name, value in _flatten(outcome.metrics) if isinstance(value, int | float)}
        if numbers:
            self._send(Point(numbers, time_s=time.time()))
        self._inner.stage_finished(outcome)

    def close(self, *, is_done: bool) -> None:
        """End the trackers' runs."""
        self._flush()
        for sender in self._senders:
            sender.close(is_done=is_done)
        self._warn_of_failures()

    def _flush(self) -> None:
        if self._held is not None:
            self._send(self._held)
        self._held = None

    def _send(self, point: Point) -> None:
        self._warn_of_failures()
        for sender in self._senders:
            sender.send(point)

    def _warn_of_failures(self) -> None:
        """Said from here, since Prefect's logger knows its run only in the thread of the run."""
        for sender in [sender for sender in self._senders if sender.error is not None]:
            self._senders.remove(sender)
            assert sender.error is not None
            self._inner.warn(_failed(sender.name, sender.error))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of the values in nested mappings, without paths: they are of this machine alone."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif value is not None and not isinstance(value, Path):
            yield f"{prefix}{name}", value


# ---------------------------------------------------------------------------------------------------------------------
# The trackers
# ---------------------------------------------------------------------------------------------------------------------


class _TensorBoard:
    """Event files, without torch."""

    def __init__(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]

        del config  # TensorBoard has no table for it; the run's record keeps it
        target = folder / "tensorboard"
        self._writer = Writer(str(target / name))
        self.place = f"tensorboard --logdir {target}"

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            prefix = f"{point.curve}/" if point.curve else ""
            for name, value in point.values.items():
                self._writer.add_scalar(prefix + name, value, point.step, wall_time=point.time_s)
        self._writer.flush()

    def close(self, *, is_done: bool) -> None:
        del is_done
        self._writer.close()


class _WeightsAndBiases:
    """A run of W&B: the tasks' curves against their own steps, metrics in its summary."""

    def __init__(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            config={key: list(value) if isinstance(value, tuple) else value for key, value in config.items()},
            dir=os.environ.get("WANDB_DIR", str(folder)),
            settings=wandb.Settings(console="off", quiet=True),  # stdout belongs to the run
        )
        self.place = str(self._run.settings.sync_dir if self._run.offline else self._run.url)
        self._curves: set[str] = set()

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            if not point.curve:
                self._run.summary.update(dict(point.values))
                continue
            if point.curve not in self._curves:
                self._curves.add(point.curve)
                self._run.define_metric(f"{point.curve}/*", step_metric=f"{point.curve}/step")
            values = {f"{point.curve}/{name}": value for name, value in point.values.items()}
            self._run.log({f"{point.curve}/step": point.step, **values})

    def close(self, *, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


class _MLflow:
    """A run of MLflow: config values as its parameters."""

    _PARAMS_AT_ONCE, _METRICS_AT_ONCE, _PARAM_LENGTH = 100, 1000, 500

    def __init__(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 would hold up the start for minutes
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._metric = Metric
        self.place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=self.place)
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(project)
        experiment_id = self._client.create_experiment(project) if found is None else found.experiment_id
        self._run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
        params = [Param(_mlflow_name(key), str(value)[: self._PARAM_LENGTH]) for key, value in config.items()]
        for first in range(0, len(params), self._PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=params[first : first + self._PARAMS_AT_ONCE])

    def log(self, points: Sequence[Point]) -> None:
        found = [
            self._metric(
                _mlflow_name(f"{point.curve}/{name}" if point.curve else name),
                value,
                int(point.time_s * 1000),
                point.step,
            )
            for point in points
            for name, value in point.values.items()
        ]
        for first in range(0, len(found), self._METRICS_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=found[first : first + self._METRICS_AT_ONCE])

    def close(self, *, is_done: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if is_done else "FAILED")


def _mlflow_name(name: str) -> str:
    """MLflow refuses other characters, which a class name may have."""
    return re.sub(r"[^\w./ -]", "_", name)


_TRACKERS: Mapping[str, Callable[[str, Mapping[str, Any], Path], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}
