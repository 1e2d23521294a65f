"""The variables that Prefect reads when it is imported: private, quiet, and local to this folder.

Imports nothing of Prefect; every process that will import it goes through here first.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from stages.contracts import expand_path

HOST = "127.0.0.1"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STARTUP_TIMEOUT_S = 120.0
API_URL = "PREFECT_API_URL"
HOME = "PREFECT_HOME"


def set_private(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make Prefect send nothing outside and keep its files here, in ``.prefect``; what the user has set stands."""
    environment[HOME] = str(expand_path(environment.get(HOME) or ".prefect").absolute())
    environment.setdefault("DO_NOT_TRACK", "1")
    environment.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")


def set_prefect_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make Prefect private, quiet and local to this folder; what the user has set stands.  Call before importing it."""
    set_private(environment)
    environment.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", f"{STARTUP_TIMEOUT_S:.0f}")
    # the listener writes to the terminal; Prefect's loggers still reach its API
    environment.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    environment.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


def bypass_proxy(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep requests to HOST out of a configured HTTP proxy, which could not answer those to this machine."""
    found = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    names = [name.strip() for name in found.split(",") if name.strip()]
    if HOST not in names and "*" not in names:
        names.append(HOST)
    environment["no_proxy"] = environment["NO_PROXY"] = ",".join(names)
