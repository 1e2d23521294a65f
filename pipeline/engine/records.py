"""Which artifacts each run used, and which artifacts nobody needs any more.

Reads and writes ``<store>/runs/<name>-<run id>.json``; pruning removes folders of the store.
A run that used the same artifacts under the same name as an earlier one replaces its record.
A run holds a lock for as long as it lives, however it ends: what it uses is never pruned.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.engine.plan import Plan
from pipeline.store.artifacts import Store
from pipeline.store.locks import LEASE_S, ArtifactLock
from stages.contracts import read_json, write_json
from stages.errors import DamagedFileError, EnvironmentFailure, InputError, WsssError

SHOWN_RUNS = 5
"""Runs that an error names."""


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    path: Path
    run_id: str
    name: str
    started: str
    """UTC, ISO with milliseconds: the order of runs."""
    state: str
    """running, done, failed or interrupted; running too when it was killed."""
    keys: Mapping[str, str]
    """Key of each stage's artifact."""
    config: Mapping[str, Any]

    @staticmethod
    @contextmanager
    def open(store: Store, plan: Plan) -> Iterator[RunRecord]:
        """Write the record of a run that begins, and how it went when it ends.

        Raises:
            EnvironmentFailure: the store cannot be written.
        """
        run_id = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
        name = str(getattr(plan.run, "name", "run"))
        record = RunRecord(
            path=store.root / "runs" / f"{name}-{run_id}.json",
            run_id=run_id,
            name=name,
            started=datetime.now(UTC).isoformat(timespec="milliseconds"),
            state="running",
            keys=dict(plan.keys),
            config=plan.run.model_dump(mode="json"),
        )
        lock = ArtifactLock(record._lock_path)
        with contextlib.suppress(EnvironmentFailure):  # where it cannot be had, nothing can be pruned either
            lock.try_acquire()
        try:
            record._write("running")
        except OSError as error:
            raise EnvironmentFailure(
                f"{store.root} cannot be written ({error.strerror}); choose another folder with --artifacts DIR"
            ) from error
        store.share(record.path)
        state = "interrupted"
        try:
            yield record
            state = "done"
        except WsssError:
            state = "failed"
            raise
        finally:
            with contextlib.suppress(OSError, EnvironmentFailure):  # a full disk must not hide how the run ended
                record._write(state)
                store.share(record.path)
            with contextlib.suppress(OSError):
                record._lock_path.unlink(missing_ok=True)
            lock.release()
        record._replace_older(store)

    def is_alive(self) -> bool:
        """Whether the run's process is still at work.

        Raises:
            EnvironmentFailure: the store cannot be read or written.
        """
        if self.state != "running" or not self._lock_path.exists():
            return False
        lock = ArtifactLock(self._lock_path)
        is_free = lock.try_acquire(patience_s=LEASE_S + 2.0)
        lock.release()
        return not is_free

    @property
    def _lock_path(self) -> Path:
        return self.path.parent.parent / ".locks" / f"run-{self.run_id}"

    def _replace_older(self, store: Store) -> None:
        """Remove the records of earlier runs that used the same artifacts."""
        with contextlib.suppress(DamagedFileError, EnvironmentFailure):  # untidy, but this run is done all the same
            for older in read_runs(store):
                is_same = older.path != self.path and older.name == self.name and older.keys == self.keys
                if is_same and not older.is_alive():
                    older.path.unlink(missing_ok=True)
                    store.share(older.path)

    def _write(self, state: str) -> None:
        fields = {"run": self.run_id, "name": self.name, "started": self.started, "state": state}
        write_json(self.path, {**fields, "keys": dict(self.keys), "config": dict(self.config)})


def read_runs(store: Store) -> list[RunRecord]:
    """All run records, newest first.

    Raises:
        DamagedFileError: a record does not read back; nothing must be pruned then.
    """
    records = []
    for path in (store.root / "runs").glob("*.json"):
        try:
            found = read_json(path)
            fields = [found[name] for name in ("run", "name", "started", "state", "keys", "config")]
        except (KeyError, TypeError) as error:
            raise DamagedFileError(f"{path} is no run record ({error}); remove it") from error
        records.append(RunRecord(path, *fields))
    return sorted(records, key=lambda record: (record.started, record.run_id), reverse=True)


