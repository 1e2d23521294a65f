"""Bring a run's artifacts into being: what is cached is reused, what is missing is built in a child process.

Reads and writes the store only.  Neither torch nor Prefect is imported here; the command line and the Prefect tasks
call the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from pipeline.engine.forecast import check_space
from pipeline.engine.outcomes import Around, Listener, Recruit, RunOutcome, SilentListener, StageOutcome, StageStatus
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.records import RunRecord
from pipeline.engine.shards import existing_shards
from pipeline.engine.spawn import run_child
from pipeline.engine.stage import (
    ensure,
    help_with,
    missing_error,
    missing_inputs,
    plan_with_inputs,
    terminate_as_interrupt,
    thread_count,
)
from pipeline.engine.stage_table import STAGES, TABLE, StageTable
from pipeline.store.artifacts import Artifact, Store
from stages.errors import ConfigError

__all__ = [
    "STAGES",
    "Around",
    "Listener",
    "Recruit",
    "RunOutcome",
    "SilentListener",
    "StageOutcome",
    "StageStatus",
    "ensure",
    "finished_artifacts",
    "help_with",
    "missing_inputs",
    "run_pipeline",
    "run_stage",
    "stage_positions",
    "status",
]


def run_stage(
    stage: str,
    run: Any,  # noqa: ANN401 - the table's run type
    store: Store,
    *,
    force: bool = False,
    listener: Listener | None = None,
    invocation: str = "CONFIG",
    plan: Plan | None = None,
    around: Around | None = None,
    recruit: Recruit | None = None,
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
        plan: The keys up to this stage, when the caller has them already.
        around: Called in place of the stage, as in ``run_pipeline``.
        recruit: Called with the stage's name around the building of one that is built in shards.
        table: The stages.

    Raises:
        MissingArtifactError: an input is not in the store; the command that makes it is in the message.
        EnvironmentFailure: the disk is nearly full; nothing was built.
    """
    plan = plan_with_inputs(stage, run, store, invocation, plan, table)
    if stage in plan.keys and (force or store.lookup(stage, plan.keys[stage]) is None):
        check_space(store)
    around = around or _as_it_is
    body = partial(ensure, stage, run, store, force=force, listener=listener, plan=plan, recruit=recruit, table=table)
    with terminate_as_interrupt(), RunRecord.open(store, plan) as record:
        outcome = around(stage, body)
    return RunOutcome(record.run_id, (outcome,), record.path)


def _as_it_is(stage: str, body: Callable[[], StageOutcome]) -> StageOutcome:
    del stage
    return body()


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
    recruit: Recruit | None = None,
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
        recruit: Called with a stage's name around the building of one that is built in shards.
        table: The stages.

    Returns:
        One outcome per stage up to ``until``.

    Raises:
        EnvironmentFailure: the disk is nearly full; nothing was built.
        WsssError: the first failure; the listener has heard the outcomes before it and a ``failed`` one.
        KeyboardInterrupt: interrupted by SIGINT or SIGTERM; the unfinished stage continues next time.
    """
    first, last, forced_from = stage_positions(table, from_, until, force)
    plan = plan or plan_run(run, store.digest_cache, table)
    around = around or _as_it_is
    missing = [n for n in table.names[:first] if n in plan.keys and store.lookup(n, plan.keys[n]) is None]
    if missing:
        raise missing_error(table.names[first], missing, invocation)
    unbuilt = _to_build(plan, table.names[: last + 1], store, max(forced_from, first))
    if unbuilt:
        check_space(store)
    outcomes: list[StageOutcome] = []
    with terminate_as_interrupt(), RunRecord.open(store, plan) as record:
        for text in plan.data.warnings:
            (listener or SilentListener()).log("warning", text)
        _check_networks(plan, unbuilt, listener or SilentListener())
        for position, name in enumerate(table.names[: last + 1]):
            is_forced = position >= max(forced_from, first)
            body = partial(ensure, name, run, store, force=is_forced, listener=listener, plan=plan, table=table)
            outcomes.append(around(name, partial(body, recruit=recruit)))
    return RunOutcome(record.run_id, tuple(outcomes), record.path)


def _to_build(plan: Plan, names: Collection[str], store: Store, forced_from: int) -> list[str]:
    """Those of ``names`` that will be built: they are forced or not in the store."""
    return [
        name
        for position, name in enumerate(names)
        if name in plan.keys and (position >= forced_from or store.lookup(name, plan.keys[name]) is None)
    ]


def _check_networks(plan: Plan, missing: Collection[str], listener: Listener) -> None:
    """Find out in a child, with torch, what would otherwise come to light only after the first training."""
    if plan.table.needs_check(plan.run, missing):
        listener.log("info", "checking that the networks can be built and their weights fit")
        request = {"table": plan.table.location, "run": plan.run.model_dump(mode="json"), "check": True}
        run_child(request, listener, threads=thread_count(plan))


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
    shards = existing_shards(store, stage, key)
    if shards:
        return StageStatus(stage, "partial", key, store.path(*shards[0].place).parent)
    return StageStatus(stage, "missing", key, None)
