"""The Prefect flows: ``wsss``, a whole run, and ``wsss-stage``, one stage or parts of it.

They are the same runs as without Prefect, with one task run per stage to look at.  A flow that fails says in the first
line of its state what to do.  This module and ``tasks`` import Prefect, so whoever imports them has set its environment
before.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.runtime import flow_run as this_flow_run
from prefect.states import Cancelled, Completed, Failed

from pipeline.engine.failures import InternalFailure
from pipeline.engine.outcomes import RunOutcome
from pipeline.engine.plan import plan_run
from pipeline.engine.run import Run
from pipeline.flows.pages import headline, write_page
from pipeline.flows.parameters import Config, FlowCall, Part, Parts, Split, StageName
from pipeline.flows.tasks import PrefectListener, run_as_task
from pipeline.report.page import ensure_picture, ensure_report, run_name
from pipeline.store.artifacts import open_store
from stages.errors import WsssError

MAX_STARTS = 3
"""A flow run that crashes is scheduled again by an automation, which does not count; the start after these ends it."""
RECORD_TIMEOUT_S = 10.0
"""Most seconds to wait until a server that is about to end has recorded every task run."""

_given: ContextVar[Run | None] = ContextVar("wsss_run", default=None)
"""The run of a caller in this process; a deployed flow loads its own."""


@flow(name="wsss", persist_result=False, validate_parameters=True)
def wsss(
    config: Config,
    overrides: list[str] | None = None,
    splits: list[Split] | None = None,
    parts: Parts | None = None,
    from_stage: StageName | None = None,
    until: StageName | None = None,
    force: list[StageName] | None = None,
    artifacts: str | None = None,
) -> Any:  # noqa: ANN401 - a RunOutcome, or the state of a failure
    """Raw images and image-level labels in, a measured mIoU out.

    Args:
        config: The name of a shipped config, a YAML file on the worker, or a whole config typed in here.
        overrides: Values of the config to replace, each a.b=value, for instance make_masks.threshold=0.2.
        splits: Splits that the segmenter predicts, in place of the config's evaluate.splits; only val is scored.
        parts: Parts that attention and masks are made in, shared with every idle worker.
        from_stage: First stage to run; what it reads must be in the store.
        until: Last stage to run.
        force: Stages to rebuild, each with all after it.
        artifacts: Root of the artifact store: a folder that every worker sees, or a URL such as s3://bucket/folder.
    """
    call = FlowCall.of(config, overrides, artifacts, splits=splits, parts=parts)
    return _ended(partial(_run_all, call, from_stage, until, tuple(force or ())))


@flow(name="wsss-stage", persist_result=False, validate_parameters=True)
def wsss_stage(
    stage: StageName,
    config: Config,
    overrides: list[str] | None = None,
    artifacts: str | None = None,
    force: bool = False,
    part: Part | None = None,
    key: str | None = None,
) -> Any:  # noqa: ANN401 - as above
    """One stage from what is in the store.

    Args:
        stage: The stage to run; what it reads must be in the store.
        config: The name of a shipped config, a YAML file on the worker, or a whole config typed in here.
        overrides: Values of the config to replace, each a.b=value.
        artifacts: Root of the artifact store: a folder that every worker sees, or a URL.
        force: Rebuild it even if it is there.
        part: Only help another run with this stage: 3/8 builds that part, any builds parts until none is free.
        key: With part, the key that the other run builds; another one here is refused.
    """
    return _ended(partial(_run_one, FlowCall.of(config, overrides, artifacts), stage, force, part, key))


def run_flow(
    run: Run,
    config: str,
    overrides: Sequence[str] = (),
    *,
    from_: str | None = None,
    until: str | None = None,
    force: Sequence[str] = (),
    is_server_ending: bool = False,
) -> RunOutcome:
    """Run the flow ``wsss`` in this process; the listener of ``run`` hears of it beside Prefect.

    ``config`` and ``overrides`` are as the user wrote them, for the flow run's parameters.  ``is_server_ending`` waits
    at the end until the server has recorded what this process sent.

    Raises:
        WsssError: the first error of the run.
    """
    # the flow checks its parameters itself
    stages: dict[str, Any] = {"from_stage": from_, "until": until, "force": list(force)}
    token = _given.set(run)
    try:
        state = wsss(config, list(overrides), **stages, artifacts=run.store.location, return_state=True)
    finally:
        _given.reset(token)
    if is_server_ending:
        _wait_until_recorded(cast(UUID, state.state_details.flow_run_id))
    return cast(RunOutcome, state.result())


def _wait_until_recorded(flow_run_id: UUID) -> None:
    """Prefect sends logs and events in the background; a server that ends at once would show pending task runs."""
    APILogWorker.drain_all(timeout=5.0)
    EventsWorker.drain_all(timeout=5.0)
    of_this_run = FlowRunFilter.model_validate({"id": {"any_": [flow_run_id]}})
    end = time.monotonic() + RECORD_TIMEOUT_S
    with get_client(sync_client=True) as client:
        while time.monotonic() < end:
            task_runs = client.read_task_runs(flow_run_filter=of_this_run)
            if all(task_run.state is not None and task_run.state.is_final() for task_run in task_runs):
                return
            time.sleep(0.1)


def _ended(body: Callable[[], RunOutcome | int]) -> State[Any]:
    """The body's result as a state that says it in a line; of a deliberate error the first line says what to do."""
    starts = this_flow_run.run_count or 1
    if starts > MAX_STARTS:
        return Failed(
            message=f"given up: this is start {starts} of a run that ended {starts - 1} times without a result; see "
            "its logs and its worker's, then submit a new run: it goes on from what is in the store"
        )
    try:
        result = body()
    except WsssError as error:
        if isinstance(error, InternalFailure) and error.trace:
            get_run_logger().error("%s", error.trace)
        return Failed(message=str(error), data=error)
    message = f"{result} parts built here" if isinstance(result, int) else headline(result.stages)
    return Completed(message=message, data=result)