def find_run(store: Store, text: str) -> RunRecord:
    """The run that ``text`` means: ``last``, or the beginning of one run's name (``demo``, ``demo-20261130-1811``).

    The run's id alone, ``20261130-181148-26df31``, will do too.

    Raises:
        InputError: no run, or several.
        DamagedFileError: a record does not read back.
    """
    records = read_runs(store)
    if not records:
        raise InputError(f"{store.location} has no runs; name the store of the run with --artifacts")
    if text == "last":
        return records[0]
    found = [record for record in records if text and (record.path.stem.startswith(text) or record.run_id == text)]
    if len(found) == 1:
        return found[0]
    shown = [f"{record.path.stem} ({record.state})" for record in found or records][:SHOWN_RUNS]
    if found:
        raise InputError(f"'{text}' means {len(found)} runs; give more of the name. The newest:", shown)
    raise InputError(f"no run '{text}' in {store.location}; give the beginning of a name, or last. The newest:", shown)


@dataclass(frozen=True)
class Removal:
    """One thing that pruning removes."""

    path: Path
    reason: str
    size_bytes: int


def prune(store: Store, *, keep: int | None = None, dry_run: bool = True) -> list[Removal]:
    """Remove what no kept run needs: artifacts, unfinished work, what was set aside.

    A run needs every artifact in its record, finished or not.  A run that is at work is always kept, and what another
    process is building is left alone.

    Args:
        store: The store.
        keep: Number of newest runs to keep, and those at work; None keeps all.
        dry_run: Only say what would be removed.

    Returns:
        What was, or would be, removed.

    Raises:
        DamagedFileError: a run record does not read back; nothing is removed then.
        EnvironmentFailure: the store cannot be read or written; the same.
    """
    if keep is not None and keep < 0:
        raise ValueError(f"keep must be at least 0 runs, got {keep}")
    records = read_runs(store)
    kept = [record for rank, record in enumerate(records) if keep is None or rank < keep or record.is_alive()]
    needed = {(stage, key) for record in kept for stage, key in record.keys.items()}
    removals = [
        Removal(record.path, "an older run", record.path.stat().st_size) for record in records if record not in kept
    ]
    for stage, key, folder in _candidates(store):
        if folder.name.startswith((".damaged-", ".replaced-")):
            removals.append(Removal(folder, "set aside", _size(folder)))
        elif (stage, key) not in needed:
            removals.append(Removal(folder, "no kept run needs it", _size(folder)))
    if dry_run:
        return removals
    return [removal for removal in removals if _remove(store, removal.path)]


def _candidates(store: Store) -> Iterator[tuple[str, str, Path]]:
    """(stage, key, folder) of everything in the store that belongs to a key."""
    for stage, key in store.folders():
        yield stage, key, store.path(stage, key)
    for pattern in (".work-*", ".damaged-*", ".replaced-*"):
        for folder in sorted(store.root.glob(f"[!.]*/{pattern}/")):
            yield folder.parent.name, _key_of(folder), folder


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _remove(store: Store, path: Path) -> bool:
    """Remove a record or a folder; False when somebody is building that key."""
    if path.is_file():
        path.unlink(missing_ok=True)
        return True
    stage, key = path.parent.name, _key_of(path)
    lock = store.lock(stage, key)
    if not lock.try_acquire(patience_s=LEASE_S + 2.0):
        return False
    try:
        # out of sight first: a removal that is interrupted must not leave half an artifact under its name
        doomed = path.with_name(f".replaced-{key}-{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    finally:
        lock.release()
    return True


def _key_of(folder: Path) -> str:
    """The key in ``<key>``, ``.work-<key>`` or ``.damaged-<key>-0``."""
    return folder.name.split("-")[1] if folder.name.startswith(".") else folder.name
