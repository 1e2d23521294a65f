"""Make one artifact: call the stage in a work folder, publish what it wrote; one process, under the artifact's lock.

Reads and writes the store.
"""

from __future__ import annotations

import math
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.engine.shard_progress import WarningProgress
from pipeline.engine.shards import adopt_shards, clear_shards
from pipeline.store.artifacts import Artifact, Store
from pipeline.store.provenance import describe_machine
from stages.contracts import Part, Progress, StageResult
from stages.errors import EnvironmentFailure

MIN_FREE_BYTES = 200 * 2**20
"""A stage does not start on a disk with less."""


@dataclass(frozen=True)
class Job:
    """The artifact that is wanted, and the stage that makes it."""

    stage: str
    key: str
    content: Mapping[str, Any]
    """What the key is the hash of."""
    runtime: Mapping[str, Any] | None
    """How the stage is run, for the manifest."""
    call: Callable[[Path, Progress, Part | None], StageResult]
    """Calls the stage: work folder, progress, part (None for all)."""
    upstream: Mapping[str, str] = field(default_factory=dict)
    """Keys of the artifacts that it rests on, for the manifest: prepare_data's is in no other key."""

    @property
    def place(self) -> tuple[str, str]:
        """Stage and key."""
        return self.stage, self.key


@dataclass(frozen=True)
class Built:
    """What became of a job."""

    artifact: Artifact | None
    """None for a helper, which leaves the whole to others."""
    state: str
    """built, resumed, cached when another process had built it meanwhile, or helped."""
    warnings: tuple[str, ...]
    num_shards: int = 0
    """Shards that this process built."""


def build_alone(job: Job, store: Store, progress: WarningProgress, *, force: bool) -> Built:
    """Build the artifact under its lock, or find that another process has built it meanwhile.

    Args:
        job: What to build.
        store: Where to.
        progress: Hears of everything; its warnings go into the manifest.
        force: Build it again, from the beginning, even if it is there.
    """
    waiting = f"builds {job.stage} {job.key}"
    with store.lock(*job.place, waiting=lambda holder: progress.info(f"waiting: {holder} {waiting}")):
        damage: list[str] = []
        artifact = store.lookup(*job.place, damaged=damage.append)
        if artifact is not None and not force:
            return Built(artifact, "cached", artifact.warnings)
        if damage:
            progress.warn(set_aside(store, job.place, damage[0]))
        if force:
            store.work_dir(*job.place, fresh=True)
        else:
            adopt_shards(store, *job.place)
        artifact = make_artifact(job, store, lambda work: job.call(work, progress, None), progress)
        clear_shards(store, *job.place)
    return Built(artifact, "resumed" if artifact.run["resumed"] else "built", artifact.warnings)


def set_aside(store: Store, place: tuple[str, str], damage: str) -> str:
    """Rename a damaged artifact out of the way; what is to be said of it.  Needs the lock."""
    return f"damaged artifact: {damage}; set aside as {store.set_aside(*place)}, building it again"


def make_artifact(
    job: Job,
    store: Store,
    call: Callable[[Path], StageResult],
    progress: WarningProgress,
    *,
    place: tuple[str, str] | None = None,
    content: Mapping[str, Any] | None = None,
    amend: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Artifact:
    """Let ``call`` work in the work folder and publish what is there then.  Needs the lock.

    Args:
        job: What is built.
        store: Where to.
        call: Calls the stage with its folder.
        progress: Its warnings go into the manifest.
        place: Stage and key to publish under, instead of the job's.
        content: Of the manifest, instead of the job's.
        amend: Takes ``run`` of the manifest and returns what it is to be.

    Raises:
        EnvironmentFailure: the disk is nearly full.
    """
    place = place or job.place
    started, begun = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    _check_free_space(store.root)
    work, is_resumed = store.work_dir(*place)
    if is_resumed:
        progress.info(f"continuing the unfinished work in {work}")
    with store.mirror(*place):
        result = call(work)
    run = {
        "build": secrets.token_hex(8),  # no two builds have the same, however quick they are
        "started": begun,
        "seconds": round(time.monotonic() - started, 3),
        "resumed": is_resumed,
        "runtime": job.runtime,
        "upstream": dict(job.upstream),
        "metrics": to_plain(result.metrics),
        "warnings": progress.warnings,
        **describe_machine(),
    }
    content = {**(content or job.content), "mask_supervision": sorted(result.mask_supervision)}
    return store.publish(*place, content=content, run=amend(run))


def _check_free_space(root: Path) -> None:
    free = shutil.disk_usage(root).free
    if free < MIN_FREE_BYTES:
        raise EnvironmentFailure(
            f"{root}: {free / 2**20:.0f} MB free, at least {MIN_FREE_BYTES / 2**20:.0f} MB are needed; "
            "free some space (wsss artifacts prune) or choose another disk with --artifacts DIR"
        )


def to_plain(value: Any) -> Any:  # noqa: ANN401 - JSON is any
    """``value`` as strict JSON: numpy scalars become numbers, nan and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
