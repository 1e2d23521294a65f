"""Commands and stages in this process: torch is imported once, not in the process that each stage of a run has.

For tests of what a run builds.  That a stage has a process of its own is tested where it matters: ``test_child.py``,
``test_flows.py``, and wherever something is killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from pipeline.cli import main as cli
from pipeline.engine.child import answer_check, answer_stage
from pipeline.engine.outcomes import Listener
from pipeline.engine.request import CheckRequest, ChildProgress, Request


class _Relay:
    """What a child would write to its pipe, said to the listener at once."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def send(self, event: str, **fields: Any) -> None:
        if event == "step":
            values = {name: math.nan if value is None else value for name, value in fields.pop("values").items()}
            self._listener.step(**fields, **values)
        else:
            getattr(self._listener, event)(**fields)


def run_here(request: Mapping[str, Any], listener: Listener, *, threads: int = 0) -> dict[str, Any]:
    """``pipeline.engine.spawn.run_child`` without the child."""
    asked = TypeAdapter(CheckRequest | Request).validate_json(json.dumps(request))
    progress = ChildProgress(_Relay(listener))
    answer = answer_stage(asked, progress) if isinstance(asked, Request) else answer_check(asked, progress)
    progress.flush()
    return json.loads(json.dumps(answer))


@contextlib.contextmanager
def stages_here() -> Iterator[None]:
    """Within it, stages run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.engine.run.run_child", run_here)
        yield


def wsss_here(folder: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """The document of a command with --json that is given in ``folder``, its stages in this process too."""
    out, error = io.StringIO(), io.StringIO()
    with (
        stages_here(),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        found = cli.main([*words, "--json"])
    assert found == code, error.getvalue() + out.getvalue()
    return json.loads(out.getvalue())
