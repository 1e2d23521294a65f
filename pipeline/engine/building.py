"""Build one artifact: call the stage in its work folder, in parts if there are several, and publish what it wrote.

A part is a share of a stage's images.  Any number of processes may work in one work folder at once: files are written
atomically, what is there is skipped, and a lock beside the store's keeps two from the same part.  Whoever holds the
stage's lock takes every part that nobody holds, waits for the others, calls the stage once more, which finds all files
and writes what needs the whole set, and publishes.  A helper takes parts and waits for nobody.
What lies in a work folder that is continued counts only where its journal has it (``stages.contracts.journal``).
Reads and writes the store; imports neither torch nor Prefect.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.store.artifacts import Artifact, Store
from pipeline.store.locks import ArtifactLock
from pipeline.store.provenance import describe_machine
from stages.contracts import Part, Progress, StageResult, open_journal, read_json, write_json
from stages.errors import ConfigError, DamagedFileError

POLL_S = 0.5
"""Seconds between two looks at a part that another process is at."""


class KeepingProgress(Progress, Protocol):
    """A Progress that keeps its warnings for the manifest."""

    warnings: list[str]


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
    num_parts: int = 1
    num_units: Callable[[], int] = lambda: 0
    """How many images, or whatever the stage goes through one by one, all parts have; asked only with several parts."""

    @property
    def place(self) -> tuple[str, str]:
        """Stage and key."""
        return self.stage, self.key

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts in order."""
        return tuple(Part(index, self.num_parts) for index in range(self.num_parts))


class Built(NamedTuple):
    """What became of a job: built, resumed, or cached when another process had built it meanwhile."""

    artifact: Artifact
    state: str


def build(job: Job, store: Store, progress: KeepingProgress, *, force: bool = False) -> Built:
    """Build the artifact under its lock, or find that another process has built it meanwhile.

    With ``force`` it is built again from the beginning.  The warnings of ``progress`` go into the manifest.

    Raises:
        EnvironmentFailure: the lock was taken over by another process meanwhile.
    """

    def waiting(holder: str) -> None:
        progress.info(f"waiting: {holder} builds {job.stage} {job.key}")

    if job.num_parts > 1 and _is_held(store.lock(*job.place)):
        help_build(job, store, progress)  # another run is at it: share its work before waiting for it
    with store.lock(*job.place, waiting=waiting), ExitStack() as held:
        damage: list[str] = []
        artifact = store.lookup(*job.place, damaged=damage.append, fresh=True)
        if artifact is not None and not force:
            return Built(artifact, "cached")
        _closing(job, store).unlink(missing_ok=True)  # of a process that died
        if damage:
            aside = store.set_aside(*job.place)
            progress.warn(f"damaged artifact: {damage[0]}; set aside as {aside}, building it again")
        started, begun = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        if force:
            with _without_helpers(job, store, progress):
                store.work_dir(*job.place, fresh=True)
        work, is_resumed = store.work_dir(*job.place)
        if strangers := store.keep_own_work(*job.place):
            *names, aside = strangers
            progress.warn(
                f"{len(names):,} files in the unfinished work are not as a build of {job.stage} wrote them "
                f"({', '.join(names[:2])}{', …' if len(names) > 2 else ''}): set aside in {aside}, made again"
            )
            is_resumed = store.has_work(*job.place)
        if is_resumed:
            progress.info(f"continuing the unfinished work in {work}")
        with store.mirror(*job.place):
            if job.num_parts > 1:
                _Parts(job, store, work, progress, is_helper=False).build_all()
                held.enter_context(_without_helpers(job, store, progress))
                texts = _warnings_of_parts(work)  # also of those that others built, in the order of the parts
                progress.warnings[:] = [*(text for text in progress.warnings if text not in texts), *texts]
            result = job.call(work, progress, None)
        run = {
            "started": begun,
            "seconds": round(time.monotonic() - started, 3),
            "resumed": is_resumed,
            "runtime": job.runtime,
            "upstream": dict(job.upstream),
            "metrics": to_plain(result.metrics),
            "warnings": list(dict.fromkeys(progress.warnings)),
            **({"parts": job.num_parts} if job.num_parts > 1 else {}),
            **describe_machine((job.runtime or {}).get("device")),
        }
        content = {**job.content, "mask_supervision": sorted(result.mask_supervision)}
        artifact = store.publish(*job.place, content=content, run=run)
    return Built(artifact, "resumed" if is_resumed else "built")


