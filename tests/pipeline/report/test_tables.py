"""What each step of the pseudo-masks is worth: on Prefect's page, in the terminal, and as rows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.cli.console import print_metrics
from pipeline.engine.outcomes import StageOutcome
from pipeline.flows.pages import write_page
from pipeline.report.tables import STEPS, step_label, step_rows

METRICS: dict[str, Any] = {
    "masks.miou": 0.432,
    STEPS: [
        {"step": "threshold", "miou": 0.4, "coverage": 1.0, "miou_labelled": 0.4},
        {"step": "random_walk", "miou": 0.45, "coverage": 0.9, "miou_labelled": 0.5},
        {"step": "new_one", "miou": 0.432, "coverage": 0.0},
    ],
}


def test_rows_say_the_change_against_the_step_before() -> None:
    assert [row.cells for row in step_rows(METRICS)] == [
        ("threshold rule", "40.0 %", "", "40.0 %", "100.0 %"),
        ("random walk", "45.0 %", "+5.0", "50.0 %", "90.0 %"),
        ("new one", "43.2 %", "-1.8", "–", "0.0 %"),
    ]
    assert [round(row.bar, 6) for row in step_rows(METRICS)] == [40, 45, 43.2]
    assert step_label("par") == "pixel-adaptive"


def test_no_steps_are_no_rows() -> None:
    assert step_rows({"masks.miou": 0.4}) == []


def test_prefect_s_page_has_the_steps_in_their_order() -> None:
    page = write_page("x", "y", [StageOutcome("evaluate", "k", Path("p"), "built", 1.0, METRICS)])
    start = page.index("## Pseudo-masks after each step")
    assert page[start:].splitlines()[2:7] == [
        "| Step | mIoU | Change | mIoU, sure pixels | Coverage |",
        "| --- | --- | --- | --- | --- |",
        "| threshold rule | 40.0 % |  | 40.0 % | 100.0 % |",
        "| random walk | 45.0 % | +5.0 | 50.0 % | 90.0 % |",
        "| new one | 43.2 % | -1.8 | – | 0.0 % |",
    ]
    page = write_page("x", "y", [StageOutcome("evaluate", "k", Path("p"), "built", 1.0, {"masks.miou": 0.4})])
    assert "each step" not in page


def test_the_terminal_has_a_table_of_the_steps_after_the_numbers() -> None:
    console = Console(file=(file := io.StringIO()), width=120)
    print_metrics(console, METRICS)
    rows = [line.split() for line in file.getvalue().splitlines() if line.strip()]
    assert rows[1] == ["Pseudo-masks", "mIoU", "43.2", "%"]
    assert rows[2:] == [
        ["pseudo-masks", "after", "mIoU", "Change", "mIoU,", "sure", "pixels", "Coverage"],
        ["threshold", "rule", "40.0", "%", "40.0", "%", "100.0", "%"],
        ["random", "walk", "45.0", "%", "+5.0", "50.0", "%", "90.0", "%"],
        ["new", "one", "43.2", "%", "-1.8", "–", "0.0", "%"],
    ]
