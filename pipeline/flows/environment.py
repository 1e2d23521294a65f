"""The variables that Prefect reads when it is imported: private, quiet, and local to this folder.

Imports nothing of Prefect; every process that will import it goes through here first.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

HOST = "127.0.0.1"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STARTUP_TIMEOUT_S = 120.0
API_URL = "PREFECT_API_URL"
HOME = "PREFECT_HOME"


def default_home() -> Path:
    """PREFECT_HOME of the user, or ``.prefect`` in the working directory; absolute."""
    return Path(os.environ.get(HOME) or ".prefect").absolute()


def set_private(environment: MutableMapping[str, str] = os.environ, *, home: Path | None = None) -> None:
    """Make Prefect send nothing outside and keep its files here; what the user has set stands.

    Args:
        environment: Variables to complete.
        home: PREFECT_HOME, by default ``default_home()``.
    """
    environment.setdefault(HOME, str((home or default_home()).absolute()))
    environment.setdefault("DO_NOT_TRACK", "1")
    environment.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")


def set_prefect_environment(environment: MutableMapping[str, str] = os.environ, *, home: Path | None = None) -> None:
    """Make Prefect private, quiet and local to this folder; what the user has set stands.  Call before importing it.

    Args:
        environment: Variables to complete.
        home: PREFECT_HOME, by default ``.prefect`` in the working directory.
    """
    set_private(environment, home=home or Path(".prefect"))
    defaults = {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": f"{STARTUP_TIMEOUT_S:.0f}",
        # The listener writes to the terminal; Prefect's loggers still reach its API.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }
    for name, value in defaults.items():
        environment.setdefault(name, value)


def bypass_proxy(environment: MutableMapping[str, str] = os.environ, *, host: str = HOST) -> None:
    """Keep requests to ``host`` out of a configured HTTP proxy, which could not answer those to this machine."""
    found = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    names = [name.strip() for name in found.split(",") if name.strip()]
    if host not in names and "*" not in names:
        names.append(host)
    environment["no_proxy"] = environment["NO_PROXY"] = ",".join(names)
