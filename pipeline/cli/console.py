"""Show a run to the person who started it: stages, progress with the time left, warnings, and the table of results.

Writes to one rich console; on a terminal a live bar, elsewhere plain lines at most every ten seconds.
The console is stdout, or stderr where stdout belongs to ``--json``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from pipeline.engine.countdown import Pace
from pipeline.engine.estimate import Estimate, describe_disk, describe_stage, describe_time
from pipeline.report.step_rows import HEAD, StepRow, step_rows
from pipeline.report.tables import describe_value, format_seconds, metric_rows

if TYPE_CHECKING:
    from pipeline.engine.run import StageOutcome, StageStatus

PLAIN_LINE_EVERY_S = 10.0
"""Least time between two progress lines where there is no terminal."""

STATE_STYLES: Mapping[str, str] = {
    "built": "green",
    "resumed": "green",
    "helped": "green",
    "cached": "cyan",
    "skipped": "dim",
    "partial": "yellow",
    "missing": "yellow",
    "damaged": "red",
    "failed": "bold red",
}
HEADLINES: Mapping[str, tuple[str, ...]] = {
    "train_classifier": ("classifier.map",),
    "make_masks": ("masks.coverage",),
    "evaluate": ("segmenter.miou", "localization.top1_loc"),
}
"""Metrics that stand beside a finished stage; all are in the table at the end."""


def make_console(*, is_json: bool) -> Console:
    """The console for people: stdout, or stderr when stdout is for one JSON document."""
    stream = sys.stderr if is_json else sys.stdout
    # Without a terminal rich assumes 80 columns and would break paths; a log file has no width.
    return Console(file=stream, highlight=False, soft_wrap=True, width=None if stream.isatty() else 160)


class ConsoleListener:
    """Follows a run and writes it to a console."""

    def __init__(self, console: Console, stages: Sequence[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with the names of all ``stages``, which are numbered in this order."""
        self.outcomes: list[StageOutcome] = []
        """Every finished stage, also when the run fails later."""
        self._console, self._stages, self._clock = console, tuple(stages), clock
        self._bar: Progress | None = None
        self._bar_task: TaskID | None = None
        self._stage = ""
        self._pace = Pace()
        self._last_line = 0.0

    # -- the listener's protocol --------------------------------------------------------------------------------------

    def stage_started(self, stage: str, key: str) -> None:
        """Begin to follow ``stage``; what was followed before is closed."""
        del key
        self.close()  # a second live bar beside an open one is an error of rich's older versions
        self._stage, self._pace = stage, Pace()
        self._last_line = self._clock()
        if not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tail]}", style="dim"),
            console=self._console,
            transient=True,
        )
        self._bar_task = self._bar.add_task(self._label(stage), total=None, tail="")
        self._bar.start()

    def progress(self, task: str, total: int, done: int, unit: str, values: Mapping[str, float]) -> None:
        """Show that ``done`` of ``total`` units of ``task`` are done."""
        now = self._clock()
        tail = _tail(unit, self._pace.left_s(task, total, done, now), values)
        label = f"{self._label(self._stage)}: {escape(task)}"
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, description=label, total=total, completed=done, tail=tail)
        elif now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            self._console.print(f"  {label} {done}/{total} {tail}")

    def log(self, level: str, text: str) -> None:
        """Write one line of the stage that runs."""
        if level == "error":
            return  # the traceback of a fault, which main prints when it ends the command
        is_warning = level == "warning"
        stage = f"{self._stage}: " if self._stage else ""  # before the first stage there is none
        line = f"  {stage}{'warning: ' if is_warning else ''}{text}"
        self._console.print(line, style="yellow" if is_warning else "dim", markup=False)

    def stage_finished(self, outcome: StageOutcome) -> None:
        """Write the stage's line: state, seconds, headline metrics."""
        self.close()
        self.outcomes.append(outcome)
        style = STATE_STYLES.get(outcome.state, "")
        seconds = "" if outcome.state == "skipped" else format_seconds(outcome.seconds)
        names = HEADLINES.get(outcome.stage, ())
        shown = {name: outcome.metrics[name] for name in names if name in outcome.metrics}
        metrics = ", ".join(f"{row.group} {row.label} {row.text}" for row in metric_rows(shown))
        line = f"{self._label(outcome.stage):24}[{style}]{outcome.state:8}[/] {seconds:>10}  {metrics}"
        self._console.print(line.rstrip())

    def close(self) -> None:
        """Take the live bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._bar_task = None, None

    def _label(self, stage: str) -> str:
        if stage not in self._stages:
            return stage
        return f"{self._stages.index(stage) + 1}/{len(self._stages)} {stage}"


def _tail(unit: str, left_s: float | None, values: Mapping[str, float]) -> str:
    parts = [unit, *(describe_value(name, value) for name, value in values.items())]
    if left_s is not None:
        parts.append(f"{format_seconds(left_s)} left")
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Before and after
# ---------------------------------------------------------------------------------------------------------------------


_PLAN_TITLES = {
    "cached": "in the store",
    "partial": "to continue",
    "missing": "to build",
    "damaged": "to build",
    "skipped": "not needed",
}


def print_plan(console: Console, stages: Sequence[StageStatus], *, forced: int, found: Estimate | None = None) -> None:
    """Say before the start what will be built, about how long that takes, and what is there already.

    Args:
        console: Where to.
        stages: The stages of the run in order.
        forced: Position of the first stage that is built whatever is there; past the end when none is.
        found: The estimate of those that will be built.
    """
    found = found or {}
    groups: dict[str, list[str]] = {}
    for position, stage in enumerate(stages):
        is_forced = position >= forced and stage.state != "skipped"
        groups.setdefault("to build" if is_forced else _PLAN_TITLES[stage.state], []).append(
            f"{stage.stage} ({describe_stage(found[stage.stage])})" if stage.stage in found else stage.stage
        )
    lines = {title: ", ".join(names) for title, names in groups.items()}
    if found:
        lines["time"] = describe_time(found)
        lines["disk"] = describe_disk(found) or ""
    for title, text in lines.items():
        if text:
            console.print(f"{title + ':':14}{text}")


def print_metrics(console: Console, metrics: Mapping[str, Any]) -> None:
    """The table of numbers in percent, then what each step of the masks is worth, then the IoU of every class."""
    rows = metric_rows(metrics)
    if rows:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        table.add_column("metric")
        table.add_column("value", justify="right")
        if any(row.interval for row in rows):
            table.add_column("95 %", justify="right")
        groups = [""] + [row.group for row in rows]
        for row, before in zip(rows, groups, strict=False):
            group = row.group if row.group != before else ""
            table.add_row(group, escape(row.label), row.text, *([row.interval] if row.interval else []))
        console.print()
        console.print(table)
    _print_steps(console, step_rows(metrics))
    for name, value in metrics.items():
        if isinstance(value, Mapping) and value:
            _print_classes(console, name, value)


def _print_steps(console: Console, rows: Sequence[StepRow]) -> None:
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, title in enumerate(HEAD):
        table.add_column("pseudo-masks after" if place == 0 else title, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row.cells)
    console.print()
    console.print(table)


def _print_classes(console: Console, name: str, values: Mapping[str, float | None]) -> None:
    """One line per class of a metric that has a value for each, such as ``segmenter.iou``."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(escape(name))
    table.add_column("IoU", justify="right")
    # background first, as in every table of the field; JSON has sorted the names
    for label, value in sorted(values.items(), key=lambda item: item[0] != "background"):
        table.add_row(escape(label), "–" if value is None else f"{value * 100:.1f} %")
    console.print()
    console.print(table)


