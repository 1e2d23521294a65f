"""Choose what drives a run: this process alone, or the Prefect flow with a configured or an embedded server.

Imports Prefect only where it is asked for, and only after its environment is set.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.config.run_config import RunConfig
from pipeline.engine.plan import Plan
from pipeline.engine.run import Listener, RunOutcome, run_pipeline
from pipeline.store.artifacts import Store

if TYPE_CHECKING:
    from pipeline.flows.embedded_server import EmbeddedServer

Engine = Literal["local", "prefect"]
API_URL = "PREFECT_API_URL"


@dataclass(frozen=True)
class RunCall:
    """One ``wsss run``, checked and planned."""

    config: str
    """As the user wrote it."""
    overrides: tuple[str, ...]
    run: RunConfig
    plan: Plan
    store: Store
    invocation: str
    """Config and options as the user wrote them, for commands in errors."""
    from_: str | None = None
    until: str | None = None
    force: tuple[str, ...] = ()


def resolve_engine(engine: Literal["auto", "local", "prefect"]) -> Engine:
    """``auto`` is prefect where a Prefect API is configured in the environment."""
    if engine != "auto":
        return engine
    return "prefect" if os.environ.get(API_URL) else "local"


def execute(call: RunCall, engine: Engine, listener: Listener) -> RunOutcome:
    """Run ``call`` to its end.

    Raises:
        WsssError: the first failure.
    """
    if engine == "local":
        return run_pipeline(
            call.run,
            call.store,
            from_=call.from_,
            until=call.until,
            force=call.force,
            listener=listener,
            invocation=call.invocation,
            plan=call.plan,
        )
    from pipeline.flows.embedded_server import EmbeddedServer
    from pipeline.flows.environment import set_prefect_environment

    set_prefect_environment()
    if os.environ.get(API_URL):
        return _run_flow(call, listener, None)
    server = EmbeddedServer(Path(os.environ["PREFECT_HOME"]))
    try:
        os.environ[API_URL] = server.start()
        return _run_flow(call, listener, server)
    finally:
        os.environ.pop(API_URL, None)
        server.stop()


def _run_flow(call: RunCall, listener: Listener, server: EmbeddedServer | None) -> RunOutcome:
    from pipeline.flows.flows import run_flow  # takes seconds, in which the server starts too

    if server is not None:
        server.wait()
    return run_flow(
        call.config,
        overrides=call.overrides,
        artifacts=call.store.location,
        from_=call.from_,
        until=call.until,
        force=call.force,
        listener=listener,
        run=call.run,
        plan=call.plan,
        is_server_ending=server is not None,
    )
