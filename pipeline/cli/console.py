"""Show a run to the person who started it: stages, progress with the time left, warnings, and the table of results.

Writes to one rich console: a live bar on a terminal, elsewhere plain lines at most every ten seconds.
The console is stdout, or stderr where stdout belongs to ``--json``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from pipeline.engine.outcomes import Pace, StageOutcome, StageStatus
from pipeline.report.tables import STEP_HEAD, describe_value, format_seconds, metric_rows, step_rows
from stages.errors import printable

PLAIN_LINE_EVERY_S = 10.0
"""Least time between two progress lines where there is no terminal."""

STATE_STYLES: Mapping[str, str] = {
    **dict.fromkeys(("built", "resumed"), "green"),
    "cached": "cyan",
    "skipped": "dim",
    "failed": "bold red",
}
HEADLINES: Mapping[str, tuple[str, ...]] = {
    "train_classifier": ("classifier.map",),
    "make_masks": ("masks.coverage",),
    "evaluate": ("segmenter.miou", "localization.top1_loc"),
}
"""Metrics that stand beside a finished stage; all are in the table at the end."""
_PLAN_TITLES = {
    "cached": "in the store",
    "partial": "to continue",
    "missing": "to build",
    "damaged": "to build",
    "skipped": "not needed",
}


def make_console(*, is_json: bool) -> Console:
    """The console for people: stdout, or stderr when stdout is for one JSON document."""
    stream = sys.stderr if is_json else sys.stdout
    # Without a terminal rich assumes 80 columns and would break paths; a log file has no width.
    return Console(file=stream, highlight=False, soft_wrap=True, width=None if stream.isatty() else 160)


class ConsoleListener:
    """Follows a run, or one stage function in this process, and writes it to a console."""

    def __init__(self, console: Console, stages: Sequence[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with the names of all ``stages``, which are numbered in this order."""
        self.outcomes: list[StageOutcome] = []
        """Every finished stage, also when the run fails later."""
        self.warnings: list[str] = []
        """Every warning, in order."""
        self._console, self._stages, self._clock = console, tuple(stages), clock
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        self._stage = ""
        self._pace = Pace()
        self._last_line = 0.0

    def stage_started(self, stage: str, key: str = "") -> None:
        """Follow ``stage`` from here on."""
        del key
        self.close()  # a second live bar beside an open one is an error of rich's older versions
        self._stage, self._pace, self._last_line = stage, Pace(), self._clock()
        if self._console.is_terminal:
            tail = TextColumn("{task.fields[tail]}", style="dim")
            columns = (TextColumn("  {task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), tail)
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar_task = self._bar.add_task(self._label(stage), total=None, tail="")
            self._bar.start()

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        """Show that ``done`` of ``total`` units of ``task`` are done."""
        now = self._clock()
        left_s = self._pace.left_s(task, total, done, now)
        left = [] if left_s is None else [f"{format_seconds(left_s)} left"]
        tail = ", ".join([unit, *(describe_value(name, value) for name, value in values.items()), *left])
        label = f"{self._label(self._stage)}: {escape(task)}"
        if self._bar is not None:
            self._bar.update(self._bar_task, description=label, total=total, completed=done, tail=tail)
        elif now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            self._console.print(f"  {label} {done}/{total} {tail}")

    def info(self, text: str, *, style: str = "dim") -> None:
        """Write one line of the stage that runs."""
        stage = f"{self._stage}: " if self._stage else ""  # before the first stage there is none
        self._console.print(f"  {stage}{printable(text)}", style=style, markup=False)

    def warn(self, text: str) -> None:
        """Write one line and keep it."""
        self.warnings.append(text)
        self.info(f"warning: {text}", style="yellow")

    def output(self, text: str) -> None:
        """Write what a library printed."""
        self.info(text)

    def stage_finished(self, outcome: StageOutcome) -> None:
        """Write the stage's line: state, seconds, headline metrics."""
        self.close()
        self.outcomes.append(outcome)
        seconds = "" if outcome.state == "skipped" else format_seconds(outcome.seconds)
        names = HEADLINES.get(outcome.stage, ())
        shown = {name: outcome.metrics[name] for name in names if name in outcome.metrics}
        metrics = ", ".join(f"{row.group} {row.label} {row.text}" for row in metric_rows(shown))
        state = f"[{STATE_STYLES[outcome.state]}]{outcome.state:8}[/]"
        self._console.print(f"{self._label(outcome.stage):24}{state} {seconds:>10}  {metrics}".rstrip())

    def close(self) -> None:
        """Take the live bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def _label(self, stage: str) -> str:
        is_numbered = stage in self._stages
        return f"{self._stages.index(stage) + 1}/{len(self._stages)} {stage}" if is_numbered else stage


def print_plan(
    console: Console, stages: Sequence[StageStatus], *, forced: int, last_time: Callable[[str], float | None]
) -> None:
    """Say before the start what is in the store and what will be built, with the time that took on this machine.

    From the position ``forced`` on, stages are built whatever is there; ``last_time`` gives a stage's seconds, None
    where it was never built here.
    """
    groups: dict[str, list[str]] = {}
    for position, stage in enumerate(stages):
        is_forced = position >= forced and stage.state != "skipped"
        title = "to build" if is_forced else _PLAN_TITLES[stage.state]
        text = stage.stage
        if title.startswith("to "):
            seconds = last_time(text)
            known = "not yet built here" if seconds is None else f"last time on this machine: {format_seconds(seconds)}"
            text += f" ({known})"
        groups.setdefault(title, []).append(text)
    for title, names in groups.items():
        console.print(f"{title + ':':14}{', '.join(names)}")


def print_metrics(console: Console, metrics: Mapping[str, Any]) -> None:
    """The table of numbers in percent, then what each step of the masks is worth, then the IoU of every class."""
    tables: list[Table] = []
    rows = metric_rows(metrics)
    if rows:
        has_intervals = any(row.interval for row in rows)
        tables.append(make_table("", "metric", ">value", *([">95 %"] if has_intervals else [])))
        for row, before in zip(rows, ["", *(row.group for row in rows)], strict=False):
            group = row.group if row.group != before else ""
            tables[-1].add_row(group, escape(row.label), row.text, *([row.interval] if row.interval else []))
    steps = step_rows(metrics)
    if steps:
        tables.append(make_table("pseudo-masks after", *(f">{title}" for title in STEP_HEAD[1:])))
        for step in steps:
            tables[-1].add_row(*step.cells)
    for name, values in metrics.items():
        if isinstance(values, Mapping) and values:
            tables.append(make_table(escape(name), ">IoU"))
            # background first, as in every table of the field; JSON has sorted the names
            for label, value in sorted(values.items(), key=lambda item: item[0] != "background"):
                tables[-1].add_row(escape(label), "–" if value is None else f"{value * 100:.1f} %")
    for table in tables:
        console.print()
        console.print(table)


def make_table(*titles: str) -> Table:
    """A plain table; columns whose title begins with ``>`` are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left")
    return table


def print_end(console: Console, warnings: Sequence[tuple[str, str]], report: Path | None) -> None:
    """The (stage, warning) pairs once more, then where the report is."""
    if warnings:
        console.print(f"\n{len(warnings)} warning{'s' if len(warnings) > 1 else ''}:", style="yellow")
        for stage, text in warnings:
            console.print(f"  - {stage}: {text}", style="yellow", markup=False)
    if report is not None:
        console.print(f"\nreport: {report}", markup=False)
