"""``wsss runs``: the runs of a store, by the names that other commands take."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Annotated

import typer

from pipeline.cli.options import ArtifactsOption, JsonOption
from pipeline.cli.output import get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS

HEADLINES = ("segmenter.miou", "segmenter.miou_ms", "masks.miou", "attention.miou", "localization.top1_loc")
"""Metrics that stand beside a run, as far as it has them."""
SHOWN = 3
"""So many of them."""


def runs(
    context: typer.Context,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Show the newest so many.")] = 20,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """The runs in the store, newest first: name, when, state, metrics.

    A name, its beginning, or last stands for CONFIG in every command.
    """
    from pipeline.engine.records import read_runs
    from pipeline.report.tables import format_time, metric_rows
    from pipeline.store.artifacts import open_store
    from pipeline.store.mirror import MANIFEST
    from stages.errors import DamagedFileError

    output = get_output(context)
    store, odd = open_store(artifacts), list[str]()
    found = read_runs(store, damaged=odd.append)
    output.document = {"runs": [], "unreadable": odd}
    for record in found[:limit]:
        state = "killed" if record.state == "running" and not record.is_alive() else record.state
        metrics, damaged = dict[str, object](), dict[str, str]()
        for stage, key in record.keys.items():
            try:
                metrics |= store.manifest(stage, key)["run"].get("metrics") or {}
            except DamagedFileError as error:
                if os.path.lexists(store.path(stage, key) / MANIFEST):  # else not built yet, or pruned
                    damaged[stage] = error.message
        entry = {"run": record.path.stem, "name": record.name, "started": record.started, "state": state}
        entry = {**entry, "stages": list(record.keys), "metrics": metrics, "damaged": damaged}
        output.document["runs"].append(entry)
        rows = metric_rows({name: metrics[name] for name in HEADLINES if name in metrics})[-SHOWN:]
        shown = ", ".join(f"{row.group} {row.label} {row.text}" for row in rows)
        when = format_time(datetime.fromisoformat(record.started).isoformat(timespec="seconds"))
        output.tell(f"{record.path.stem:44}  {when:20}  {state:11}  {shown}".rstrip())
        for stage, problem in damaged.items():
            output.tell(f"  warning: without the metrics of {stage}: {problem}")
    if len(found) > limit:
        output.tell(f"and {len(found) - limit} more; show them with -n {len(found)}")
    for text in odd:
        output.tell(f"  warning: {text}")
    if not found:
        output.tell(f"no runs in {artifacts}")
