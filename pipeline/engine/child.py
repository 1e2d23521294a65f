"""The process in which a stage runs: ``python -m pipeline.engine.child``.

Reads one JSON line from stdin, the request; stdin then stays open for as long as the parent lives, and its end kills
this process and everything it started.  Writes JSON lines to stdout; whatever else is printed goes to stderr.
Holds the artifact's lock while it works.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.engine.building import Job, build, help_build, parse_part
from pipeline.engine.failures import deliberate
from pipeline.engine.ranks import count_ranks, run_on_ranks
from pipeline.engine.request import (
    CheckRequest,
    ChildProgress,
    Events,
    Request,
    call_stage,
    die_with,
    load_table,
    prepare_call,
)
from pipeline.store.artifacts import Store, open_store
from stages.contracts import Part, Progress, StageResult
from stages.errors import EnvironmentFailure


def main() -> int:
    """Answer one request; the exit code says only whether there was an error, the lines say which."""
    events = Events(os.dup(1))
    os.dup2(2, 1)
    faulthandler.enable()
    request = TypeAdapter(CheckRequest | Request).validate_json(sys.stdin.buffer.readline())
    die_with(os.dup(0))
    empty = os.open(os.devnull, os.O_RDONLY)  # the stdin of the stage and its workers
    os.dup2(empty, 0)
    os.close(empty)
    progress = ChildProgress(events)
    doing = request.stage if isinstance(request, Request) else "the check of the networks"
    try:
        answer = answer_stage(request, progress) if isinstance(request, Request) else answer_check(request, progress)
    except Exception as error:
        progress.flush()
        progress.fail(deliberate(error, doing))
        return 1
    progress.flush()
    events.send("result", **answer)
    return 0


def answer_check(request: CheckRequest, progress: ChildProgress) -> dict[str, Any]:
    """Run the table's check; nothing to report when it raises nothing."""
    table = load_table(request.table)
    table.check(table.run_type.model_validate(request.run), progress)
    return {}


def answer_stage(request: Request, progress: ChildProgress) -> dict[str, Any]:
    """Build the artifact, or parts of it for another process, and describe what came of it."""
    started = time.monotonic()
    store = open_store(request.artifacts)
    store.on_lost = partial(_end_at_once, progress)
    job = Job(
        stage=request.stage,
        key=request.key,
        content=request.content,
        runtime=request.run.get("runtime"),
        upstream=request.upstream,
        call=partial(_call, request, store),
        num_parts=request.num_parts,
        num_units=partial(_count_units, request, store),
    )
    if request.part is not None:
        return {"num_parts": help_build(job, store, progress, parse_part(request.part), follows=request.follows)}
    built = build(job, store, progress, force=request.force)
    return {
        "state": built.state,
        "path": str(built.artifact.path),
        "seconds": time.monotonic() - started,
        "metrics": built.artifact.metrics,
        "warnings": list(built.artifact.warnings),
    }


def _call(request: Request, store: Store, work: Path, progress: Progress, part: Part | None) -> StageResult:
    """Call the stage, in several processes where it is a training on several devices."""
    spec, run, call = prepare_call(request, store)
    runtime = getattr(run, "runtime", None)
    arguments = {**spec.arguments(call), "runtime": runtime}
    if isinstance(progress, ChildProgress) and (num := count_ranks(arguments.get("config"), runtime)) > 1:
        return run_on_ranks(request, num, work, progress)
    return call_stage(spec, arguments, work, progress, part)


def _count_units(request: Request, store: Store) -> int:
    spec, _, call = prepare_call(request, store)
    return 0 if spec.num_units is None else spec.num_units(call)


def _end_at_once(progress: ChildProgress, error: EnvironmentFailure) -> None:
    """Another process has the lock: say so, and end with everything that this one started."""
    progress.fail(error)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