def print_end(console: Console, warnings: Sequence[tuple[str, str]], report: Path | None) -> None:
    """The (stage, warning) pairs once more, then where the report is."""
    if warnings:
        console.print(f"\n{len(warnings)} warning{'s' if len(warnings) > 1 else ''}:", style="yellow")
        for stage, text in warnings:
            console.print(f"  - {stage}: {text}", style="yellow", markup=False)
    if report is not None:
        console.print(f"\nreport: {report}", markup=False)


class ConsoleProgress:
    """A stage's Progress that is shown by a listener, for work done in this process."""

    def __init__(self, listener: ConsoleListener, stage: str) -> None:
        """Show everything under the name ``stage``."""
        self.warnings: list[str] = []
        self._listener, self._stage = listener, stage
        self._task, self._unit = "", ""
        self._total = self._done = 0

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        """Show where ``task`` stands."""
        if task != self._task:
            self.begin(task, total=total, done=done, unit=unit)
        self._listener.progress(task, total, done, unit, values)

    def begin(self, task: str, *, total: int, done: int = 0, unit: str = "images") -> None:
        """Start a countable task."""
        self._task, self._unit, self._total, self._done = task, unit, total, done
        self._listener.stage_started(self._stage, "")

    def advance(self, count: int = 1, **values: float) -> None:
        """Count finished units."""
        self._done += count
        self._listener.progress(self._task, self._total, self._done, self._unit, values)

    def info(self, text: str) -> None:
        """Say one line."""
        self._listener.log("info", text)

    def warn(self, text: str) -> None:
        """Say one line and keep it."""
        self.warnings.append(text)
        self._listener.log("warning", text)
