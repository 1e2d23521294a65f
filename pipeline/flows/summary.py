"""What Prefect's UI shows of a run, as Markdown: stages, numbers, IoU of every class, and where to look further.

Pure: text in, text out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.engine.outcomes import StageOutcome
from pipeline.report.tables import STEP_HEAD, format_seconds, format_value, metric_rows, step_rows

CLASS_IOU = "segmenter.iou"
HEADLINE = ("attention.miou", "masks.miou", "segmenter.miou", "segmenter.miou_ms", "localization.top1_loc")


def summarise_run(
    title: str,
    command: str,
    stages: Sequence[StageOutcome],
    links: Mapping[str, str],
    *,
    picture: str | None = None,
) -> str:
    """The page of one run.

    Args:
        title: What was run, with its key.
        command: The same run from a command line.
        stages: What became of each stage.
        links: Title to URL or path.
        picture: URL of a picture of examples.
    """
    metrics = {name: value for stage in stages for name, value in stage.metrics.items()}
    places = "".join(f"- {name}: {_link(place)}\n" for name, place in links.items())
    shown = f"![examples: image, attention, pseudo-mask, prediction, truth]({picture})\n" if picture else ""
    warnings = "".join(f"- **{stage.stage}**: {_escape(text)}\n" for stage in stages for text in stage.warnings)
    parts = [
        f"# {_escape(title)}\n\n`{command}`\n",
        places,
        shown,
        _numbers(metrics),
        _table("Pseudo-masks after each step", STEP_HEAD, [row.cells for row in step_rows(metrics)]),
        _classes(metrics.get(CLASS_IOU)),
        _stages(stages),
        f"## Warnings\n\n{warnings}" if warnings else "",
    ]
    return "\n".join(part for part in parts if part)


def headline(stages: Sequence[StageOutcome]) -> str:
    """The numbers that a run is for, in one line; without scores what became of its last stage."""
    metrics = {name: value for stage in stages for name, value in stage.metrics.items()}
    rows = metric_rows({name: metrics[name] for name in HEADLINE if name in metrics})
    scores = ", ".join(f"{row.group.lower()} {row.label} {row.text}" for row in rows)
    return scores or f"{stages[-1].stage} {stages[-1].state}"


def _link(place: str) -> str:
    return f"[{place}]({place})" if place.startswith(("http://", "https://")) else f"`{place}`"


def _numbers(metrics: Mapping[str, Any]) -> str:
    rows = [[row.group, row.label, row.text, row.meaning] for row in metric_rows(metrics)]
    return _table("Numbers", ("", "Number", "Value", "Meaning"), rows)


def _classes(iou: Mapping[str, float] | None) -> str:
    by_class = sorted((iou or {}).items(), key=lambda entry: entry[0] != "background")  # background first
    rows = [[name, format_value(value, "percent")] for name, value in by_class]
    return _table("IoU of every class (segmenter, single scale, val)", ("Class", "IoU"), rows)


def _stages(stages: Sequence[StageOutcome]) -> str:
    rows = [
        [stage.stage, stage.state, format_seconds(stage.seconds), stage.key or "", str(stage.path or "")]
        for stage in stages
    ]
    return _table("Stages", ("Stage", "State", "Time", "Key", "Artifact"), rows)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *([_escape(cell) for cell in row] for row in rows)]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escape(text: str) -> str:
    """``text`` on one line of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
