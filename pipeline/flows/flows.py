"""The Prefect flows: ``wsss``, a whole run; ``wsss-stage``, one stage; ``wsss-shard``, a hand with another's stage.

They are the same runs as without Prefect, with one task run per stage to look at.  A flow ends as Failed with a message
whose first line says what to do.  Prefect is imported by the modules of this kind alone (``tasks``, ``flow_server``,
``recruiting``, ``deployments``), so whoever imports one has set Prefect's environment before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast
from uuid import UUID

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.states import Completed, Failed
from pydantic import Field

from pipeline.config.run_config import RunConfig
from pipeline.engine.invocation import DEFAULT_ARTIFACTS
from pipeline.engine.outcomes import Listener, RunOutcome, SilentListener
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.run import help_with, run_pipeline, run_stage
from pipeline.flows.pages import check_api, name_run, recorded, show_result, warn_of_other_code
from pipeline.flows.parameters import FlowCall, ShardedStage, Split, StageName
from pipeline.flows.recruiting import recruit_helpers
from pipeline.flows.summary import headline
from pipeline.flows.tasks import PrefectListener, run_as_task
from pipeline.report.page import ensure_picture, ensure_report, run_name
from pipeline.store.artifacts import Store, open_store
from stages.errors import WsssError

Shards = Annotated[int, Field(ge=1, le=4096)]


@dataclass
class _Session:
    """What a caller in the same process has beside the flow's parameters, which are JSON."""

    listener: Listener = field(default_factory=SilentListener)
    run: RunConfig | None = None
    plan: Plan | None = None
    flow_run_id: UUID | None = None


_session: ContextVar[_Session | None] = ContextVar("wsss_session", default=None)


@flow(name="wsss", persist_result=False, validate_parameters=True)
def wsss(
    config: str | RunConfig,
    overrides: list[str] | None = None,
    artifacts: str = DEFAULT_ARTIFACTS,
    from_stage: StageName | None = None,
    until: StageName | None = None,
    force: list[StageName] | None = None,
    splits: list[Split] | None = None,
    shards: Shards | None = None,
) -> Any:  # noqa: ANN401 - a RunOutcome, or the state of a failure
    """Raw images and image-level labels in, a measured mIoU out.

    Args:
        config: A YAML file on the worker, the name of a shipped config, or a whole config typed in here.
        overrides: Values of the config to replace, each a.b=value, for instance make_masks.threshold=0.2.
        artifacts: Root of the artifact store: a folder that every worker sees, or a URL such as s3://bucket/folder.
        from_stage: First stage to run; what it reads must be in the store.
        until: Last stage to run.
        force: Stages to rebuild, each with all after it.
        splits: Splits that the segmenter predicts, in place of the config's evaluate.splits; only val is scored.
        shards: Parts that attention and masks are made in, shared with every other idle worker.
    """
    call = FlowCall.of(config, overrides, artifacts, splits=splits, shards=shards)
    return _ended(partial(_run_all, call, from_stage, until, tuple(force or ())))


@flow(name="wsss-stage", persist_result=False, validate_parameters=True)
def wsss_stage(
    stage: StageName,
    config: str | RunConfig,
    overrides: list[str] | None = None,
    artifacts: str = DEFAULT_ARTIFACTS,
    force: bool = False,
    shards: Shards | None = None,
) -> Any:  # noqa: ANN401 - as above
    """One stage from what is in the store.

    Args:
        stage: The stage to run; what it reads must be in the store.
        config: A YAML file on the worker, the name of a shipped config, or a whole config typed in here.
        overrides: Values of the config to replace, each a.b=value.
        artifacts: Root of the artifact store: a folder that every worker sees, or a URL.
        force: Rebuild it even if it is there.
        shards: Parts that attention and masks are made in, shared with every other idle worker.
    """
    return _ended(partial(_run_one, FlowCall.of(config, overrides, artifacts, shards=shards), stage, force))


@flow(name="wsss-shard", persist_result=False, validate_parameters=True)
def wsss_shard(
    stage: ShardedStage,
    config: str | RunConfig,
    overrides: list[str] | None = None,
    artifacts: str = DEFAULT_ARTIFACTS,
) -> Any:  # noqa: ANN401 - as above
    """Build parts of a stage that another run is at; ends when no part is free.

    Args:
        stage: A stage that works in parts.
        config: As the other run's.
        overrides: As the other run's, with runtime.shards.
        artifacts: As the other run's.
    """
    return _ended(partial(_help, FlowCall.of(config, overrides, artifacts), stage))


