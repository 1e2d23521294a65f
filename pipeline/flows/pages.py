"""What a flow shows in Prefect's UI: the line of its state, and a page with numbers, pictures and the report.

Imports no Prefect.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.engine.outcomes import StageOutcome
from pipeline.report.tables import STEP_HEAD, format_seconds, format_value, metric_rows, step_rows

HEADLINE = ("attention.miou", "masks.miou", "segmenter.miou", "segmenter.miou_ms", "localization.top1_loc")


def headline(stages: Sequence[StageOutcome]) -> str:
    """The numbers that a run is for, in one line; without scores what became of its last stage."""
    metrics = {name: value for stage in stages for name, value in stage.metrics.items()}
    rows = metric_rows({name: metrics[name] for name in HEADLINE if name in metrics})
    scores = ", ".join(f"{row.group.lower()} {row.label} {row.text}" for row in rows)
    return scores or f"{stages[-1].stage} {stages[-1].state}"


def write_page(
    title: str, command: str, stages: Sequence[StageOutcome], report: Path | None = None, picture: Path | None = None
) -> str:
    """The page as Markdown; the report is a link where WSSS_FILES_URL says where a web server has ``reports``."""
    metrics = {name: value for stage in stages for name, value in stage.metrics.items()}
    base = os.environ.get("WSSS_FILES_URL", "").rstrip("/")
    link = report is not None and (f"[{base}/{report.name}]({base}/{report.name})" if base else f"`{report}`")
    alt = "image, attention, pseudo-mask, prediction, truth"
    warnings = "".join(f"- **{stage.stage}**: {_escape(text)}\n" for stage in stages for text in stage.warnings)
    numbers = [[row.group, row.label, row.text, row.meaning] for row in metric_rows(metrics)]
    iou: Mapping[str, float] = metrics.get("segmenter.iou") or {}
    names = sorted(iou, key=lambda name: name != "background")  # background first
    by_class = [[name, format_value(iou[name], "percent")] for name in names]
    ends = [[end.stage, end.state, format_seconds(end.seconds), end.key or "", end.path or ""] for end in stages]
    parts = [
        f"# {_escape(title)}\n\n`{command}`\n",
        f"- report: {link}\n" if link else "",
        f"![{alt}]({base}/{picture.name})\n" if picture is not None and base else "",
        _table("Numbers", ("", "Number", "Value", "Meaning"), numbers),
        _table("Pseudo-masks after each step", STEP_HEAD, [row.cells for row in step_rows(metrics)]),
        _table("IoU of every class (segmenter, single scale, val)", ("Class", "IoU"), by_class),
        _table("Stages", ("Stage", "State", "Time", "Key", "Artifact"), ends),
        f"## Warnings\n\n{warnings}" if warnings else "",
    ]
    return "\n".join(part for part in parts if part)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *([_escape(str(cell)) for cell in row] for row in rows)]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escape(text: str) -> str:
    """``text`` on one line of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