def help_build(
    job: Job, store: Store, progress: KeepingProgress, part: Part | None = None, *, follows: bool = False
) -> int:
    """Build parts that nobody holds, wait for nobody, publish nothing; how many parts were built.

    Args:
        job: What others build, or will.
        store: Where they build it.
        progress: Hears of everything.
        part: Only this part, of however many; None goes through all parts of the job.
        follows: Wait for whoever holds the stage's lock to begin, and then until all parts are there: for a process
            that is ended with that one.
    """
    if part is not None:
        job = replace(job, num_parts=part.count)
    work = store.work_path(*job.place)
    while follows and not (work.exists() and _is_held(store.lock(*job.place))):
        time.sleep(POLL_S)
    if not _is_wanted(job, store):
        return 0
    if store.is_mirrored and not work.exists():
        return 0  # whoever holds the stage's lock brings what the mirror has of the work
    try:
        # from the last to the first: whoever holds the stage's lock comes from the other end
        parts = _Parts(job, store, work, progress, is_helper=True)
        num_built = parts.build_free([part] if part else job.parts[::-1])
        while follows and work.exists() and parts.missing():
            time.sleep(POLL_S)
            num_built += parts.build_free(job.parts[::-1])
    except OSError:
        if store.lookup(*job.place, fresh=True) is None or work.exists():
            raise
        return 0  # another process has published, and the work folder is the artifact now
    return num_built


