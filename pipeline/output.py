"""What a command says when it ends: one JSON document on stdout, or words; and the one exit code for both.

Imports nothing heavy: every command, ``--help`` too, goes through here.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

INTERRUPTED = 130


@dataclass
class Output:
    """The end of one command."""

    is_json: bool = False
    document: dict[str, Any] = field(default_factory=dict)
    """What ``--json`` prints; a command fills it as it goes, so that a failure shows how far it came."""

    def say(self, text: str) -> None:
        """Write ``text`` for people: to stdout, or to stderr where stdout is for JSON."""
        typer.echo(text, err=self.is_json)

    def finish(self, *, code: int = 0, message: str = "", problems: tuple[str, ...] = ()) -> None:
        """Print the JSON document, with ``error`` when ``code`` is not 0; without ``--json`` the error in words."""
        if self.is_json:
            error = {"code": code, "message": message, "problems": list(problems)}
            document = self.document | ({"error": error} if code else {})
            sys.stdout.write(json.dumps(plain(document), allow_nan=False, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        elif code:
            lines = [f"error: {message}", *(f"  - {problem}" for problem in problems)]
            typer.echo("\n".join(lines), err=True)


def get_output(context: typer.Context) -> Output:
    """The Output that ``main`` made for this command."""
    return context.ensure_object(Output)


def plain(value: Any) -> Any:  # noqa: ANN401 - JSON is any
    """``value`` as strict JSON: paths as text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
