"""A run as its user would write it on the command line; every command imports this, so it imports nothing heavy."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

DEFAULT_ARTIFACTS = "artifacts"
"""Root of the store where nobody says otherwise."""


def write_invocation(config: str, overrides: Sequence[str] | None, artifacts: str | Path) -> str:
    """Config and options as a user would write them behind ``wsss run``."""
    words = [config]
    for override in overrides or ():
        words += ["--set", override]
    if str(artifacts) != DEFAULT_ARTIFACTS:
        words += ["--artifacts", str(artifacts)]
    return shlex.join(words)