def _open(call: FlowCall, last: str | None = None) -> Run:
    """The run, planned, each of whose stages is a task run."""
    run = _given.get() or Run(call.load(), open_store(call.artifacts), invocation=call.invocation)
    plan = plan_run(run.config, run.store.digest_cache, last=last) if _given.get() is None else run.plan
    # the folder of a bucket's store is one machine's own
    helpers = None if run.store.is_mirrored else partial(helped, call, plan.keys)
    return Run(
        run.config,
        run.store,
        listener=PrefectListener(run.listener),
        invocation=run.invocation,
        plan=plan,
        around=run_as_task,
        helpers=helpers,
    )


def _run_all(call: FlowCall, from_stage: str | None, until: str | None, force: Sequence[str]) -> RunOutcome:
    run = _open(call)
    title = run_name(run.config, run.plan)
    _name_run(title)

    def show(outcome: RunOutcome) -> None:
        report = ensure_report(run.config, run.plan, run.store, outcome, run.invocation)
        picture = ensure_picture(report, run.config, run.plan, run.store) if report is not None else None
        page = write_page(title, f"wsss run {run.invocation}", outcome.stages, report, picture)
        _show_result(run.config.name, title, page)

    return run.run_pipeline(from_=from_stage, until=until, force=force, then=show)


def _run_one(call: FlowCall, stage: str, force: bool, part: str | None, key: str | None) -> RunOutcome | int:
    open_store(call.artifacts).check_visible()
    run = _open(call, last=stage)
    title = f"{run.config.name}-{stage}-{run.plan.keys[stage][:8]}"
    _name_run(title if part is None else f"{title}-help")
    if part is not None:
        return run.help_with(stage, part, key=key)
    outcome = run.run_stage(stage, force=force)
    page = write_page(title, f"wsss stage {stage} {run.invocation}", outcome.stages)
    _show_result(f"{run.config.name}-{stage}", title, page)
    return outcome


def _name_run(name: str) -> None:
    """Give this flow run a name that says what it makes; no name is worth a run."""
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        client.update_flow_run(UUID(this_flow_run.id), name=name)


def _show_result(name: str, title: str, page: str) -> None:
    """Put a page beside the flow run, a new version of earlier ones of this name; no page is worth a run either."""
    key = re.sub(r"[^a-z0-9]+", "-", f"result-{name}".lower()).strip("-")
    try:
        create_markdown_artifact(page, key=key, description=f"{title}: stages, numbers, IoU of every class")
    except Exception as error:
        get_run_logger().warning("the page of results could not be sent to the server: %s", error)


@contextlib.contextmanager
def helped(call: FlowCall, keys: Mapping[str, str], stage: str, num_parts: int) -> Iterator[None]:
    """Ask the idle workers of this run's pool for help with a stage, and withdraw what has not started at the end.

    The run that asks builds parts itself meanwhile, so no slot only waits.  Outside of a deployment nobody is asked; a
    server that refuses costs the help, not the run.  A worker with other code or another config has other ``keys``.
    """
    asked: list[UUID] = []
    config = call.config
    parameters = {
        "config": config if isinstance(config, str) else config.model_dump(mode="json", exclude_unset=True),
        "overrides": [*call.overrides, f"runtime.parts={num_parts}"],
        "artifacts": call.artifacts,
        "part": "any",
        "key": keys[stage],
    }
    try:
        for _ in range(min(_count_idle_workers(), num_parts - 1)):
            helper = run_deployment(f"wsss-stage/{stage}", parameters=parameters, timeout=0, as_subflow=False)
            asked.append(cast(FlowRun, helper).id)
        get_run_logger().info("%s in %d parts: %d idle workers were asked for help", stage, num_parts, len(asked))
    except Exception as error:
        get_run_logger().warning("no help with %s: %s; this run builds all parts itself", stage, error)
    try:
        yield
    finally:
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:
            for helper_id in asked:
                state = client.read_flow_run(helper_id).state
                if state is not None and state.is_scheduled():
                    client.set_flow_run_state(helper_id, Cancelled(message="not needed any more: the stage is built"))


def _count_idle_workers() -> int:
    """Workers that the server hears from, less the runs that are begun; 0 where no deployment began this run."""
    context = FlowRunContext.get()
    pool = context.flow_run.work_pool_name if context is not None and context.flow_run is not None else None
    if pool is None:
        return 0
    of_the_pool = WorkPoolFilter.model_validate({"name": {"any_": [pool]}})
    begun = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING"]}}})
    with get_client(sync_client=True) as client:
        num_runs = len(client.read_flow_runs(work_pool_filter=of_the_pool, flow_run_filter=begun))
        workers = client.read_workers_for_work_pool(pool)
        return max(0, sum(worker.status == WorkerStatus.ONLINE for worker in workers) - num_runs)
