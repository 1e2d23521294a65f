"""What a flow shows in Prefect's UI beside its states: its name, and a page with numbers, pictures and the report.

Prefect is imported only where a server is spoken to.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.engine.outcomes import StageOutcome
from pipeline.report.tables import STEP_HEAD, format_seconds, format_value, metric_rows, step_rows

FILES_URL = "WSSS_FILES_URL"
"""Variable with the URL under which a web server of yours has the store's ``reports`` folder."""
HEADLINE = ("attention.miou", "masks.miou", "segmenter.miou", "segmenter.miou_ms", "localization.top1_loc")


def name_run(name: str) -> None:
    """Give the flow run of this context a name that says what it makes."""
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.name == name:
        return
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:  # a name is not worth a run
        client.update_flow_run(context.flow_run.id, name=name)


def headline(stages: Sequence[StageOutcome]) -> str:
    """The numbers that a run is for, in one line; without scores what became of its last stage."""
    metrics = {name: value for stage in stages for name, value in stage.metrics.items()}
    rows = metric_rows({name: metrics[name] for name in HEADLINE if name in metrics})
    scores = ", ".join(f"{row.group.lower()} {row.label} {row.text}" for row in rows)
    return scores or f"{stages[-1].stage} {stages[-1].state}"


def show_result(
    name: str,
    title: str,
    command: str,
    stages: Sequence[StageOutcome],
    report: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Put the page of a run beside its flow run; a server that hiccups costs the page, not the run.

    Args:
        name: What the page is about; pages of one name are versions of each other.
        title: Of the page.
        command: The same run from a command line.
        stages: What became of each stage.
        report: Its report.
        picture: Examples as a PNG.
    """
    from prefect import get_run_logger
    from prefect.artifacts import create_markdown_artifact

    key = re.sub(r"[^a-z0-9]+", "-", f"result-{name}".lower()).strip("-")
    page = write_page(title, command, stages, report, picture)
    try:
        create_markdown_artifact(page, key=key, description=f"{title}: stages, numbers, IoU of every class")
    except Exception as error:
        get_run_logger().warning("the page of results could not be sent to the server: %s", error)


def write_page(
    title: str,
    command: str,
    stages: Sequence[StageOutcome],
    report: Path | None = None,
    picture: Path | None = None,
) -> str:
    """The page as Markdown; a file is a link where WSSS_FILES_URL is set, else the report's path."""
    metrics = {name: value for stage in stages for name, value in stage.metrics.items()}
    base = os.environ.get(FILES_URL, "").rstrip("/")
    link = report is not None and (f"[{base}/{report.name}]({base}/{report.name})" if base else f"`{report}`")
    shown = (
        picture is not None and base and f"![image, attention, pseudo-mask, prediction, truth]({base}/{picture.name})"
    )
    warnings = "".join(f"- **{stage.stage}**: {_escape(text)}\n" for stage in stages for text in stage.warnings)
    numbers = [[row.group, row.label, row.text, row.meaning] for row in metric_rows(metrics)]
    iou: Mapping[str, float] = metrics.get("segmenter.iou") or {}
    by_class = sorted(iou.items(), key=lambda entry: entry[0] != "background")  # background first
    ends: list[list[Any]] = [
        [stage.stage, stage.state, format_seconds(stage.seconds), stage.key or "", stage.path or ""] for stage in stages
    ]
    parts = [
        f"# {_escape(title)}\n\n`{command}`\n",
        f"- report: {link}\n" if link else "",
        f"{shown}\n" if shown else "",
        _table("Numbers", ("", "Number", "Value", "Meaning"), numbers),
        _table("Pseudo-masks after each step", STEP_HEAD, [row.cells for row in step_rows(metrics)]),
        _table(
            "IoU of every class (segmenter, single scale, val)",
            ("Class", "IoU"),
            [[name, format_value(value, "percent")] for name, value in by_class],
        ),
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
