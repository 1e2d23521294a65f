"""Keep what ``wsss up`` started running: ``python -m pipeline.flows.supervisor --home DIR``.

Starts dead workers and a dead server of ours again, submits crashed flow runs again, and serves the store's reports.
Reads and writes ``<home>/up.json``; ends when that file is gone or names another supervisor.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.engine.spawn import find_our_code
from pipeline.flows.cluster_state import SUPERVISOR, ClusterState, Component, changing, read_state
from pipeline.flows.cluster_workers import MARK, end_worker, find_runs, mark
from pipeline.flows.files_server import FilesServer
from pipeline.flows.prefect_api import ApiError, PrefectApi
from pipeline.flows.processes import spawn
from pipeline.flows.resubmission import Resubmitter
from stages.errors import WsssError

LOOK_EVERY_S = 1.0
SWEEP_EVERY_S = 5.0
COUNT_EVERY_S = 3.0
"""How often flow runs are counted, so that those of a worker are known that dies together with them."""
MAX_BACKOFF_S = 60.0
STEADY_S = 120.0
"""A process that lived for so long starts its backoff anew."""


def ensure_running(home: Path, name: str, environment: Mapping[str, str] | None = None) -> bool:
    """Start a component of ``home`` unless it runs.

    Args:
        home: Whose.
        name: Of the component.
        environment: Base of its environment, by default this process's; its own variables come on top.

    Returns:
        Whether it was started.
    """
    with changing(home) as state:
        component = state.components[name]
        if component.is_running():
            return False
        base = find_our_code() if environment is None else dict(environment)
        variables = base | component.environment | {MARK: mark(home, name)}
        process = spawn(component.command, variables, component.log)
        component.pid, component.started = process.pid, process.started
        return True


@dataclass
class Backoff:
    """When a process that keeps dying may start again: after 1, 2, 4 … 60 s."""

    failures: int = 0
    started_s: float = 0.0
    next_s: float = 0.0

    def died(self, now_s: float) -> None:
        """Count one death, unless the one before was long ago."""
        self.failures = 0 if now_s - self.started_s > STEADY_S and self.started_s else self.failures
        self.next_s = now_s + min(MAX_BACKOFF_S, 2.0**self.failures)
        self.failures += 1


class Supervisor:
    """The loop."""

    def __init__(self, home: Path, state: ClusterState, log: logging.Logger) -> None:
        """Watch over ``state``, which is up in ``home``."""
        self._home, self._log = home, log
        self._resubmitter = Resubmitter(PrefectApi(state.api_url), state.pool, log)
        self._backoffs: dict[str, Backoff] = {}
        self._runs: dict[str, dict[str, set[int]]] = {}
        """Flow runs of each worker when it was last seen alive."""
        self._lost: dict[str, tuple[set[int], str]] = {}
        """Flow runs of dead workers that the server has not been told about yet."""
        self._is_server_away = False
        self._next_sweep_s = 0.0
        self._next_count_s = 0.0

    def look(self, state: ClusterState, now_s: float) -> None:
        """One turn: start what is dead, and every few seconds ask the server for crashed runs."""
        for component in state.components.values():
            if component.name != SUPERVISOR:
                self._look_at(component, now_s)
        if now_s >= self._next_count_s:
            self._next_count_s = now_s + COUNT_EVERY_S
            alive = [worker.name for worker in state.workers if worker.is_running()]
            self._runs |= find_runs(self._home, alive)
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + SWEEP_EVERY_S
            self._sweep()

    def _look_at(self, component: Component, now_s: float) -> None:
        backoff = self._backoffs.get(component.name)
        if component.is_running():
            if backoff is not None and backoff.next_s:
                backoff.next_s = 0.0
            return
        if backoff is None or not backoff.next_s:
            backoff = self._backoffs.setdefault(component.name, Backoff())
            backoff.died(now_s)
            self._log.warning(
                "%s (pid %d) died; starts again in %.0f s", component.name, component.pid, backoff.next_s - now_s
            )
            self._clean_up(component)
            self._next_sweep_s = 0.0
        elif now_s >= backoff.next_s:
            self._start(component, backoff, now_s)

    def _clean_up(self, component: Component) -> None:
        """What a dead worker left would fight with the next one for its GPU."""
        if not component.is_worker:
            return
        runs = self._runs.pop(component.name, {})
        for flow_run_id, pids in end_worker(self._home, component).items():
            runs.setdefault(flow_run_id, set()).update(pids)
        for flow_run_id, pids in runs.items():
            self._log.warning("%s: ended what it left of flow run %s", component.name, flow_run_id)
            self._lost[flow_run_id] = (pids, component.name)

    def _start(self, component: Component, backoff: Backoff, now_s: float) -> None:
        try:
            is_started = ensure_running(self._home, component.name)
        except (OSError, WsssError) as error:
            self._log.error("%s could not be started: %s", component.name, error)
            backoff.died(now_s)
            return
        backoff.started_s, backoff.next_s = now_s, 0.0
        if is_started:
            self._log.info("%s started again, see %s", component.name, component.log)

    def _sweep(self) -> None:
        try:
            for flow_run_id, (pids, worker) in list(self._lost.items()):
                self._resubmitter.crash_lost(flow_run_id, pids, worker)
                del self._lost[flow_run_id]
            self._resubmitter.sweep()
        except ApiError as error:
            if not self._is_server_away:
                self._log.error("%s; asking every %.0f s", error.message, SWEEP_EVERY_S)
            self._is_server_away = True
            return
        if self._is_server_away:
            self._log.info("the server answers again")
        self._is_server_away = False


def watch(home: Path, log: logging.Logger) -> int:
    """Look until ``home`` has another supervisor or none."""
    state = _own_state(home, patience_s=10.0)
    if state is None:
        log.error("%s does not name this process as its supervisor; start it with: wsss up", home)
        return 1
    log.info("watching over %s", ", ".join(name for name in state.components if name != SUPERVISOR))
    files = _serve(state, log)
    supervisor = Supervisor(home, state, log)
    while (state := _own_state(home)) is not None:
        try:
            supervisor.look(state, time.monotonic())
        except Exception:  # whatever it is, the next look must come
            log.exception("a look failed")
        time.sleep(LOOK_EVERY_S)
    log.info("nothing to watch over any more")
    if files is not None:
        files.shutdown()
    return 0


def _own_state(home: Path, *, patience_s: float = 0.0) -> ClusterState | None:
    """The state while it names this process."""
    end_s = time.monotonic() + patience_s
    while True:
        state = None
        with contextlib.suppress(WsssError, OSError):
            state = read_state(home)
        if state is not None and state.components[SUPERVISOR].pid == os.getpid():
            return state
        if time.monotonic() >= end_s:
            return None
        time.sleep(0.1)


def _serve(state: ClusterState, log: logging.Logger) -> FilesServer | None:
    if not state.files_port:
        return None
    folder = Path(state.artifacts) / "reports"
    try:
        server = FilesServer(folder, state.files_port)
    except OSError as error:
        log.warning("port %d is taken (%s): links to reports will not open", state.files_port, error.strerror)
        return None
    server.start()
    log.info("%s is at %s", folder, server.url)
    return server


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch until told to end."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.flows.supervisor", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    home = parser.parse_args(arguments).home
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    return watch(home, logging.getLogger("wsss.supervisor"))


if __name__ == "__main__":
    sys.exit(main())
