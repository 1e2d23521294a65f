"""Say before a run how much each stage has to do and about how long that takes on this machine.

Reads manifests of the store; writes nothing; torch-free.  The seconds come from the newest artifact of the same stage
that this host built with the same networks and ``runtime``, in proportion to the work.  Where there is none, nothing is
guessed: only the work is told.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.engine.disk_projection import describe_bytes, facts_of_run
from pipeline.engine.outcomes import StageStatus
from pipeline.engine.plan import Plan
from pipeline.engine.workload import DataFacts, Work, count_work, facts_of_index
from pipeline.store.artifacts import Store
from stages.errors import WsssError

SCALED_AT_MOST = 20.0
"""An artifact of less than a twentieth of the work tells how long a stage takes to start, not how long it works."""

_LOOKED_AT = 20
"""Artifacts of a stage that are looked at, newest first: an estimate must not keep anybody waiting."""


@dataclass(frozen=True)
class StageEstimate:
    """What is known of one stage before it is built."""

    work: Work
    seconds: float | None
    """None where no artifact in the store tells."""
    is_begun: bool
    """Whether earlier work is continued, so that less is left than ``work``."""


Estimate = Mapping[str, StageEstimate]
"""By stage, for the stages that will be built; empty when none will."""


def estimate(plan: Plan, store: Store, stages: Sequence[StageStatus], *, forced: int, host: str = "") -> Estimate:
    """Estimate the stages of a run that will be built.

    Args:
        plan: The run.
        store: Where earlier artifacts lie.
        stages: What the store holds for the stages of the run, in order.
        forced: Position of the first stage that is built whatever is there; past the end when none is.
        host: Name of this machine; default is what the system says.
    """
    is_needed = {
        stage.stage: stage.state == "partial" and position < forced
        for position, stage in enumerate(stages)
        if stage.state != "skipped" and (stage.state != "cached" or position >= forced)
    }
    data = facts_of_run(plan, store) if is_needed else None
    if data is None:
        return {}
    history = _History(store, host or socket.gethostname(), plan)
    found: dict[str, StageEstimate] = {}
    for name, is_begun in is_needed.items():
        work = count_work(plan.contents[name], plan.contents, data)
        if work is not None:
            found[name] = StageEstimate(work, history.seconds(name, work), is_begun)
    return found


class _History:
    """How long stages took on this machine."""

    def __init__(self, store: Store, host: str, plan: Plan) -> None:
        self._store, self._host, self._plan = store, host, plan
        self._runtime = plan.run.runtime.model_dump(mode="json")
        self._facts: dict[str, DataFacts] = {}

    def seconds(self, stage: str, work: Work) -> float | None:
        """What the newest comparable artifact took, in proportion to ``work``."""
        if work.cost is None:
            return None
        for before, seconds in self._builds(stage):
            if before.path != work.path or not before.cost or before.cost * SCALED_AT_MOST < work.cost:
                continue
            return seconds * work.cost / before.cost
        return None

    def _builds(self, stage: str) -> Iterator[tuple[Work, float]]:
        """Work and seconds of this host's artifacts, newest first; what is damaged or of another form is no help."""
        for manifest in islice(self._store.newest_manifests(stage), _LOOKED_AT):
            try:
                work = self._work(manifest) if self._is_comparable(manifest) else None
                if work is not None:
                    yield work, float(manifest["run"]["seconds"])
            except (WsssError, KeyError, TypeError, ValueError, AttributeError):
                continue

    def _is_comparable(self, manifest: Mapping[str, Any]) -> bool:
        content, run = manifest["content"], manifest["run"]
        is_here = run["host"] == self._host and run.get("runtime", self._runtime) == self._runtime
        is_whole = not run.get("resumed", False)  # the seconds of a continued build are those of its last part
        return is_here and is_whole and content["version"] == self._plan.contents[content["stage"]]["version"]

    def _work(self, manifest: Mapping[str, Any]) -> Work | None:
        content, upstream = manifest["content"], manifest["run"]["upstream"]
        inputs = {name: self._store.manifest(name, key)["content"] for name, key in content["inputs"].items()}
        key = upstream.get("prepare_data", content["key"])
        if key not in self._facts:
            self._facts[key] = facts_of_index(self._store.path("prepare_data", key))
        return count_work(content, inputs, self._facts[key])


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------


def describe_stage(found: StageEstimate) -> str:
    """``480 steps, about 3 min``, or the work alone."""
    amount = f"{found.work.count:,} {found.work.unit}"
    if found.seconds is None:
        return amount
    return f"{amount}, {'at most ' if found.is_begun else ''}{about(found.seconds)}"


def describe_time(found: Estimate) -> str:
    """The whole time, as far as it is known, and for which stages it is not."""
    known = {name: stage.seconds for name, stage in found.items() if stage.seconds is not None}
    unknown = [name for name in found if name not in known]
    reason = "the first run on a machine has no estimate and shows the time left as it goes"
    if not known:
        return reason
    at_most = "at most " if any(found[name].is_begun for name in known) else ""
    total = f"{at_most}{about(sum(known.values()))}"
    if not unknown:
        return f"{total} in all, going by earlier runs on this machine"
    return f"{total} without {', '.join(unknown)}: {reason}"


def describe_disk(found: Estimate) -> str | None:
    """What the stages write, together and one by one; None where nothing of it is known."""
    known = {name: stage.work.disk_bytes for name, stage in found.items() if stage.work.disk_bytes is not None}
    return describe_bytes(known, [name for name in found if name not in known]) or None


def about(seconds: float) -> str:
    """``about 8 s``, ``about 40 s``, ``about 3 min``, ``about 2 h 10 min``: no finer than it is known."""
    if seconds < 10:
        return f"about {max(1, math.ceil(seconds))} s"
    if seconds < 57.5:
        return f"about {round(seconds / 5) * 5} s"
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"about {minutes} min"
    hours, rest = divmod(round(minutes / 10) * 10, 60)
    return f"about {hours} h {rest:02d} min" if rest else f"about {hours} h"
