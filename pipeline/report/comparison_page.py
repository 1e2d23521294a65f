"""Write a comparison of runs as one self-contained HTML page.

Reads nothing; writes one HTML file that needs no network and no script, and escapes what comes from the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pipeline.report.comparison import Comparison, ScoreRow
from pipeline.report.comparison_text import difference_text, label_text, value_text
from stages.contracts import write_atomic


@dataclass(frozen=True)
class Cell:
    """One run's score in the page."""

    value: str
    difference: str
    sign: str
    """``better`` or ``worse`` where the interval of the difference leaves out zero, else empty."""


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    label: str
    images: str
    cells: tuple[Cell, ...]


def write_page(found: Comparison, out: Path) -> Path:
    """Write ``found`` to ``out``, atomically.

    Raises:
        OSError: ``out`` cannot be written.
    """
    loader = jinja2.PackageLoader("pipeline.report", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    metrics = list(dict.fromkeys(row.metric for row in found.class_rows))
    classes = {metric: [row for row in found.class_rows if row.metric == metric] for metric in metrics}
    context = {
        "runs": found.runs,
        "lines": _lines(found.rows),
        "classes": {label_text(rows[0]): _lines(rows) for rows in classes.values()},
        "notes": found.notes,
    }
    write_atomic(out, environment.get_template("comparison.html").render(context).encode())
    return out


def _lines(rows: Sequence[ScoreRow]) -> list[Line]:
    return [
        Line(
            label=row.class_name or label_text(row),
            images="" if row.num_images is None else str(row.num_images),
            cells=tuple(_cell(row, place) for place in range(len(row.values))),
        )
        for row in rows
    ]


def _cell(row: ScoreRow, place: int) -> Cell:
    found = row.differences[place]
    limits = found.interval if found is not None else None
    sign = "" if limits is None else "better" if limits.low > 0 else "worse" if limits.high < 0 else ""
    return Cell(value_text(row, place), difference_text(row, place), sign)
