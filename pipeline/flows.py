"""The Prefect flow ``wsss``: the same run as without Prefect, with one task run per stage to look at.

The flow returns the run's outcome and raises its first error; the state of a failed run begins with what to do.
Prefect is imported here and in ``tasks`` alone, so whoever imports this module has set Prefect's environment before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.context import FlowRunContext
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from pipeline.config import RunConfig, find_config, load_config
from pipeline.keys import Plan
from pipeline.runner import Listener, RunOutcome, SilentListener, run_pipeline
from pipeline.store import Store
from pipeline.tasks import PrefectListener, run_as_task
from stages.errors import EnvironmentFailure

RECORD_TIMEOUT_S = 10.0
"""Most seconds to wait until a server that is about to end has recorded every task run."""


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
    config: str,
    overrides: list[str] | None = None,
    artifacts: str = "artifacts",
    from_stage: str | None = None,
    until: str | None = None,
    force: list[str] | None = None,
) -> RunOutcome:
    """Raw images and image-level labels in, a measured mIoU out.

    Args:
        config: Path of a YAML file, or the name of a shipped config.
        overrides: Values of the config to replace, each ``a.b=value``.
        artifacts: Root of the artifact store.
        from_stage: First stage to run; what it reads must be in the store.
        until: Last stage to run.
        force: Stages to rebuild, each with all after it.
    """
    session = _session.get() or _Session()
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        session.flow_run_id = context.flow_run.id
    return run_pipeline(
        session.run or load_config(find_config(config), overrides or []),
        Store(Path(artifacts)),
        from_=from_stage,
        until=until,
        force=force or (),
        listener=PrefectListener(session.listener),
        invocation=config,
        plan=session.plan,
        around=run_as_task,
    )


def run_flow(
    config: str,
    *,
    overrides: Sequence[str] = (),
    artifacts: Path = Path("artifacts"),
    from_: str | None = None,
    until: str | None = None,
    force: Sequence[str] = (),
    listener: Listener | None = None,
    run: RunConfig | None = None,
    plan: Plan | None = None,
    is_server_ending: bool = False,
) -> RunOutcome:
    """Run the flow in this process.

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
    _check_api()
    session = _Session(listener or SilentListener(), run, plan)
    token = _session.set(session)
    try:
        with _recorded(session) if is_server_ending else _nothing():
            return wsss(config, list(overrides), str(artifacts), from_, until, list(force))
    finally:
        _session.reset(token)


def _check_api() -> None:
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
        if error is not None:
            raise EnvironmentFailure(
                f"the Prefect API {client.api_url} does not answer ({error}); start it, correct PREFECT_API_URL, "
                "or run without it: --engine local"
            )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _recorded(session: _Session) -> Iterator[None]:
    """Leave only after the server has what this process sent: logs, events, and a final state of each task run.

    Prefect sends all three in the background and the server digests events later still; one that ends at once would
    show a finished run with task runs that are pending for ever.
    """
    try:
        yield
    finally:
        APILogWorker.drain_all(timeout=5.0)
        EventsWorker.drain_all(timeout=5.0)
        _wait_for_task_runs(session.flow_run_id)


def _wait_for_task_runs(flow_run_id: UUID | None) -> None:
    if flow_run_id is None:
        return
    of_this_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    end = time.monotonic() + RECORD_TIMEOUT_S
    with get_client(sync_client=True) as client:
        while time.monotonic() < end:
            task_runs = client.read_task_runs(flow_run_filter=of_this_run)
            if all(task_run.state is not None and task_run.state.is_final() for task_run in task_runs):
                return
            time.sleep(0.1)
