"""``wsss run``, ``stage``, ``status`` and ``report``: build a config's artifacts and look at them."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import (
    ArtifactsOption,
    ConfigArgument,
    ForceOption,
    JsonOption,
    OverridesOption,
)
from pipeline.cli.output import Output, get_output, run_document
from pipeline.engine.invocation import DEFAULT_ARTIFACTS, write_invocation
from pipeline.report.upkeep import ensure_report, folders, manifests, report_path

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.engine.run import StageStatus


class EngineName(enum.StrEnum):
    """What drives a run."""

    AUTO = "auto"
    LOCAL = "local"
    PREFECT = "prefect"


EngineOption = Annotated[
    EngineName, typer.Option("--engine", help="auto is prefect where PREFECT_API_URL is set, else local.")
]


def run(
    context: typer.Context,
    config: ConfigArgument,
    overrides: OverridesOption = None,
    from_: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="First stage to run.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Last stage to run.")] = None,
    force: ForceOption = None,
    engine: EngineOption = EngineName.AUTO,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Run a config to its mIoU; what is in the store is reused."""
    output = get_output(context)
    output.document = run_document(config)
    run_config = _load(config, overrides)

    from pipeline.cli.console import ConsoleListener, make_console, print_end, print_metrics, print_plan
    from pipeline.delivery.submission import archive_command
    from pipeline.engine.estimate import estimate
    from pipeline.engine.plan import plan_run
    from pipeline.engine.run import stage_positions, status
    from pipeline.engine.stage_table import TABLE
    from pipeline.flows.embedded_server import prepared_flow
    from pipeline.flows.engine_shim import Run
    from pipeline.store.artifacts import open_store

    store = open_store(artifacts)
    first, last, forced = stage_positions(TABLE, from_, until, force or ())
    plan = plan_run(run_config, store.digest_cache)
    console = make_console(is_json=output.is_json)
    stages, forced_from = status(run_config, store, plan=plan)[: last + 1], max(first, forced)
    print_plan(console, stages, forced=forced_from, found=estimate(plan, store, stages, forced=forced_from))
    listener = ConsoleListener(console, plan.table.names)
    invocation = write_invocation(config, overrides, artifacts)
    call = Run(run_config, store, listener, invocation, plan)
    is_local = engine is EngineName.LOCAL or (engine is EngineName.AUTO and not os.environ.get("PREFECT_API_URL"))
    try:
        if is_local:
            outcome = call.run_pipeline(from_=from_, until=until, force=force or ())
        else:
            with prepared_flow() as run_flow:
                outcome = run_flow(call, config, overrides or (), from_=from_, until=until, force=force or ())
    finally:
        listener.close()
        output.document = run_document(config, stages=listener.outcomes)
    report_path = ensure_report(run_config, plan, store, outcome)
    output.document = run_document(config, outcome.run_id, outcome.stages, report_path)
    print_metrics(console, outcome.metrics)
    warnings = [(stage.stage, text) for stage in outcome.stages for text in stage.warnings]
    print_end(console, warnings, report_path)
    archive = archive_command(run_config, invocation)
    if report_path is not None and archive is not None:
        console.print(f"archive: {archive}", markup=False, soft_wrap=True)


def stage(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="STAGE", help="Stage to run; its inputs must be in the store.")],
    config: ConfigArgument,
    overrides: OverridesOption = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild it even if it is there.")] = False,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Run one stage from cached inputs; exit 3 when one is missing."""
    output = get_output(context)
    output.document = run_document(config)
    run_config = _load(config, overrides)

    from pipeline.cli.console import ConsoleListener, make_console, print_end, print_metrics
    from pipeline.engine.run import run_stage
    from pipeline.engine.stage_table import STAGES
    from pipeline.store.artifacts import open_store

    console = make_console(is_json=output.is_json)
    listener = ConsoleListener(console, STAGES)
    try:
        outcome = run_stage(
            name,
            run_config,
            open_store(artifacts),
            force=force,
            listener=listener,
            invocation=write_invocation(config, overrides, artifacts),
        )
    finally:
        listener.close()
        output.document = run_document(config, stages=listener.outcomes)
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
    run_config = _load(config, overrides)

    from pipeline.engine.run import status as read_status
    from pipeline.store.artifacts import open_store

    stages = read_status(run_config, open_store(artifacts))
    output.document["stages"] = [_describe_status(found) for found in stages]
    if not output.is_json:
        _say_status(output, stages)


def report(
    context: typer.Context,
    config: ConfigArgument,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The HTML file to write.")] = None,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Write the self-contained HTML report of what the store holds for a config."""
    output = get_output(context)
    output.document = {"config": config, "report": None}
    run_config = _load(config, overrides)

    from pipeline.engine.run import finished_artifacts
    from pipeline.report.page import build_report
    from pipeline.store.artifacts import open_store
    from stages.errors import MissingArtifactError

    store = open_store(artifacts)
    plan, found = finished_artifacts(run_config, store)
    if "prepare_data" not in found:
        command = f"wsss run {write_invocation(config, overrides, artifacts)}"
        raise MissingArtifactError(f"nothing of {config} is in {artifacts} yet; build it with: {command}")
    found = {name: store.require(name, artifact.key) for name, artifact in found.items()}
    path = out or report_path(run_config, plan, store, is_complete=plan.table.names[-1] in found)
    build_report(run_config, folders(found), manifests(found), plan.data.root, path)
    output.document["report"] = path
    if not output.is_json:
        output.say(f"report: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _load(config: str, overrides: Sequence[str] | None) -> RunConfig:
    from pipeline.config.run_config import find_config, load_config

    return load_config(find_config(config), overrides or [])


def _describe_status(found: StageStatus) -> dict[str, Any]:
    return {
        "stage": found.stage,
        "state": found.state,
        "key": found.key,
        "path": found.path,
        "size_bytes": found.size_bytes,
        "built_at": found.built_at,
        "age_s": _age_s(found.built_at),
    }


def _age_s(built_at: str | None) -> float | None:
    from datetime import datetime

    return None if built_at is None else round(time.time() - datetime.fromisoformat(built_at).timestamp(), 1)


def _say_status(output: Output, stages: Sequence[StageStatus]) -> None:
    from pipeline.report.tables import format_seconds, format_value

    for found in stages:
        age = _age_s(found.built_at)
        size = format_value(found.size_bytes, "bytes") if found.state == "cached" else ""
        ago = "" if age is None else f"{format_seconds(age)} old"
        output.say(f"{found.stage:18}{found.state:9}{found.key or '':22}{size:>8}  {ago}".rstrip())
