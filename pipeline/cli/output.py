"""What a command says when it ends: one JSON document on stdout, or words; and the one exit code for both.

Imports nothing heavy: every command, ``--help`` too, goes through here.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pipeline.cli.console import ConsoleListener
    from pipeline.config.run_config import RunConfig
    from pipeline.engine.outcomes import StageOutcome

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

    def tell(self, text: str) -> None:
        """Write the result for people: nothing where stdout is for JSON."""
        if not self.is_json:
            typer.echo(text)

    @contextmanager
    def progress(self, name: str) -> Iterator[ConsoleListener]:
        """Progress of a stage function that works in this process, shown under ``name`` until ``with`` ends."""
        from pipeline.cli.console import ConsoleListener, make_console

        listener = ConsoleListener(make_console(is_json=self.is_json), ())
        listener.stage_started(name)
        try:
            yield listener
        finally:
            listener.close()

    def finish(self, *, code: int = 0, message: str = "", problems: tuple[str, ...] = ()) -> None:
        """Print the JSON document, with ``error`` when ``code`` is not 0; without ``--json`` the error in words."""
        if self.is_json:
            error = {"code": code, "message": message, "problems": list(problems)}
            document = self.document | ({"error": error} if code else {})
            # ASCII alone: stdout may have another encoding than UTF-8, and a file's name may be no text at all
            sys.stdout.write(json.dumps(plain(document), allow_nan=False, ensure_ascii=True) + "\n")
            sys.stdout.flush()
        elif code:
            lines = [f"error: {message}", *(f"  - {problem}" for problem in problems)]
            typer.echo("\n".join(lines), err=True)


def get_output(context: typer.Context) -> Output:
    """The Output that ``main`` made for this command."""
    return context.ensure_object(Output)


def load_run(config: str, overrides: Sequence[str] | None, artifacts: str) -> RunConfig:
    """The config that CONFIG and ``--set`` mean: a file, a shipped config, or a run of the store ``artifacts``.

    Raises:
        ConfigError: with every problem.
        InputError: several runs begin so.
    """
    from pipeline.engine.records import load_named

    return load_named(config, overrides or [], artifacts)


def run_document(
    config: str | None, run_id: str | None = None, stages: Sequence[StageOutcome] = (), report: Path | None = None
) -> dict[str, Any]:
    """The JSON document of ``wsss run`` and ``wsss stage``; the same keys however far it came."""
    return {
        "run": run_id,
        "config": config,
        "stages": [
            {
                "stage": outcome.stage,
                "key": outcome.key,
                "path": outcome.path,
                "state": outcome.state,
                "seconds": round(outcome.seconds, 3),
                "metrics": dict(outcome.metrics),
            }
            for outcome in stages
        ],
        "metrics": {name: value for outcome in stages for name, value in outcome.metrics.items()},
        "report": report,
    }


def plain(value: Any) -> Any:  # noqa: ANN401 - JSON is any
    """``value`` as strict JSON: paths as text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
