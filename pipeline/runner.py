"""Bring a run's artifacts into being: what is cached is reused, what is missing is built in a child process.

Reads and writes the store only.  Neither torch nor Prefect is imported here; the command line and the Prefect tasks
call the same functions.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.keys import Plan, plan_run
from pipeline.outcomes import Around, Listener, RunOutcome, SilentListener, StageOutcome, StageStatus
from pipeline.runs import RunRecord
from pipeline.spawn import run_child
from pipeline.stage_table import STAGES, TABLE, StageTable
from pipeline.store import Artifact, Store
from stages.errors import ConfigError, MissingArtifactError

__all__ = [
    "STAGES",
    "Around",
    "Listener",
    "RunOutcome",
    "SilentListener",
    "StageOutcome",
    "StageStatus",
    "ensure",
    "finished_artifacts",
    "missing_inputs",
    "run_pipeline",
    "run_stage",
    "stage_positions",
    "status",
]

# ---------------------------------------------------------------------------------------------------------------------
# One stage
# ---------------------------------------------------------------------------------------------------------------------


def ensure(
    stage: str,
    run: Any,  # noqa: ANN401 - the table's run type
    store: Store,
    *,
    force: bool = False,
    listener: Listener | None = None,
    plan: Plan | None = None,
    table: StageTable = TABLE,
) -> StageOutcome:
    """Make sure that the artifact of ``stage`` is in the store; the artifacts it reads must be there.

    Args:
        stage: Stage name.
        run: The config.
        store: Where artifacts live.
        force: Build it even if it is there.
        listener: Hears of the start, the progress and the end.
        plan: The run's keys, when the caller has them already; else the run is checked and planned here.
        table: The stages.

    Raises:
        WsssError: the stage failed; the listener has heard of it.
        KeyboardInterrupt: the child has been ended; its work is kept and continued by the next call.
    """
    listener = listener or SilentListener()
    plan = plan or plan_run(run, store.digest_cache, table)
    started = time.monotonic()
    if table.spec(stage).name not in plan.keys:
        outcome = StageOutcome(stage, None, None, "skipped", 0.0)
        listener.stage_finished(outcome)
        return outcome
    key = plan.keys[stage]
    listener.stage_started(stage, key)
    try:
        outcome = _cached(stage, key, store, listener, started) if not force else None
        outcome = outcome or _build(stage, plan, store, listener, force=force)
    except BaseException:
        seconds = time.monotonic() - started
        listener.stage_finished(StageOutcome(stage, key, None, "failed", seconds))
        raise
    listener.stage_finished(outcome)
    return outcome


def _cached(stage: str, key: str, store: Store, listener: Listener, started: float) -> StageOutcome | None:
    artifact = store.lookup(stage, key)
    if artifact is None:
        return None
    seconds = time.monotonic() - started
    return StageOutcome(stage, key, artifact.path, "cached", seconds, artifact.metrics, artifact.warnings)


def _build(stage: str, plan: Plan, store: Store, listener: Listener, *, force: bool) -> StageOutcome:
    request = {
        "table": plan.table.location,
        "run": plan.run.model_dump(mode="json"),
        "stage": stage,
        "key": plan.keys[stage],
        "content": dict(plan.contents[stage]),
        "upstream": {name: plan.keys[name] for name in plan.upstream(stage)},
        "data_root": None if plan.data.root is None else str(plan.data.root),
        "artifacts": str(store.root),
        "force": force,
    }
    started = time.monotonic()
    answer = run_child(request, listener, threads=_threads(plan))
    seconds = time.monotonic() - started
    warnings = tuple(answer["warnings"])
    return StageOutcome(
        stage, plan.keys[stage], Path(answer["path"]), answer["state"], seconds, answer["metrics"], warnings
    )


def missing_inputs(stage: str, plan: Plan, store: Store) -> tuple[str, ...]:
    """The stages that ``stage`` reads and whose artifacts are not in the store."""
    return tuple(name for name in plan.inputs(stage) if store.lookup(name, plan.keys[name]) is None)


def run_stage(
    stage: str,
    run: Any,  # noqa: ANN401 - the table's run type
    store: Store,
    *,
    force: bool = False,
    listener: Listener | None = None,
    invocation: str = "CONFIG",
    table: StageTable = TABLE,
) -> RunOutcome:
    """Run one stage from cached inputs, also one that the whole run would skip.

    Args:
        stage: Stage name.
        run: The config.
        store: Where artifacts live.
        force: Build it even if it is there.
        listener: Hears of the start, the progress and the end.
        invocation: Config and options as the user wrote them, for the command in the error.
        table: The stages.

    Raises:
        MissingArtifactError: an input is not in the store; the command that makes it is in the message.
    """
    plan = plan_run(run, store.digest_cache, table, last=table.spec(stage).name)
    missing = missing_inputs(stage, plan, store)
    if missing:
        raise _missing(stage, missing, invocation)
    with _terminate_as_interrupt(), RunRecord.open(store, plan) as record:
        outcome = ensure(stage, run, store, force=force, listener=listener, plan=plan, table=table)
    return RunOutcome(record.run_id, (outcome,), record.path)


def _missing(stage: str, missing: Sequence[str], invocation: str) -> MissingArtifactError:
    return MissingArtifactError(
        f"{stage} rests on the artifact of {' and '.join(missing)}, which is not in the store; "
        f"make it with: wsss run {invocation} --until {missing[-1]}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# A whole run
# ---------------------------------------------------------------------------------------------------------------------


def run_pipeline(
    run: Any,  # noqa: ANN401 - the table's run type
    store: Store,
    *,
    from_: str | None = None,
    until: str | None = None,
    force: Collection[str] = (),
    listener: Listener | None = None,
    invocation: str = "CONFIG",
    plan: Plan | None = None,
    around: Around | None = None,
    table: StageTable = TABLE,
) -> RunOutcome:
    """Check the inputs, then bring the stages into being one after the other.

    Args:
        run: The config.
        store: Where artifacts live.
        from_: First stage to run; the stages before it must be cached.
        until: Last stage to run.
        force: Stages to rebuild, each with all after it.
        listener: Hears of every stage.
        invocation: Config and options as the user wrote them, for the command in an error.
        plan: The run's keys, when the caller has them already.
        around: Called in place of each stage with its name and what brings it into being; returns what that returns.
        table: The stages.

    Returns:
        One outcome per stage up to ``until``.

    Raises:
        WsssError: the first failure; the listener has heard the outcomes before it and a ``failed`` one.
        KeyboardInterrupt: interrupted by SIGINT or SIGTERM; the unfinished stage continues next time.
    """
    first, last, forced_from = stage_positions(table, from_, until, force)
    plan = plan or plan_run(run, store.digest_cache, table)
    around = around or (lambda stage, body: body())
    missing = [n for n in table.names[:first] if n in plan.keys and store.lookup(n, plan.keys[n]) is None]
    if missing:
        raise _missing(table.names[first], missing, invocation)
    outcomes: list[StageOutcome] = []
    with _terminate_as_interrupt(), RunRecord.open(store, plan) as record:
        for text in plan.data.warnings:
            (listener or SilentListener()).log("warning", text)
        _check_networks(plan, table.names[: last + 1], store, max(forced_from, first), listener or SilentListener())
        for position, name in enumerate(table.names[: last + 1]):
            is_forced = position >= max(forced_from, first)
            body = partial(ensure, name, run, store, force=is_forced, listener=listener, plan=plan, table=table)
            outcomes.append(around(name, body))
    return RunOutcome(record.run_id, tuple(outcomes), record.path)


def _check_networks(plan: Plan, names: Collection[str], store: Store, forced_from: int, listener: Listener) -> None:
    """Find out in a child, with torch, what would otherwise come to light only after the first training."""
    missing = [
        name
        for position, name in enumerate(names)
        if name in plan.keys and (position >= forced_from or store.lookup(name, plan.keys[name]) is None)
    ]
    if plan.table.needs_check(plan.run, missing):
        listener.log("info", "checking that the networks can be built and their weights fit")
        request = {"table": plan.table.location, "run": plan.run.model_dump(mode="json"), "check": True}
        run_child(request, listener, threads=_threads(plan))


def _threads(plan: Plan) -> int:
    runtime = getattr(plan.run, "runtime", None)
    return 0 if runtime is None else runtime.threads


def stage_positions(
    table: StageTable, from_: str | None, until: str | None, force: Collection[str]
) -> tuple[int, int, int]:
    """Positions of the first, the last and the first forced stage.

    Raises:
        ConfigError: an unknown stage, a first one after the last, or a forced one that would not run.
    """
    order = {table.spec(name).name: position for position, name in enumerate(table.names)}
    for name in (from_, until, *force):
        if name is not None:
            table.spec(name)
    first = order[from_] if from_ is not None else 0
    last = order[until] if until is not None else len(order) - 1
    if first > last:
        raise ConfigError(f"--from {from_} comes after --until {until}; order: {', '.join(order)}")
    unforced = [f"--force {name}" for name in force if not first <= order[name] <= last]
    if unforced:
        bounds = f"{table.names[first]} … {table.names[last]}"
        raise ConfigError(f"{' and '.join(unforced)}: this run covers {bounds} only; change --from, --until or --force")
    return first, last, min((order[name] for name in force), default=len(order))


def finished_artifacts(
    run: Any,  # noqa: ANN401 - the table's run type
    store: Store,
    table: StageTable = TABLE,
) -> tuple[Plan, dict[str, Artifact]]:
    """The run's plan, and those of its artifacts that are in the store, by stage."""
    plan = plan_run(run, store.digest_cache, table)
    found = {name: store.lookup(name, key) for name, key in plan.keys.items()}
    return plan, {name: artifact for name, artifact in found.items() if artifact is not None}


def status(
    run: Any,  # noqa: ANN401 - the table's run type
    store: Store,
    table: StageTable = TABLE,
    *,
    plan: Plan | None = None,
) -> list[StageStatus]:
    """What the store holds for each stage of ``run``; builds nothing and sets nothing aside."""
    plan = plan or plan_run(run, store.digest_cache, table)
    return [_stage_status(name, plan.keys.get(name), store) for name in table.names]


def _stage_status(stage: str, key: str | None, store: Store) -> StageStatus:
    if key is None:
        return StageStatus(stage, "skipped", None, None)
    damage: list[str] = []
    artifact = store.lookup(stage, key, damaged=damage.append)
    if artifact is not None:
        return StageStatus(stage, "cached", key, artifact.path, artifact.size_bytes, artifact.run.get("started"))
    if damage:
        return StageStatus(stage, "damaged", key, store.path(stage, key))
    if store.has_work(stage, key):
        return StageStatus(stage, "partial", key, store.work_path(stage, key))
    return StageStatus(stage, "missing", key, None)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the child as Ctrl-C does, where nobody else has taken that signal."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
