"""Ask the other workers of a pool for a hand with a stage that works in parts.

The run that asks goes on building parts itself, so it never just waits in a worker's only slot; who comes takes parts
that nobody holds, and who comes too late finds nothing left to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.states import Cancelled

from pipeline.config.run_config import RunConfig
from pipeline.flows.parameters import FlowCall

HELP = "wsss-shard/any"
"""The deployment that helpers run."""


@contextlib.contextmanager
def recruit_helpers(call: FlowCall, run: RunConfig, stage: str) -> Iterator[None]:
    """Submit one helper for each other worker that is online, and withdraw those not begun at the end.

    Outside of a deployment nobody is asked.  A server that refuses costs the help, not the run.

    Args:
        call: What the flow was called with.
        run: Its config.
        stage: The stage that is about to be built.
    """
    helpers: list[UUID] = []
    try:
        helpers += _submit(call, run, stage)
    except Exception as error:
        get_run_logger().warning("no help with %s: %s; this run builds all parts itself", stage, error)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            _withdraw(helpers)


def _submit(call: FlowCall, run: RunConfig, stage: str) -> list[UUID]:
    flow_run = _deployed_run()
    if flow_run is None or flow_run.work_pool_name is None:
        return []
    with get_client(sync_client=True) as client:
        others = _count_workers(client, flow_run.work_pool_name) - 1
    count = max(0, min(others, run.runtime.shards - 1))
    if count == 0:
        get_run_logger().info("%s: no other worker is online, this one builds all parts", stage)
        return []
    config = call.config if isinstance(call.config, str) else call.config.model_dump(mode="json", exclude_unset=True)
    parameters: dict[str, Any] = {
        "stage": stage,
        "config": config,
        "overrides": list(call.overrides),
        "artifacts": call.artifacts,
    }
    found = [
        cast(FlowRun, run_deployment(HELP, parameters=parameters, timeout=0, as_subflow=False)) for _ in range(count)
    ]
    get_run_logger().info("%s: asked %d other workers for help", stage, count)
    return [helper.id for helper in found]


def _deployed_run() -> FlowRun | None:
    """The flow run of this context where a deployment started it."""
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    return flow_run if flow_run is not None and flow_run.deployment_id is not None else None


def _count_workers(client: SyncPrefectClient, pool: str) -> int:
    """Workers of ``pool`` that are online."""
    online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE.value]))
    return len(client.read_workers_for_work_pool(pool, worker_filter=online))


def _withdraw(helpers: list[UUID]) -> None:
    """Cancel the helpers that wait in the queue: they would only start to find nothing left."""
    with get_client(sync_client=True) as client:
        for helper in helpers:
            state = client.read_flow_run(helper).state
            if state is not None and state.is_scheduled():
                client.set_flow_run_state(helper, Cancelled(message="not needed any more: the stage is built"))
