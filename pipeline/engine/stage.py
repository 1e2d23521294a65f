"""Bring one stage's artifact into being, alone or in shards, or help another run with it.

The stage's body runs in a child process.  Reads and writes the store only; imports neither torch nor Prefect.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.engine.outcomes import Listener, Recruit, SilentListener, StageOutcome
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.shards import is_ordered, shard_count
from pipeline.engine.spawn import run_child
from pipeline.engine.stage_table import TABLE, StageTable
from pipeline.store.artifacts import Store
from stages.errors import ConfigError, MissingArtifactError


def ensure(
    stage: str,
    run: Any,  # noqa: ANN401 - the table's run type
    store: Store,
    *,
    force: bool = False,
    listener: Listener | None = None,
    plan: Plan | None = None,
    recruit: Recruit | None = None,
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
        recruit: Called with the stage's name around the building of one that is built in shards.
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
        outcome = _cached(stage, key, store, started) if not force else None
        if outcome is None:
            with _recruited(stage, plan, recruit):
                outcome = _build(stage, plan, store, listener, force=force)
    except BaseException:
        seconds = time.monotonic() - started
        listener.stage_finished(StageOutcome(stage, key, None, "failed", seconds))
        raise
    listener.stage_finished(outcome)
    return outcome


def _cached(stage: str, key: str, store: Store, started: float) -> StageOutcome | None:
    artifact = store.lookup(stage, key)
    if artifact is None:
        return None
    seconds = time.monotonic() - started
    return StageOutcome(stage, key, artifact.path, "cached", seconds, artifact.metrics, artifact.warnings)


def _recruited(stage: str, plan: Plan, recruit: Recruit | None) -> AbstractContextManager[None]:
    is_shared = shard_count(plan.table.spec(stage), plan.run) > 1
    return recruit(stage) if recruit is not None and is_shared else nullcontext()


def _build(stage: str, plan: Plan, store: Store, listener: Listener, *, force: bool) -> StageOutcome:
    started = time.monotonic()
    answer = run_child(_request(stage, plan, store, force=force), listener, threads=thread_count(plan))
    return _outcome(stage, plan, answer, time.monotonic() - started)


def _outcome(stage: str, plan: Plan, answer: Mapping[str, Any], seconds: float) -> StageOutcome:
    path, warnings = Path(answer["path"]), tuple(answer["warnings"])
    return StageOutcome(stage, plan.keys[stage], path, answer["state"], seconds, answer["metrics"], warnings)


def _request(stage: str, plan: Plan, store: Store, *, force: bool = False, only_parts: bool = False) -> dict[str, Any]:
    return {
        "table": plan.table.location,
        "run": plan.run.model_dump(mode="json"),
        "stage": stage,
        "key": plan.keys[stage],
        "content": dict(plan.contents[stage]),
        "upstream": {name: plan.keys[name] for name in plan.upstream(stage)},
        "data_root": None if plan.data.root is None else str(plan.data.root),
        "artifacts": store.location,
        "force": force,
        "only_parts": only_parts,
    }


def missing_inputs(stage: str, plan: Plan, store: Store) -> tuple[str, ...]:
    """The stages that ``stage`` reads and whose artifacts are not in the store."""
    return tuple(name for name in plan.inputs(stage) if store.lookup(name, plan.keys[name]) is None)


def help_with(
    stage: str,
    run: Any,  # noqa: ANN401 - the table's run type
    store: Store,
    *,
    listener: Listener | None = None,
    invocation: str = "CONFIG",
    plan: Plan | None = None,
    table: StageTable = TABLE,
) -> int:
    """Build shards of a stage that another run is at, until nobody leaves one free; wait for nobody.

    Args:
        stage: Stage name.
        run: The config, with the same ``runtime.shards`` as the other run's.
        store: The store of the other run.
        listener: Hears of the start, the progress and the end.
        invocation: Config and options as the user wrote them, for the command in the error.
        plan: The keys up to this stage, when the caller has them already.
        table: The stages.

    Returns:
        How many shards were built; 0 where the artifact is there and nobody builds it again.

    Raises:
        ConfigError: this stage is not built in shards, or ``runtime.shards`` is 1.
        MissingArtifactError: an input is not in the store; the command that makes it is in the message.
        WsssError: the stage failed; the listener has heard of it.
    """
    if shard_count(table.spec(stage), run) == 1:
        possible = ", ".join(spec.name for spec in table.specs if spec.shard_units is not None)
        raise ConfigError(
            f"{stage} is not built in shards, so there is nothing to help with: runtime.shards must be above 1 as in "
            f"the run to help, and the stage one of {possible}"
        )
    plan = plan_with_inputs(stage, run, store, invocation, plan, table)
    artifact = store.lookup(stage, plan.keys[stage])
    if artifact is not None and not is_ordered(store, artifact):
        return 0
    listener, started = listener or SilentListener(), time.monotonic()
    listener.stage_started(stage, plan.keys[stage])
    try:
        with terminate_as_interrupt():
            answer = run_child(_request(stage, plan, store, only_parts=True), listener, threads=thread_count(plan))
    except BaseException:
        listener.stage_finished(StageOutcome(stage, plan.keys[stage], None, "failed", time.monotonic() - started))
        raise
    listener.stage_finished(_outcome(stage, plan, answer, time.monotonic() - started))
    return answer["num_shards"]


def plan_with_inputs(
    stage: str,
    run: Any,  # noqa: ANN401 - the table's run type
    store: Store,
    invocation: str,
    plan: Plan | None,
    table: StageTable,
) -> Plan:
    """The plan up to ``stage``, all of whose inputs are in the store."""
    plan = plan or plan_run(run, store.digest_cache, table, last=table.spec(stage).name)
    missing = missing_inputs(stage, plan, store)
    if missing:
        raise missing_error(stage, missing, invocation)
    return plan


def missing_error(stage: str, missing: Sequence[str], invocation: str) -> MissingArtifactError:
    """The error for inputs that are not in the store, with the command that makes them."""
    return MissingArtifactError(
        f"{stage} rests on the artifact of {' and '.join(missing)}, which is not in the store; "
        f"make it with: wsss run {invocation} --until {missing[-1]}"
    )


def thread_count(plan: Plan) -> int:
    """Threads of a child's numeric libraries; 0 leaves their defaults."""
    runtime = getattr(plan.run, "runtime", None)
    return 0 if runtime is None else runtime.threads


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
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
