"""Cache keys: one hash per stage over everything that decides its result, and nothing else.

key = sha256(stage name, VERSION, config as sorted JSON, keys of its inputs, and per stage: what it reads of the data,
seed, weights, the CRF backend that really runs).  Device, processes, threads and every absolute path stay out.
The first stage indexes the data, and its key changes with any of them.  A later stage's key therefore does not hold it,
but its VERSION and a digest of the stage's own view of the data.
Reads the data set's lists and a cache of file digests; writes that cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engine.stage_table import STAGES, TABLE, DataState, StageTable
from stages.data.listing import find_changed_files
from stages.data.records import PROBLEMS_SHOWN
from stages.errors import DataError

__all__ = ["STAGES", "Plan", "key_content", "plan_run", "stage_key"]

_KEY_LENGTH = 20
"""Hex digits of a key: 80 bits tell apart far more artifacts than a disk holds."""


@dataclass(frozen=True)
class Plan:
    """The stages that a run needs, with the key of each."""

    run: Any
    table: StageTable
    data: DataState
    keys: Mapping[str, str]
    """Key by stage, in order, for the stages that are needed."""
    contents: Mapping[str, Mapping[str, Any]]
    """What each key is the hash of."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Stages that this run has no use for (``supervision: full`` needs no masks made)."""
        return tuple(name for name in self.table.names if name not in self.keys)

    def inputs(self, stage: str) -> tuple[str, ...]:
        """The stages whose artifacts ``stage`` reads."""
        return self.table.spec(stage).inputs(self.run)

    def upstream(self, stage: str) -> tuple[str, ...]:
        """All stages that ``stage`` rests on, without itself, in order."""
        return self.table.needed(self.run, stage)[:-1]

    def check_data(self, stage: str, cache_file: Path) -> None:
        """Make sure, before ``stage`` is built, that what it reads of the user's files is what its key says.

        Reads every byte of the data set's; of those that the config names, what their part of the key rests on.

        Raises:
            DataError: some were changed since they were digested; names them.  The next plan digests them anew.
            InputError: a file that the config names is no longer there.
        """
        digests, spec = self.data.digests, self.table.spec(stage)
        for name, value in spec.key_parts(self.run, self.data).items():
            if value != self.contents[stage][name]:
                raise DataError(
                    f"{stage}: a file that the config names (corrected masks, weights, a list of images) was changed "
                    "since this run was planned; run the same command again"
                )
        if digests is None:
            return
        view = None if spec.view is None else spec.view(self.run, digests.listing)
        if changed := find_changed_files(digests, view, cache_file):
            raise DataError(
                f"{stage}: the data in {self.data.root} is not what {self.table.names[0]} indexed ({len(changed):,} "
                "changed); put it back, or run the same command again: it indexes the data anew",
                [*changed[:PROBLEMS_SHOWN], *(["…"] if len(changed) > PROBLEMS_SHOWN else [])],
            )


def plan_run(run: Any, cache_file: Path, table: StageTable = TABLE, *, last: str | None = None) -> Plan:  # noqa: ANN401 - the table's run type
    """Check the run's inputs and compute the keys of the stages it needs.

    Args:
        run: The config.
        cache_file: Where digests of the data set's files are kept between calls.
        table: The stages.
        last: The stage that the plan is for; default the last of the table.

    Raises:
        InputError: config, data or weights cannot give a result; all problems at once.
    """
    data = table.read_data(run, cache_file)
    keys: dict[str, str] = {}
    contents: dict[str, Mapping[str, Any]] = {}
    for name in table.needed(run, last):
        contents[name] = key_content(table, name, run, data, keys)
        keys[name] = stage_key(contents[name])
    return Plan(run, table, data, keys, contents)


def key_content(table: StageTable, stage: str, run: Any, data: DataState, keys: Mapping[str, str]) -> dict[str, Any]:  # noqa: ANN401 - the table's run type
    """Everything that decides the result of ``stage``, as JSON; ``keys`` are those of the stages before it."""
    spec = table.spec(stage)
    inputs = {name: keys[name] for name in spec.inputs(run)}
    content = {"stage": stage, "version": spec.version, "inputs": inputs, **spec.key_parts(run, data)}
    if spec.view is not None and data.digests is not None:
        index = table.specs[0]
        inputs.pop(index.name, None)
        content["data"] = {index.name: index.version, "view": data.digests.of(spec.view(run, data.digests.listing))}
    return content


def stage_key(content: Mapping[str, Any]) -> str:
    """The hash of ``content``: equal content, in whatever order, gives an equal key."""
    text = json.dumps(content, sort_keys=True, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]
