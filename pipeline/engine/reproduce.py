"""Build a run's artifacts once more, beside the old ones, and compare: does this machine give the same?

Equal keys give equal bytes on the same kind of machine with the same number of threads.  Elsewhere the last bits of
float sums differ, a training follows them, and what can be equal are the scores.  Reads the store; writes to a store of
its own and changes no artifact.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.yaml_models import load_values
from pipeline.engine.outcomes import Listener
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.records import RunRecord
from pipeline.engine.run import Run
from pipeline.engine.stage_table import TABLE, StageTable
from pipeline.store.artifacts import Artifact, Store
from pipeline.store.provenance import ENVIRONMENT
from stages.errors import ConfigError, EnvironmentFailure

Verdict = Literal["equal", "close", "different"]


@dataclass(frozen=True)
class Reproduction:
    """An artifact, and what differs of the one that was built again."""

    stage: str
    key: str
    seconds: float
    """What building it again took."""
    environment: Mapping[str, tuple[Any, Any]]
    """Of the places where they were built, the likeliest cause first: before, now."""
    files: Mapping[str, str]
    """Files that are not the same: different, missing or new."""
    num_files: int
    """Of both together."""
    metrics: Mapping[str, tuple[float | None, float | None]]
    """All metrics of the stage, equal ones too: before, now.  A training has none: its scores are evaluate's."""


def judge(found: Sequence[Reproduction], tolerance: float) -> Verdict:
    """``equal`` byte for byte; ``close`` where bytes differ and every metric agrees; else, or without any, different.

    The metrics must be of the last stage that differs, or of one after it.
    ``tolerance`` is absolute for metrics up to 1 in size (0.01 is a point of mIoU), and a share of a larger one.
    """
    differing = [position for position, stage in enumerate(found) if stage.files]
    if not differing:
        return "equal"
    # of a stage without metrics, such as a training, a later one tells: what comes before knows nothing of it
    judges = [stage for stage in found[differing[-1] :] if stage.metrics]
    pairs = [pair for stage in found for pair in stage.metrics.values()]
    return "close" if judges and all(agrees(*pair, tolerance) for pair in pairs) else "different"


def agrees(before: float | None, now: float | None, tolerance: float) -> bool:
    """Whether two values of one metric are equal within ``tolerance``; None is a value of its own."""
    if before is None or now is None:
        return before is now
    return abs(before - now) <= tolerance * max(1.0, abs(before))


def reproduce(
    record: RunRecord,
    store: Store,
    beside: Store,
    *,
    stage: str | None = None,
    listener: Listener,
    done: Callable[[Reproduction], None],
    table: StageTable = TABLE,
) -> list[Reproduction]:
    """Build the artifacts of a run again in ``beside`` and compare them with those in ``store``.

    What ``beside`` has of these keys is taken as it is, so that a call that was interrupted goes on.

    Args:
        record: The run.
        store: Holds its artifacts.
        beside: Where they are built again.
        stage: Build this stage alone, of the old inputs; None builds all that the store has from the first on, each of
            what was built before it.
        listener: Hears of the building.
        done: Hears of each stage when it has been compared.
        table: The stages.

    Raises:
        ConfigError: the run has no such stage, or its config is none any more.
        EnvironmentFailure: data or code are others than then, so that the run would have other keys.
        MissingArtifactError: an artifact of the run is not in the store.
        WsssError: a stage failed.
    """
    config = load_values(table.run_type, record.config, (), f"the config of {record.path.stem}")
    stages = [name for name in table.names if name in record.keys]  # a record has them by the alphabet
    wanted = stages if stage is None else [table.spec(stage).name]
    if not wanted or wanted[0] not in record.keys:
        raise ConfigError(f"{record.path.stem} has no {stage}; its stages: {', '.join(stages)}")
    if stage is None:
        # of a run that ended early, or was pruned, what there is
        is_there = {name: store.lookup(name, key) is not None for name, key in record.keys.items()}
        wanted = list(itertools.takewhile(is_there.__getitem__, stages)) or stages
        if left := stages[len(wanted) :]:
            listener.info(f"built again up to {wanted[-1]}: {left[0]} of this run is not in the store")
    plan = plan_run(config, store.digest_cache, table, last=wanted[-1])
    before = {name: store.require(name, record.keys[name]) for name in wanted}
    _check_keys(record, plan, before)
    for name in plan.upstream(wanted[0]):
        _link(store.require(name, plan.keys[name]), beside)
    again = Run(config, beside, listener=listener, plan=plan, table=table)
    found = []
    for name in wanted:
        if again.ensure(name).state == "cached":
            listener.warn(f"{name} was in {beside.root} already, and is compared as it is: nothing was built again")
        found.append(_compare(before[name], beside.require(name, plan.keys[name])))
        done(found[-1])
    return found


def _check_keys(record: RunRecord, plan: Plan, before: Mapping[str, Artifact]) -> None:
    problems = []
    for name, artifact in before.items():
        if plan.keys.get(name) != artifact.key:
            now = plan.contents.get(name, {})
            others = sorted(part for part in now if now[part] != artifact.content.get(part))
            others = [part for part in others if part != "inputs"] or others  # of other inputs their own stage tells
            problems.append(f"{name}: {', '.join(others) or 'not a stage of this run any more'}")
    if problems:
        raise EnvironmentFailure(
            f"{record.path.stem} cannot be built again here: its data, weights or stages are others than on "
            f"{record.started[:10]}; bring them back, or run its config anew. What decides a result and differs:",
            problems,
        )


def _link(artifact: Artifact, beside: Store) -> None:
    """Put an artifact into another store: as links to its files where that is on the same disk, else as a copy."""
    target = beside.path(artifact.stage, artifact.key)
    if target.exists():
        return
    part = target.with_name(f".work-{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(artifact.path, part, copy_function=_link_or_copy)
    part.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _compare(before: Artifact, now: Artifact) -> Reproduction:
    old, new = ({name: file["sha256"] for name, file in found.content["files"].items()} for found in (before, now))
    words = {name: "missing" if name not in new else "new" if name not in old else "different" for name in old | new}
    metrics = [dict(_numbers(found.metrics)) for found in (before, now)]
    return Reproduction(
        stage=before.stage,
        key=before.key,
        seconds=float(now.run.get("seconds", 0.0)),
        environment=_differences(before.run, now.run),
        files={name: words[name] for name in sorted(words) if old.get(name) != new.get(name)},
        num_files=len(words),
        metrics={name: (metrics[0].get(name), metrics[1].get(name)) for name in {**metrics[0], **metrics[1]}},
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs of two environments; of the packages each one that does."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in ENVIRONMENT:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= {package: (old.get(package), new.get(package)) for package in {**old, **new}}
        else:
            found[name] = (old, new)
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """Every number in a stage's metrics under its dotted name; None for one that was not finite."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from _numbers({str(position): item for position, item in enumerate(value)}, f"{prefix}{name}.")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield prefix + name, value
