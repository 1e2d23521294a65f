"""Build an artifact in shards, with however many processes on however many machines share the store.

Nobody is the master: each process takes the shards that nobody holds, waits for those that others hold, takes over the
shard of a process that died, and puts all together when they are published, unless another did so first.  The artifact
is byte for byte what one process makes of the whole, since a stage that finds all its files only adds what needs the
whole set.

Locks: a process that holds a shard's lock never waits for another one; only the holder of the whole's lock may wait for
a shard's.  So nobody waits in a circle.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.engine.making import Built, Job, make_artifact, set_aside
from pipeline.engine.shard_building import ShardBuilder
from pipeline.engine.shard_progress import MergeProgress, WarningProgress
from pipeline.engine.shards import (
    adopt_shards,
    clear_shards,
    discard_shards,
    is_ordered,
    link_files,
    place_order,
)
from pipeline.store.artifacts import Artifact, Store
from stages.contracts import Progress, StageResult

Run = dict[str, Any]
"""``run`` of a manifest."""


class SharedBuild:
    """One process's share in building one artifact."""

    def __init__(
        self, job: Job, count: int, store: Store, progress: WarningProgress, *, units: Callable[[], int]
    ) -> None:
        """Begin nothing yet.

        Args:
            job: The whole.
            count: Shards.
            store: Where to build.
            progress: Hears of everything.
            units: Tells how many images, or whatever the stage works through one by one, the whole has.
        """
        self._job, self._count, self._store, self._progress = job, count, store, progress
        self._shards = ShardBuilder(
            job, count, store, progress, units=units, is_over=lambda: self._result() is not None
        )
        self._replaced: Mapping[str, Any] | None = None
        """``run`` of the artifact that is built again; any other one is the result."""
        self._warnings: list[str] = []
        self._is_continued = False

    def build(self, *, force: bool) -> Built:
        """Build with whoever helps, until the artifact is published.

        Args:
            force: Build it again, from the beginning, even if it is there.
        """
        artifact = self._open(force=force)
        if artifact is not None:
            return Built(artifact, "cached", artifact.warnings)
        while True:
            self._build_until_all_are_there()
            merged = self._put_together()
            if merged is not None:
                return merged

    def help(self) -> Built:
        """Build shards until none is free; wait for nobody and put nothing together."""
        artifact = self._store.lookup(*self._job.place)
        if artifact is not None and is_ordered(self._store, artifact):
            self._replaced = artifact.run
        while self._result() is None and self._shards.build_free():
            pass
        if self._result() is not None and self._shards.num_built:
            self._tidy()
        return Built(None, "helped", tuple(self._progress.warnings), self._shards.num_built)

    # -- before -------------------------------------------------------------------------------------------------------

    def _open(self, *, force: bool) -> Artifact | None:
        """The artifact if there is nothing to do; else clear the way."""
        store, where = self._store, self._job.place
        with store.lock(*where, waiting=lambda holder: self._wait_for(f"{holder} builds {' '.join(where)}")):
            damage: list[str] = []
            artifact = store.lookup(*where, damaged=damage.append, fresh=True)
            if artifact is not None and not force:
                return artifact
            if damage:
                self._warnings.append(set_aside(store, where, damage[0]))
                self._progress.warn(self._warnings[-1])
            if force:
                store.work_dir(*where, fresh=True)
                place_order(store, *where, artifact)
                discard_shards(store, *where, self._wait_for)
            else:
                adopt_shards(store, *where, besides=self._count)
            self._replaced = artifact.run if artifact is not None else None
            num_there = self._count - len(self._shards.missing())
            self._is_continued = num_there > 0 or store.has_work(*where)
        if self._is_continued:
            self._progress.info(f"continuing: {num_there} of {self._count} shards are there")
        return None

    def _wait_for(self, who: str) -> None:
        self._progress.info(f"waiting: {who}")

    # -- meanwhile ----------------------------------------------------------------------------------------------------

    def _build_until_all_are_there(self) -> None:
        """Return when every shard is published, or the artifact itself is."""
        is_told = False
        while self._result() is None and self._shards.missing():
            if self._shards.build_free():
                is_told = False
                continue
            held = self._shards.missing()
            if not held or self._result() is not None:
                continue
            if not is_told:
                self._wait_for(f"{self._shards.lock(held[0]).holder()} builds {held[0]}")
                is_told = True
            time.sleep(self._store.poll_s)

    def _result(self) -> Artifact | None:
        """The artifact, if anybody has published it since this build began."""
        artifact = self._store.lookup(*self._job.place)
        return artifact if artifact is not None and artifact.run != self._replaced else None

    # -- the whole ----------------------------------------------------------------------------------------------------

    def _put_together(self) -> Built | None:
        """Publish the artifact, unless another process did; None when a shard turns out to be missing or damaged."""
        store, where = self._store, self._job.place
        with store.lock(*where, waiting=lambda holder: self._wait_for(f"{holder} puts the shards together")):
            artifact = self._result()
            if artifact is not None:
                return self._built(artifact, "built" if self._shards.num_built else "cached")
            shards = self._shards.check_all()
            if shards is None:
                return None
            texts = [*self._warnings, *self._shards.warnings, *(text for shard in shards for text in shard.warnings)]
            progress = MergeProgress(self._progress, len(shards), texts)
            if self._shards.order() is not None:
                store.work_dir(*where, fresh=True)
            call = partial(self._call_whole, shards, progress)
            artifact = make_artifact(self._job, store, call, progress, amend=partial(_add_shards, shards))
            clear_shards(store, *where)
        is_resumed = self._is_continued or artifact.run["resumed"]
        return self._built(artifact, "resumed" if is_resumed else "built")

    def _built(self, artifact: Artifact, state: str) -> Built:
        return Built(artifact, state, artifact.warnings, self._shards.num_built)

    def _call_whole(self, shards: Sequence[Artifact], progress: Progress, work: Path) -> StageResult:
        for shard in shards:
            link_files(shard.path, work)
        return self._job.call(work, progress, None)

    def _tidy(self) -> None:
        """Remove what this process built too late, when others had put everything together."""
        where = self._job.place
        lock = self._store.lock(*where)
        try:
            artifact = self._store.lookup(*where) if lock.try_acquire() else None
            if artifact is not None and not is_ordered(self._store, artifact):
                clear_shards(self._store, *where)
        finally:
            lock.release()


def _add_shards(shards: Sequence[Artifact], run: Run) -> Run:
    """``run`` of the whole: its seconds are those of the work, not of the clock, however many worked at once."""
    seconds = run["seconds"] + sum(shard.run["seconds"] for shard in shards)
    return {
        **run,
        "started": min([run["started"], *(shard.run["started"] for shard in shards)]),
        "seconds": round(seconds, 3),
        "resumed": run["resumed"] or any(shard.run["resumed"] for shard in shards),
        "shards": {"count": len(shards), "hosts": dict(Counter(shard.run["host"] for shard in shards))},
    }
