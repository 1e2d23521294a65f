"""Write a comparison of runs as one self-contained HTML page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.report.comparison import Comparison, ScoreRow, difference_text, label_text, value_text
from pipeline.report.page import write_template


def write_page(found: Comparison, out: Path) -> Path:
    """Write ``found`` to ``out``, atomically.

    Raises:
        OSError: ``out`` cannot be written.
    """
    classes = {label_text(rows[0]): _lines(rows) for rows in found.rows_by_metric().values()}
    lines = _lines(found.rows)
    return write_template("comparison.html", out, runs=found.runs, lines=lines, classes=classes, notes=found.notes)


def _lines(rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    """The rows of a table, each with one cell a run; a difference whose interval leaves out zero has a sign."""
    lines = []
    for row in rows:
        cells = []
        for place, difference in enumerate(row.differences):
            limits = None if difference is None else difference.interval
            sign = "" if limits is None else "better" if limits.low > 0 else "worse" if limits.high < 0 else ""
            cells.append({"value": value_text(row, place), "difference": difference_text(row, place), "sign": sign})
        images = "" if row.num_images is None else str(row.num_images)
        lines.append({"label": row.class_name or label_text(row), "images": images, "cells": cells})
    return lines
