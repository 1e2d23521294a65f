"""``wsss run``, ``stage``, ``status`` and ``report``: build a config's artifacts and look at them."""

from __future__ import annotations

import dataclasses
import enum
import os
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import (
    ArtifactsOption,
    ConfigArgument,
    JsonOption,
    OverridesOption,
    PageColours,
    PaletteOption,
    as_path,
)
from pipeline.cli.output import get_output, load_run, run_document
from pipeline.engine.invocation import DEFAULT_ARTIFACTS, write_invocation
from stages.errors import MissingArtifactError

if TYPE_CHECKING:
    from pipeline.engine.outcomes import RunOutcome


class EngineName(enum.StrEnum):
    """What drives a run."""

    AUTO = "auto"
    LOCAL = "local"
    PREFECT = "prefect"


def run(
    context: typer.Context,
    config: ConfigArgument,
    overrides: OverridesOption = None,
    from_: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="First stage to run.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Last stage to run.")] = None,
    force: Annotated[
        list[str] | None, typer.Option("--force", metavar="STAGE", help="Rebuild STAGE and all after it; repeatable.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option("--engine", help="auto is prefect where PREFECT_API_URL is set, else local.")
    ] = EngineName.AUTO,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Run a config to its mIoU; what is in the store is reused."""
    output = get_output(context)
    output.document = run_document(config)
    run_config = load_run(config, overrides, artifacts)

    from pipeline.cli.console import ConsoleListener, make_console, print_end, print_metrics, print_plan
    from pipeline.delivery.submission import archive_command
    from pipeline.engine.forecast import last_time
    from pipeline.engine.run import Run, stage_positions
    from pipeline.engine.stage_table import TABLE
    from pipeline.engine.tracking import check_trackers
    from pipeline.flows.embedded_server import prepared_flow
    from pipeline.report.page import ensure_report
    from pipeline.store.artifacts import open_store

    check_trackers(run_config.track)  # a Prefect server would start before the run itself asks
    store = open_store(artifacts)
    first, last, forced = stage_positions(TABLE, from_, until, force or ())
    console = make_console(is_json=output.is_json)
    invocation = write_invocation(config, overrides, artifacts)
    listener = ConsoleListener(console, TABLE.names)
    described = Run(run_config, store, listener=listener, invocation=invocation)
    stages, plan = described.status()[: last + 1], described.plan
    known = partial(last_time, store, device=run_config.runtime.device)
    print_plan(console, stages, forced=max(first, forced), last_time=known)
    page: Path | None = None

    def write_page(outcome: RunOutcome) -> None:
        nonlocal page
        page = ensure_report(run_config, plan, store, outcome, invocation)

    is_local = engine is EngineName.LOCAL or (engine is EngineName.AUTO and not os.environ.get("PREFECT_API_URL"))
    try:
        if is_local:
            outcome = described.run_pipeline(from_=from_, until=until, force=force or (), then=write_page)
        else:
            with prepared_flow() as run_flow:
                outcome = run_flow(described, config, overrides or (), from_=from_, until=until, force=force or ())
                write_page(outcome)
    finally:
        listener.close()
        output.document = run_document(config, stages=listener.outcomes)
    output.document = run_document(config, outcome.run_id, outcome.stages, page)
    print_metrics(console, outcome.metrics)
    print_end(console, [(stage.stage, text) for stage in outcome.stages for text in stage.warnings], page)
    if page is not None and (archive := archive_command(run_config, invocation)) is not None:
        console.print(f"archive: {archive}", markup=False, soft_wrap=True)


def stage(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="STAGE", help="Stage to run; its inputs must be in the store.")],
    config: ConfigArgument,
    overrides: OverridesOption = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild it even if it is there.")] = False,
    part: Annotated[
        str | None, typer.Option(metavar="I/N|any", help="Build part I of N, or every part nobody holds.")
    ] = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Run one stage from cached inputs; exit 3 when one is missing.

    With --part, build a share of its images only; a run of the stage puts the parts together.
    """
    output = get_output(context)
    output.document = run_document(config)
    if part is not None and force:
        raise typer.BadParameter("a part is never built again alone; leave --force away", param_hint="--part")
    run_config = load_run(config, overrides, artifacts)

    from pipeline.cli.console import ConsoleListener, make_console, print_end, print_metrics
    from pipeline.engine.run import Run
    from pipeline.engine.stage_table import STAGES
    from pipeline.store.artifacts import open_store

    store, console = open_store(artifacts), make_console(is_json=output.is_json)
    listener = ConsoleListener(console, STAGES)
    described = Run(run_config, store, listener=listener, invocation=write_invocation(config, overrides, artifacts))
    try:
        num_parts = 0 if part is None else described.help_with(name, part)
        outcome = described.run_stage(name, force=force) if part is None else None
    finally:
        listener.close()
        output.document = run_document(config, stages=listener.outcomes)
    if outcome is None:
        output.document |= {"num_parts": num_parts}
        console.print(f"{name}: {num_parts} part{'' if num_parts == 1 else 's'} built here", markup=False)
        return
    output.document = run_document(config, outcome.run_id, outcome.stages)
    print_metrics(console, outcome.metrics)
    print_end(console, [(name, text) for text in outcome.stages[0].warnings], None)


def status(
    context: typer.Context,
    config: ConfigArgument,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Per stage: cached, partial, missing or damaged, with key, size and age."""
    output = get_output(context)
    output.document = {"config": config, "stages": []}
    run_config = load_run(config, overrides, artifacts)

    from pipeline.engine.run import Run
    from pipeline.report.tables import format_seconds, format_value
    from pipeline.store.artifacts import open_store

    for found in Run(run_config, open_store(artifacts)).status():
        began = None if found.built_at is None else datetime.fromisoformat(found.built_at)
        age_s = None if began is None else round(time.time() - began.timestamp(), 1)
        output.document["stages"].append({**dataclasses.asdict(found), "age_s": age_s})
        size = format_value(found.size_bytes, "bytes") if found.state == "cached" else ""
        age = "" if age_s is None else f"{format_seconds(age_s)} old"
        output.tell(f"{found.stage:18}{found.state:9}{found.key or '':22}{size:>8}  {age}".rstrip())


def report(
    context: typer.Context,
    config: ConfigArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", parser=as_path, help="The HTML file to write.")
    ] = None,
    palette: PaletteOption = PageColours.SAFE,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Write the self-contained HTML report of what the store holds for a config."""
    output = get_output(context)
    output.document = {"config": config, "report": None}
    run_config = load_run(config, overrides, artifacts)

    from pipeline.engine.run import Run
    from pipeline.report.page import report_path, write_report
    from pipeline.store.artifacts import open_store

    store = open_store(artifacts)
    invocation = write_invocation(config, overrides, artifacts)
    finished = Run(run_config, store)
    plan, found = finished.plan, finished.finished_artifacts()
    if "prepare_data" not in found:
        raise MissingArtifactError(f"nothing of {config} is in {artifacts} yet; build it with: wsss run {invocation}")
    path = out or report_path(run_config, plan, store, is_complete=plan.table.names[-1] in found)
    output.document["report"] = write_report(
        run_config,
        plan,
        store,
        list(found),
        path,
        invocation=invocation,
        palette=palette.value,
    )
    output.tell(f"report: {path}")
