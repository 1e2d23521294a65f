"""The Prefect server of ``wsss up``: the user's at PREFECT_API_URL, or one of ours on a port of this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.engine.spawn import PYTHON
from pipeline.flows.cluster_state import SERVER, ClusterState, Component, read_state
from pipeline.flows.environment import API_URL, LOOPBACK, STARTUP_TIMEOUT_S
from pipeline.flows.prefect_api import PrefectApi
from pipeline.flows.supervisor import ensure_running
from stages.errors import EnvironmentFailure, InputError

DATABASE_URL = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
SQLITE, POSTGRESQL = "sqlite+aiosqlite:", "postgresql+asyncpg:"
# Prefect itself opens SQLite in WAL mode with a busy timeout of 60 s.  What is left of "database is locked" is a read
# that becomes a write after another's commit: it fails at once, whatever the timeouts, and the event is digested again.
# A request that fails so is answered with 503 and repeated by Prefect's client seconds later.
SERVER_SETTINGS = {
    # fewer writes: block types are not used, and registering them is a burst
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    # or the requests among these errors would be in no log, and not be counted
    "PREFECT_SERVER_LOG_RETRYABLE_ERRORS": "true",
}
_TELL_EVERY_S = 5.0


@dataclass(frozen=True)
class Server:
    """Which server, and whose."""

    url: str
    is_ours: bool
    host: str = ""
    port: int = 0


def find_server(host: str, port: int, before: ClusterState | None) -> Server:
    """Decide which server is meant.

    Args:
        host: Address that one of ours would listen on.
        port: Its port.
        before: What is up already.

    Raises:
        InputError: PREFECT_API_URL is no URL, the database's URL cannot work, or another port is up already.
    """
    configured = os.environ.get(API_URL, "").rstrip("/")
    ours = f"http://{reachable(host)}:{port}/api"
    if before is not None and before.is_server_ours:
        if configured not in ("", before.api_url):
            raise InputError(f"a server of ours is up at {before.api_url}, {API_URL} is {configured}: wsss down first")
        if ours != before.api_url and port != 4200:
            raise InputError(f"a server of ours is up at {before.api_url}: wsss down first, to move it to port {port}")
        return Server(before.api_url, True)
    if configured and configured not in (ours, ours.replace("127.0.0.1", "localhost")):
        return Server(PrefectApi(configured).url, False)
    check_database_url(os.environ.get(DATABASE_URL))
    return Server(ours, True, host, port)


def reachable(host: str) -> str:
    """The address at which this machine reaches its own server that listens on ``host``."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "", *LOOPBACK) else host


def check_database_url(url: str | None) -> None:
    """Refuse a database that Prefect would fail on later.

    Raises:
        InputError: it has no driver that Prefect takes.
    """
    if url and not url.startswith((SQLITE, POSTGRESQL)):
        kind = url.partition(":")[0]
        raise InputError(
            f"{DATABASE_URL} must begin with {POSTGRESQL}//user:password@host/database or {SQLITE}///file, "
            f"got {kind}:…; Prefect's server takes no other driver"
        )


def server_component(server: Server, logs: Path, environment: Mapping[str, str]) -> Component:
    """The component of a server of ours."""
    words = ("server", "start", "--host", server.host, "--port", str(server.port))
    settings = {name: value for name, value in SERVER_SETTINGS.items() if name not in os.environ}
    return Component(
        name=SERVER,
        command=[*PYTHON, "-m", "prefect", *words],
        environment={**environment, **settings, "PYTHONUNBUFFERED": "1"},
        log=logs / "server.log",
    )


def start_server(home: Path, server: Server, say: Callable[[str], None]) -> bool:
    """Leave a healthy server, whosever it is.

    Args:
        home: Whose state names it.
        server: Which.
        say: Hears how long it takes.

    Returns:
        Whether it was started here.

    Raises:
        EnvironmentFailure: it does not answer, its port is another's, or it died.
    """
    api = PrefectApi(server.url)
    if not server.is_ours:
        problem = api.problem()
        if problem:
            raise EnvironmentFailure(
                f"{API_URL} is {os.environ.get(API_URL)}, and there is no Prefect server: {problem}; start it, correct "
                f"the variable, or unset it: wsss up then starts a server of its own"
            )
        say(f"server: {server.url}, of {API_URL}")
        return False
    state = read_state(home)
    assert state is not None
    component = state.components[SERVER]
    if not component.is_running():
        _check_port(server, api)
    is_started = ensure_running(home, SERVER)
    _wait(api, home, say)
    say(f"server: {'started' if is_started else 'already up'}, its UI is at {api.ui_url}")
    return is_started


def _check_port(server: Server, api: PrefectApi) -> None:
    """Nobody else may have the port."""
    if not server.port:  # it was ours a moment ago and comes back on the same one
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.host, server.port))
        except OSError as error:
            use = "stop that program"
            if not api.problem():
                use = f"use the Prefect server that answers there with export {API_URL}={server.url}"
            raise EnvironmentFailure(
                f"port {server.port} of {server.host} cannot be had ({error.strerror}): {use}, or take another port: "
                "wsss up --port N --files-port M"
            ) from error


def _wait(api: PrefectApi, home: Path, say: Callable[[str], None]) -> None:
    begun = told = time.monotonic()
    while problem := api.problem():
        now = time.monotonic()
        state = read_state(home)
        component = None if state is None else state.components.get(SERVER)
        if component is None or not component.is_running() or now - begun > STARTUP_TIMEOUT_S:
            log = None if component is None else component.log
            raise EnvironmentFailure(
                f"Prefect's server did not come up ({problem}); see {log}, and check the pins with wsss doctor",
                [] if log is None else log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:],
            )
        if now - told > _TELL_EVERY_S:
            told = now
            say(f"server: starting, {now - begun:.0f} s so far")
        time.sleep(0.2)


def database_name() -> str:
    """Kind of the server's database, without its address, which may hold a password."""
    url = os.environ.get(DATABASE_URL) or "sqlite"
    return url.partition(":")[0].partition("+")[0]


def count_locked(logs: Path) -> int:
    """How many errors "database is locked" are in the server's log; each has its text twice."""
    with contextlib.suppress(OSError), (logs / "server.log").open("rb") as file:
        return sum(b"(sqlite3.OperationalError) database is locked" in line for line in file)
    return 0
