"""``wsss up``: everything that runs flows on this machine, started once and found again.

Writes ``<home>/up.json`` and ``<home>/logs``.  A second ``up`` starts only what is missing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.engine.gpus import find_gpus
from pipeline.engine.spawn import PYTHON, find_our_code
from pipeline.flows import cluster_setup
from pipeline.flows.cluster_down import end_component, end_workers
from pipeline.flows.cluster_server import (
    Server,
    count_locked,
    database_name,
    find_server,
    server_component,
    start_server,
)
from pipeline.flows.cluster_state import (
    SERVER,
    SUPERVISOR,
    ClusterState,
    Component,
    changing,
    one_command,
    read_state,
    state_path,
    write_state,
)
from pipeline.flows.cluster_workers import choose_workers, describe_worker
from pipeline.flows.environment import API_URL, HOST, set_private
from pipeline.flows.files_server import DEFAULT_PORT as FILES_PORT
from pipeline.flows.prefect_api import PrefectApi
from pipeline.flows.supervisor import ensure_running
from stages.errors import EnvironmentFailure

Say = Callable[[str], None]

WORKERS_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class UpCall:
    """What ``wsss up`` was asked for."""

    home: Path
    host: str = HOST
    port: int = 4200
    files_port: int = FILES_PORT
    pool: str = "wsss"
    workers: int | None = None
    """None is one per GPU, or what is up already."""
    max_runs: int | None = None
    """Flow runs of the pool at a time; None leaves its limit."""
    artifacts: str = "artifacts"
    given_files_url: str = ""
    """Where another server has the store's reports; empty has the supervisor serve them."""
    directory: Path = field(default_factory=Path.cwd)

    @property
    def logs(self) -> Path:
        """Folder of the log files."""
        return self.home / "logs"

    @property
    def store(self) -> str:
        """Root of the store as every process sees it."""
        return self.artifacts if "://" in self.artifacts else str((self.directory / self.artifacts).absolute())

    @property
    def is_serving_files(self) -> bool:
        """Whether the supervisor serves the store's reports: not those of another server, nor of a store in a cloud."""
        return not self.given_files_url and "://" not in self.artifacts

    @property
    def files_url(self) -> str:
        """Under which the store's reports are served; empty when they are not."""
        return f"http://{HOST}:{self.files_port}" if self.is_serving_files else self.given_files_url


def up(call: UpCall, say: Say) -> dict[str, Any]:
    """Bring everything up that is not, and describe all of it.

    Args:
        call: What is wanted.
        say: Hears a line per step.

    Returns:
        The document of ``wsss up --json``.

    Raises:
        InputError: an argument that cannot be met.
        EnvironmentFailure: a server that does not answer, a port in use, a process that does not start.
    """
    with one_command(call.home), ThreadPoolExecutor(1) as background:
        before = read_state(call.home)
        server = find_server(call.host, call.port, before)
        gpus = background.submit(find_gpus)
        environment = _environment(call, server)
        is_server_new = _bring_up_server(call, server, before, environment, say)
        api = PrefectApi(server.url)
        base = find_our_code() | environment
        pool = cluster_setup.set_up_pool(api, call.pool, max_runs=call.max_runs, environment=base)
        automation = cluster_setup.set_up_automation(api)
        say(f"work pool {call.pool}: {pool}; automation for dead runs: {automation}")
        # before the workers: each poll of theirs is a write, and SQLite refuses a deployment that meets one
        deployments = cluster_setup.register_deployments(call.pool, call.directory, call.store, base)
        say(deployments)
        started = _bring_up_rest(call, environment, gpus, say)
        if is_server_new:
            started.add(SERVER)
        unheard = _wait_for_workers(call, api)
        return _describe(call, api, started, unheard, pool=pool, automation=automation, deployments=deployments)


def _environment(call: UpCall, server: Server) -> dict[str, str]:
    """Variables of every process, none of them secret: those stay in the inherited environment."""
    environment = {"PREFECT_HOME": str(call.home)}
    set_private(environment, home=call.home)
    environment |= {name: os.environ[name] for name in environment if name != "PREFECT_HOME" and name in os.environ}
    environment |= {API_URL: server.url, "WSSS_ARTIFACTS": call.store}
    return environment | ({"WSSS_FILES_URL": call.files_url} if call.files_url else {})


