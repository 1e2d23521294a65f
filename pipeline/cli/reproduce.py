"""``wsss reproduce``: build a finished run once more and say whether the same came out."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import ArtifactsOption, JsonOption, as_path
from pipeline.cli.output import get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS
from stages.errors import EnvironmentFailure, InputError

if TYPE_CHECKING:
    from pipeline.engine.reproduce import Reproduction

SHOWN = 8
"""Files and metrics of a stage that are named."""


def reproduce(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Beginning of a run's name, or last.")],
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="This stage alone, of its old inputs.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far metrics may be apart where bytes differ; 0.01 is a point of mIoU.")
    ] = 0.01,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", parser=as_path, help="Store to build in and keep; default a folder that is removed."
        ),
    ] = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Build a run's artifacts again beside the old ones and compare: equal, equal within a tolerance, or different.

    Exit 4 where they are different.  Nothing that is stored is changed.
    """
    output = get_output(context)
    output.document = {"run": None, "verdict": None, "tolerance": tolerance, "stages": []}

    from pipeline.cli.console import ConsoleListener, make_console
    from pipeline.engine.records import REPRODUCED, find_run, reproduction_lock
    from pipeline.engine.reproduce import agrees, judge
    from pipeline.engine.reproduce import reproduce as build_again
    from pipeline.engine.stage_table import STAGES
    from pipeline.store.artifacts import Store, open_store

    store = open_store(artifacts)
    record = find_run(store, run)
    output.document["run"] = record.path.stem
    if out is not None and out.resolve() == store.root.resolve():
        raise InputError(f"--out {out} is the store of the run itself; name another folder")
    beside, lock = Store(out or store.root / REPRODUCED), reproduction_lock(store)
    if out is None and not lock.try_acquire():
        raise EnvironmentFailure(
            f"{lock.holder()} reproduces a run of {store.location}; wait for it, or give --out DIR"
        )
    listener = ConsoleListener(make_console(is_json=output.is_json), STAGES if stage is None else (stage,))

    def tell(found: Reproduction) -> None:
        entry = dataclasses.asdict(found)
        entry["metrics"] = {name: pair for name, pair in found.metrics.items() if not agrees(*pair, 0.0)}
        output.document["stages"].append(entry)
        for line in describe(found, tolerance):
            listener.info(line)

    try:
        found = build_again(record, store, beside, stage=stage, listener=listener, done=tell)
        if out is None:
            shutil.rmtree(beside.root, ignore_errors=True)
    finally:
        listener.close()
        lock.release()
    verdict = output.document["verdict"] = judge(found, tolerance)
    name, stages = record.path.stem, f"{len(found)} stage{'' if len(found) == 1 else 's'}"
    if verdict == "different":
        problems = [f"{each.stage}: {line}" for each in found if each.files for line in describe(each, tolerance)]
        kept = f"; what was built is in {out}" if out else "; keep what is built, to look at it, with --out DIR"
        raise EnvironmentFailure(f"{name} was not reproduced{kept}", problems)
    how = "byte for byte" if verdict == "equal" else f"bytes differ, every metric agrees within {tolerance:g}"
    output.tell(f"{name}: {stages} reproduced, {how}")


def describe(found: Reproduction, tolerance: float) -> list[str]:
    """What of a stage is not the same: the environment first, since it is the likeliest cause; then files, metrics."""
    from pipeline.engine.reproduce import agrees

    def join(pairs: Mapping[str, tuple[Any, Any]]) -> str:
        shown = [f"{name} {_word(before)} → {_word(now)}" for name, (before, now) in pairs.items()]
        return "; ".join(shown[:SHOWN] + ([f"and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []))

    lines = [f"built elsewhere: {join(found.environment)}"] if found.environment else []
    if not found.files:
        return [*lines, f"all {found.num_files} files are equal"]
    names = [f"{name} ({state})" for name, state in found.files.items()]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    lines.append(f"{len(names)} of {found.num_files} files are not equal: {', '.join(names[:SHOWN])}{more}")
    moved = {name: pair for name, pair in found.metrics.items() if not agrees(*pair, 0.0)}
    beyond = {name: pair for name, pair in moved.items() if not agrees(*pair, tolerance)}
    if not found.metrics:
        lines.append("no metrics of its own: what that does to the scores, evaluate says")
    elif moved:
        how = (
            f"; {len(beyond)} by more than {tolerance:g}: {join(beyond)}" if beyond else f", none by over {tolerance:g}"
        )
        lines.append(f"{len(moved)} of {len(found.metrics)} metrics differ{how}")
    else:
        lines.append(f"all {len(found.metrics)} metrics are equal")
    return lines


def _word(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return "nothing" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
