"""Put the scores after each step of the pseudo-masks into rows: for the report, Prefect's page and the terminal.

Reads what ``evaluate`` says under ``masks.steps``; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.tables import format_value

STEPS = "masks.steps"
"""The metric: a list of the steps in order, each with ``step``, ``miou``, ``coverage`` and maybe ``miou_labelled``."""

HEAD = ("Step", "mIoU", "Change", "mIoU, sure pixels", "Coverage")
"""The columns of ``StepRow.cells``."""

STEP_LABELS: dict[str, str] = {
    "threshold": "threshold rule",
    "random_walk": "random walk",
    "par": "pixel-adaptive",
    "crf": "dense CRF",
}
"""What a step is called on pages and under pictures; one that is not here keeps its name."""


@dataclass(frozen=True)
class StepRow:
    """One line of the table of steps."""

    label: str
    miou: str
    change: str
    """Against the step before, in points of percent; empty for the first."""
    miou_labelled: str
    coverage: str
    bar: float
    """The mIoU in percent, 0 to 100."""

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts in the order of HEAD."""
        return (self.label, self.miou, self.change, self.miou_labelled, self.coverage)


def step_label(name: str) -> str:
    """What the step ``name`` is called."""
    return STEP_LABELS.get(name, name.replace("_", " "))


def step_rows(metrics: Mapping[str, Any]) -> list[StepRow]:
    """The rows of ``metrics[STEPS]``; none where no step was scored."""
    steps: Sequence[Mapping[str, Any]] = metrics.get(STEPS) or ()
    before = [None, *(step["miou"] for step in steps)]
    return [_row(step, last) for step, last in zip(steps, before, strict=False)]


def _row(step: Mapping[str, Any], before: float | None) -> StepRow:
    return StepRow(
        label=step_label(step["step"]),
        miou=format_value(step["miou"], "percent"),
        change="" if before is None else f"{(step['miou'] - before) * 100:+.1f}",
        miou_labelled=format_value(step.get("miou_labelled", float("nan")), "percent"),
        coverage=format_value(step["coverage"], "percent"),
        bar=step["miou"] * 100,
    )