def run_flow(
    config: str,
    *,
    overrides: Sequence[str] = (),
    artifacts: str | Path = DEFAULT_ARTIFACTS,
    from_: str | None = None,
    until: str | None = None,
    force: Sequence[str] = (),
    listener: Listener | None = None,
    run: RunConfig | None = None,
    plan: Plan | None = None,
    is_server_ending: bool = False,
) -> RunOutcome:
    """Run the flow ``wsss`` in this process.

    Args:
        config: As the flow's parameter of this name; the same holds for all up to ``force``.
        overrides: Of the config.
        artifacts: Root of the store.
        from_: First stage.
        until: Last stage.
        force: Stages to rebuild.
        listener: Hears of the run beside Prefect.
        run: The loaded config, when the caller has it already.
        plan: Its plan, when the caller has it already.
        is_server_ending: Wait at the end until the server has recorded all task runs.

    Raises:
        WsssError: the first error of the run.
        EnvironmentFailure: the configured Prefect API does not answer.
    """
    check_api()
    session = _Session(listener or SilentListener(), run, plan)
    token = _session.set(session)
    try:
        with recorded(lambda: session.flow_run_id if is_server_ending else None):
            stages = cast(Any, (from_, until, list(force)))  # checked by the flow itself
            return cast(RunOutcome, wsss(config, list(overrides), str(artifacts), *stages))
    finally:
        _session.reset(token)


# ---------------------------------------------------------------------------------------------------------------------
# Bodies
# ---------------------------------------------------------------------------------------------------------------------


def _ended(body: Callable[[], Any]) -> State[Any]:
    """The body's result as a state that says it in a line; of a deliberate error the first line says what to do."""
    try:
        result = body()
    except WsssError as error:
        return Failed(message=str(error), data=error)
    message = headline(result.stages) if isinstance(result, RunOutcome) else f"{result} parts built here"
    return Completed(message=message, data=result)


def _begin(call: FlowCall, last: str | None = None) -> tuple[RunConfig, Store, Plan]:
    """Load and plan the run, and say in its name what it is."""
    session = _session.get() or _Session()
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        session.flow_run_id = context.flow_run.id
    run, store = session.run or call.load(), open_store(call.artifacts)
    plan = session.plan or plan_run(run, store.digest_cache, last=last)
    warn_of_other_code()
    return run, store, plan


def _listener() -> PrefectListener:
    return PrefectListener((_session.get() or _Session()).listener)


def _run_all(call: FlowCall, from_stage: str | None, until: str | None, force: Sequence[str]) -> RunOutcome:
    run, store, plan = _begin(call)
    name_run(run_name(run, plan))
    outcome = run_pipeline(
        run,
        store,
        from_=from_stage,
        until=until,
        force=force,
        listener=_listener(),
        invocation=call.invocation,
        plan=plan,
        around=run_as_task,
        recruit=partial(recruit_helpers, call, run),
    )
    report = ensure_report(run, plan, store, outcome)
    picture = ensure_picture(report, run, plan, store) if report is not None else None
    show_result(run.name, run_name(run, plan), f"wsss run {call.invocation}", outcome, report, picture)
    return outcome


def _run_one(call: FlowCall, stage: str, force: bool) -> RunOutcome:
    open_store(call.artifacts).check_visible()
    run, store, plan = _begin(call, last=stage)
    title = f"{run.name}-{stage}-{plan.keys[stage][:8]}"
    name_run(title)
    outcome = run_stage(
        stage,
        run,
        store,
        force=force,
        listener=_listener(),
        invocation=call.invocation,
        plan=plan,
        around=run_as_task,
        recruit=partial(recruit_helpers, call, run),
    )
    show_result(f"{run.name}-{stage}", title, f"wsss stage {stage} {call.invocation}", outcome)
    return outcome


def _help(call: FlowCall, stage: str) -> int:
    open_store(call.artifacts).check_visible()
    run, store, plan = _begin(call, last=stage)
    name_run(f"{run.name}-{stage}-{plan.keys[stage][:8]}-help")
    return help_with(stage, run, store, listener=_listener(), plan=plan)