def parse_part(text: str) -> Part | None:
    """``3/8`` as a Part; None for ``any``.

    Raises:
        ConfigError: it is neither, or there is no such part.
    """
    if text == "any":
        return None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    number, count = (int(digits) for digits in found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise ConfigError(f"expected a part such as 3/8 (1/8 … 8/8) or any, found '{text}'; parts are counted from 1")
    return Part(number - 1, count)


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


class _Parts:
    """The parts of one artifact, as one process sees and builds them."""

    def __init__(self, job: Job, store: Store, work: Path, progress: KeepingProgress, *, is_helper: bool) -> None:
        self._job, self._store, self._work, self._progress = job, store, work, progress
        self._is_helper = is_helper
        self._total = job.num_units()

    def build_all(self) -> None:
        """Return when every part is there, whoever built it; take over those of a process that died."""
        is_told = False
        while missing := self.missing():
            if self.build_free(missing):
                is_told = False
                continue
            still = next((part for part in missing if not _mark(self._work, part).exists()), None)
            if still is not None and not is_told:
                where = f"part {still.index + 1} of {still.count}"
                self._progress.info(f"waiting: {self._lock(still).holder()} builds {where}")
                is_told = True
            time.sleep(POLL_S)

    def missing(self) -> list[Part]:
        """The parts that are not finished."""
        return [part for part in self._job.parts if not _mark(self._work, part).exists()]

    def build_free(self, parts: Sequence[Part]) -> int:
        """Build each of ``parts`` that is missing and that nobody holds; how many were."""
        num_built = 0
        for part in parts:
            lock = self._lock(part)
            if _mark(self._work, part).exists() or not lock.try_acquire():
                continue
            try:
                if self._is_helper and not _is_wanted(self._job, self._store):
                    break
                open_journal(self._work)  # under the part's lock: nobody publishes meanwhile
                if not _mark(self._work, part).exists():
                    self._build(part)
                    num_built += 1
            finally:
                lock.release()
        return num_built

    def _lock(self, part: Part) -> ArtifactLock:
        return self._store.lock(*self._job.place, part=f"{part.index + 1}of{part.count}")

    def _build(self, part: Part) -> None:
        finished = [_read_mark(path)["units"] for path in self._work.glob(_MARKS.format(count=part.count))]
        progress = _PartProgress(self._progress, part, sum(finished), self._total)
        self._job.call(self._work, progress, part)
        write_json(_mark(self._work, part), {"units": progress.units, "warnings": progress.warnings})


class _PartProgress:
    """The Progress of the stage while it makes one part: one bar over all parts, whoever builds which."""

    def __init__(self, inner: Progress, part: Part, finished: int, total: int) -> None:
        self.warnings: list[str] = []
        self.units = 0
        self._inner, self._part, self._finished, self._total = inner, part, finished, total

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        self.units = total
        whole = max(self._total, self._finished + total)
        values = {**values, "part": self._part.index + 1}
        self._inner.step(f"{task} in {self._part.count} parts", self._finished + done, whole, unit=unit, **values)

    def info(self, text: str) -> None:
        self._inner.info(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self._inner.warn(text)


_MARKS = ".tmp-part-*of{count}.json"
"""Files that say which parts are finished; temporary, so they are not published."""


def _mark(work: Path, part: Part) -> Path:
    return work / _MARKS.format(count=part.count).replace("*", str(part.index + 1))


def _read_mark(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        return {"units": int(found["units"]), "warnings": [str(text) for text in found["warnings"]]}
    except (DamagedFileError, KeyError, TypeError, ValueError):
        return {"units": 0, "warnings": []}  # the stage finds what is there, whatever the mark says


def _warnings_of_parts(work: Path) -> list[str]:
    marks = sorted(work.glob(_MARKS.format(count="*")), key=lambda path: int(re.findall(r"\d+", path.name)[0]))
    return [text for mark in marks for text in _read_mark(mark)["warnings"]]


def _is_wanted(job: Job, store: Store) -> bool:
    """Whether a part that a helper builds now can still enter the artifact."""
    stage = store.lock(*job.place)
    if stage.try_acquire():  # nobody is at it yet, or whoever was has died
        try:
            _closing(job, store).unlink(missing_ok=True)
            return store.lookup(*job.place, fresh=True) is None
        finally:
            stage.release()
    if _closing(job, store).exists():
        return False
    is_rebuilt = store.work_path(*job.place).exists()
    return is_rebuilt or store.lookup(*job.place, fresh=True) is None


def _is_held(lock: ArtifactLock) -> bool:
    is_free = lock.try_acquire()
    lock.release()
    return not is_free


def _closing(job: Job, store: Store) -> Path:
    """A file that stands while no part may be begun."""
    return store.root / ".locks" / f"{job.stage}-{job.key}.closing"


@contextmanager
def _without_helpers(job: Job, store: Store, progress: Progress) -> Iterator[None]:
    """Wait for all who are at a part, of whatever count, and let nobody begin one within.  Needs the stage's lock.

    A helper takes its lock before it looks for the file, so it either has a lock that is waited for here or sees the
    file.
    """
    closing = _closing(job, store)
    closing.touch()
    locks = []
    try:
        for path in sorted(closing.parent.glob(f"{job.stage}-{job.key}.*of*")):
            found = re.fullmatch(r"(\d+of\d+)", path.name.removeprefix(f"{job.stage}-{job.key}."))
            if found is None:
                continue

            def waiting(holder: str, part: str = found[1]) -> None:
                progress.info(f"waiting: {holder} builds part {part.replace('of', ' of ')}")

            lock = store.lock(*job.place, part=found[1], waiting=waiting)
            lock.__enter__()
            locks.append(lock)
        yield
    finally:
        for lock in locks:
            lock.release()
        closing.unlink(missing_ok=True)


def to_plain(value: Any) -> Any:  # noqa: ANN401 - JSON is any
    """``value`` as strict JSON: numpy scalars become numbers, nan and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
