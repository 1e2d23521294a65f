"""Build those shards of an artifact that nobody holds: one process's part of the work.

Reads and writes the store.  A process that holds a shard's lock waits for no other lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pipeline.engine.making import Job, make_artifact, set_aside
from pipeline.engine.shard_progress import Board, ShardProgress, WarningProgress
from pipeline.engine.shards import Shard, link_files, order_of, shards_of, unlink_files
from pipeline.store.artifacts import Artifact, Store
from pipeline.store.locks import ArtifactLock
from stages.contracts import Part, Progress, StageResult
from stages.errors import DamagedFileError, MissingArtifactError


class ShardBuilder:
    """The shards of one artifact, as one process sees and builds them."""

    def __init__(
        self,
        job: Job,
        count: int,
        store: Store,
        progress: WarningProgress,
        *,
        units: Callable[[], int],
        is_over: Callable[[], bool],
    ) -> None:
        """Begin nothing yet.

        Args:
            job: The whole.
            count: Shards.
            store: Where to build.
            progress: Hears of everything.
            units: Tells how many images, or whatever the stage works through one by one, the whole has.
            is_over: Whether the whole is there, so that no shard is wanted any more.
        """
        self._job, self._store, self._progress, self._is_over = job, store, progress, is_over
        self._shards = shards_of(*job.place, count)
        self._board = Board(progress, units, count)
        self._published: dict[Shard, int] = {}
        """Units of the shards that were seen in the store."""
        self._locks: dict[Shard, ArtifactLock] = {}
        self.warnings: list[str] = []
        """What was said of damaged shards."""
        self.num_built = 0
        """Shards that this process has built."""

    def missing(self) -> list[Shard]:
        """The shards that are not published."""
        missing, order = [], self.order()
        for shard in self._shards:
            artifact = self._find(shard, order) if shard not in self._published else None
            if artifact is not None:
                self._note(shard, artifact)
            if shard not in self._published:
                missing.append(shard)
        return missing

    def order(self) -> str | None:
        """What tells the forced build that is under way from others, if one is."""
        return order_of(self._store, *self._job.place)

    def _find(self, shard: Shard, order: str | None, damage: list[str] | None = None) -> Artifact | None:
        """The published shard; one from before a forced build that is under way does not count."""
        artifact = self._store.lookup(*shard.place, damaged=None if damage is None else damage.append)
        return None if artifact is not None and order not in (None, artifact.run.get("order")) else artifact

    def _note(self, shard: Shard, artifact: Artifact) -> None:
        self._published[shard] = artifact.run.get("units", 0)
        self._board.count_published(self._published.values())

    def build_free(self) -> bool:
        """Build each missing shard that nobody holds; whether there was one."""
        is_any = False
        for shard in self.missing():
            with self._try_hold(shard) as is_held:
                if not is_held:
                    continue
                if self._is_over():
                    break
                self._build_shard(shard)
                is_any = True
        return is_any

    @contextmanager
    def _try_hold(self, shard: Shard) -> Iterator[bool]:
        lock = self.lock(shard)
        try:
            yield lock.try_acquire()
        finally:
            lock.release()

    def lock(self, shard: Shard) -> ArtifactLock:
        """The shard's lock, always the same object: where heartbeats tell, it knows how long its holder is silent."""
        if shard not in self._locks:
            self._locks[shard] = self._store.lock(*shard.place)
        return self._locks[shard]

    def _build_shard(self, shard: Shard) -> None:
        """Build a shard, unless another process did so since it was missing.  Needs its lock."""
        order, damage = self.order(), []
        artifact = self._find(shard, order, damage)
        if artifact is None:
            if damage:
                self._set_aside(shard, damage[0])
            artifact = self._make_shard(shard, order)
            self.num_built += 1
        self._note(shard, artifact)

    def _make_shard(self, shard: Shard, order: str | None) -> Artifact:
        if order is not None:
            self._store.remove(*shard.place)  # from before the order
        part = shard.part
        progress = ShardProgress(self._progress, self._board, part.index + 1)
        content = {**self._job.content, "whole": shard.whole, "part": [part.index, part.count]}
        return make_artifact(
            self._job,
            self._store,
            partial(self._call_part, progress, part, order is None),
            progress,
            place=shard.place,
            content=content,
            amend=lambda run: {**run, "units": progress.units, "order": order},
        )

    def _call_part(self, progress: Progress, part: Part, is_lent: bool, work: Path) -> StageResult:
        """Call the stage for one part; what unfinished work of the whole has already is lent to it meanwhile."""
        finished = self._store.work_path(*self._job.place)
        if is_lent:
            link_files(finished, work)
        result = self._job.call(work, progress, part)
        unlink_files(finished, work)
        return result

    def check_all(self) -> list[Artifact] | None:
        """The shards in order, every file read and found as written; None when there is one to build again."""
        found, order = [], self.order()
        for shard in self._shards:
            with self._try_hold(shard) as is_held:
                artifact = self._find(shard, order) if is_held else None
                problems = self._problems(shard, artifact) if artifact is not None else []
                if artifact is not None and not problems:
                    found.append(artifact)
                    continue
                self._published.pop(shard, None)
                if problems:
                    self._set_aside(shard, problems[0])
        return found if len(found) == len(self._shards) else None

    def _problems(self, shard: Shard, artifact: Artifact) -> list[str]:
        if artifact.content.get("whole") != shard.whole:
            return [f"{artifact.path} is a shard of another artifact"]
        try:
            self._store.require(*shard.place)  # brings the files here where the store is elsewhere
        except (DamagedFileError, MissingArtifactError) as error:
            return [error.message]
        return self._store.verify(*shard.place)

    def _set_aside(self, shard: Shard, damage: str) -> None:
        text = set_aside(self._store, shard.place, damage)
        self.warnings.append(text)
        self._progress.warn(text)
