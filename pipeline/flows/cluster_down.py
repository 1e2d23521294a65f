"""``wsss down``: end what ``wsss up`` started, and put the flow runs that it interrupts back into their queue.

Removes ``<home>/up.json``; logs and Prefect's database stay.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.flows.cluster_server import count_locked
from pipeline.flows.cluster_state import SERVER, SUPERVISOR, Component, one_command, read_state, state_path
from pipeline.flows.cluster_workers import end_worker
from pipeline.flows.prefect_api import ApiError, PrefectApi
from pipeline.flows.processes import end
from pipeline.flows.resubmission import INTERRUPTED

GRACE_S = 20.0
"""Seconds between asking server and supervisor to end and killing them."""


def down(home: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """End everything that ``up`` started in ``home``; runs that are interrupted go on with the next ``up``.

    Args:
        home: As given to ``up``.
        say: Hears a line per step.

    Returns:
        The document of ``wsss down --json``.
    """
    with one_command(home):
        state = read_state(home)
        if state is None:
            return {"ended": [], "interrupted_runs": [], "home": home}
        running = [component.name for component in state.components.values() if component.is_running()]
        end_component(state.components.get(SUPERVISOR))
        say(f"ending {len(state.workers)} workers and their flow runs")
        interrupted = end_workers(home, state.workers, PrefectApi(state.api_url))
        end_component(state.components.get(SERVER))
        state_path(home).unlink(missing_ok=True)
        return {
            "ended": running,
            "interrupted_runs": interrupted,
            "home": home,
            "database_locked_errors": count_locked(home / "logs"),
        }


def end_component(component: Component | None) -> None:
    """End a process of ours that has none of its own."""
    if component is not None:
        end([component.process], grace_s=GRACE_S)


def end_workers(home: Path, workers: list[Component], api: PrefectApi) -> list[str]:
    """End workers at the same time and put their flow runs back into the queue; the runs' ids."""
    if not workers:
        return []
    with ThreadPoolExecutor(len(workers)) as pool:
        ended = list(pool.map(lambda worker: end_worker(home, worker), workers))
    return [run for runs in ended for run, pids in runs.items() if _requeue(api, run, pids)]


def _requeue(api: PrefectApi, flow_run_id: str, pids: set[int]) -> bool:
    """Schedule a run that was interrupted here; whether it will go on."""
    with contextlib.suppress(ApiError):
        run = api.flow_run(flow_run_id)
        is_here = run["infrastructure_pid"] in {None, *map(str, pids)}
        if is_here and run["deployment_id"] and run["state_type"] in ("CRASHED", "RUNNING", "PENDING"):
            if run["state_type"] != "CRASHED":
                api.set_state(flow_run_id, {"type": "CRASHED", "name": "Crashed", "message": INTERRUPTED}, force=True)
            text = f"{INTERRUPTED} on {socket.gethostname()}; it goes on with the next free worker of its pool"
            return api.schedule_again(flow_run_id, text, transition_id=os.urandom(16).hex())
    return False