def _bring_up_server(
    call: UpCall, server: Server, before: ClusterState | None, environment: Mapping[str, str], say: Say
) -> bool:
    """Leave a healthy server and its line in the state; whether it was started."""
    state = before or ClusterState(
        api_url=server.url,
        is_server_ours=server.is_ours,
        pool=call.pool,
        directory=call.directory,
        artifacts=call.store,
        files_port=0,
    )
    port = call.files_port if call.is_serving_files else 0
    change = {"pool": call.pool, "directory": call.directory, "artifacts": call.store, "files_port": port}
    state = state.model_copy(update=change)
    if server.is_ours and SERVER not in state.components:
        state.components[SERVER] = server_component(server, call.logs, environment)
    write_state(call.home, state)
    try:
        return start_server(call.home, server, say)
    except EnvironmentFailure:
        if before is None:  # a first try leaves nothing
            end_component(state.components.get(SERVER))
            state_path(call.home).unlink(missing_ok=True)
        raise


def _bring_up_rest(call: UpCall, environment: Mapping[str, str], gpus: Future[list[str]], say: Say) -> set[str]:
    """Start what is missing of workers and supervisor, end workers that are too many; names of what was started."""
    with changing(call.home) as state:
        wanted = {worker.name: worker.gpu or "" for worker in state.workers}
        if call.workers is not None:
            state.num_workers = call.workers
        if call.workers is not None or not wanted:
            wanted = choose_workers(state.num_workers, gpus.result())
        too_many = [worker for worker in state.workers if worker.name not in wanted]
        for worker in too_many:
            del state.components[worker.name]
        for name, gpu in wanted.items():
            new = describe_worker(name, gpu, call.pool, call.logs, environment)
            old = state.components.get(name)
            state.components[name] = new if old is None else new.model_copy(update=_process_of(old))
        supervisor = _describe_supervisor(call, environment)
        old = state.components.get(SUPERVISOR)
        state.components[SUPERVISOR] = supervisor if old is None else supervisor.model_copy(update=_process_of(old))
    if too_many:
        say(f"ending {', '.join(worker.name for worker in too_many)}")
        end_workers(call.home, too_many, PrefectApi(environment[API_URL]))
    started = {name for name in [*wanted, SUPERVISOR] if ensure_running(call.home, name)}
    if started:
        say(f"starting {', '.join(sorted(started))}")
    return started


def _process_of(component: Component) -> dict[str, Any]:
    return {"pid": component.pid, "started": component.started}


def _describe_supervisor(call: UpCall, environment: Mapping[str, str]) -> Component:
    return Component(
        name=SUPERVISOR,
        command=[*PYTHON, "-m", "pipeline.flows.supervisor", "--home", str(call.home)],
        environment=dict(environment),
        log=call.logs / "supervisor.log",
    )


def _wait_for_workers(call: UpCall, api: PrefectApi) -> set[str]:
    """Wait until the server hears from each worker; names of those that it does not hear."""
    end_s = time.monotonic() + WORKERS_TIMEOUT_S
    while True:
        state = read_state(call.home)
        workers = [] if state is None else state.workers
        online = api.workers(call.pool)
        unheard = {worker.name for worker in workers if not (online.get(worker.name) and worker.is_running())}
        if not unheard or time.monotonic() > end_s:
            return unheard
        time.sleep(0.3)


def _describe(call: UpCall, api: PrefectApi, started: set[str], unheard: set[str], **steps: str) -> dict[str, Any]:
    """The document of ``wsss up``."""
    state = read_state(call.home)
    assert state is not None

    def describe(component: Component) -> dict[str, Any]:
        words = "started" if component.name in started else "already up"
        return {"name": component.name, "state": words, "pid": component.pid, "log": component.log}

    notes = [
        f"{name}: the server has not heard of it within {WORKERS_TIMEOUT_S:.0f} s, see its log" for name in unheard
    ]
    if state.is_server_ours and len(state.workers) > 1 and database_name() == "sqlite":
        notes.append("more than one worker on SQLite: PostgreSQL is better for the server, see docs/deployment.md")
    server = state.components.get(SERVER)
    return {
        "api_url": api.url,
        "ui_url": api.ui_url,
        "files_url": call.files_url or None,
        "server": describe(server) if server else {"name": SERVER, "state": "of PREFECT_API_URL"},
        "supervisor": describe(state.components[SUPERVISOR]),
        "workers": [describe(worker) | {"gpu": worker.gpu or None} for worker in state.workers],
        "pool": {"name": call.pool, "state": steps["pool"]},
        "automation": steps["automation"],
        "deployments": steps["deployments"],
        "logs": call.logs,
        "database": database_name() if server else None,
        "database_locked_errors": count_locked(call.logs) if server else None,
        "notes": notes,
    }
