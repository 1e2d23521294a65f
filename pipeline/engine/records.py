"""Which artifacts each run used, and which artifacts nobody needs any more.

Reads and writes ``<store>/runs/<name>-<run id>.json``; pruning removes folders of the store.
A run that used the same artifacts under the same name as an earlier one replaces its record.
A run holds a lock for as long as it lives, however it ends: what it uses is never pruned.  A run writes its record, and
pruning decides and takes away, under one more lock: a run that begins meanwhile is seen, or finds nothing to use.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.config.run_config import LAST, RunConfig, find_config, load_config
from pipeline.config.yaml_models import load_values
from pipeline.engine.plan import Plan
from pipeline.store.artifacts import Store, discard, open_store, survey
from pipeline.store.locks import LEASE_S, ArtifactLock
from stages.contracts import read_json, write_json
from stages.errors import ConfigError, DamagedFileError, EnvironmentFailure, InputError, WsssError

SHOWN_RUNS = 5
"""Runs that an error names."""

REPRODUCED = ".reproduced"
"""Folder in a store in which a run is built again and compared (``pipeline.engine.reproduce``)."""

MAX_RECORD_BYTES = 2**24
"""A larger file is no run record: a whole config takes a few thousand bytes."""


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
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(EnvironmentFailure):  # where it cannot be had, nothing can be pruned either
                lock.try_acquire()
                stack.enter_context(_records_lock(store))
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


def read_runs(store: Store, *, damaged: Callable[[str], None] | None = None) -> list[RunRecord]:
    """All run records, newest first; those that another process removes meanwhile are left out.

    Raises:
        DamagedFileError: a record does not read back, and there is no ``damaged`` to hear of it; nothing must be pruned
            then.
    """
    records, folder = [], store.root / "runs"
    if os.path.lexists(folder) and not folder.is_dir():
        raise DamagedFileError(
            f"{folder}: expected the folder of the run records, found something else; is a disk away?"
        )
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(_read_record(path))
        except DamagedFileError as error:
            if not os.path.lexists(path):
                continue
            if damaged is None:
                raise
            damaged(error.message)
    return sorted(records, key=lambda record: (record.started, record.run_id), reverse=True)


def find_run(store: Store, text: str) -> RunRecord:
    """The run that ``text`` means: ``last``, a name, or the beginning of one run's name or id (``demo-20261130-18``).

    A whole name comes before the beginning of others: ``demo`` is not ``demo_gain``.  Records of one name and config,
    such as of a run and of a stage that was rerun alone, are one run.

    Raises:
        InputError: no run, or several.
    """
    records = read_runs(store, damaged=lambda _: None)
    if not records:
        raise InputError(f"{store.location} has no runs; name the store of the run with --artifacts")
    found = [record for record in records if record.name == text]
    if text and not found:
        found = [record for record in records if record.path.stem.startswith(text) or record.run_id == text]
    if text == LAST:
        found = [record for record in records if (record.name, record.config) == (records[0].name, records[0].config)]
    if found and all((record.name, record.config) == (found[0].name, found[0].config) for record in found):
        return max(found, key=lambda record: len(record.keys))  # the newest of those that know of most stages
    shown = [f"{record.path.stem} ({record.state})" for record in found or records][:SHOWN_RUNS]
    if found:
        raise InputError(f"'{text}' means {len(found)} runs; give more of the name. The newest:", shown)
    raise InputError(f"no run '{text}' in {store.location}; give the beginning of a name, or last. The newest:", shown)


def load_named(text: str, overrides: Sequence[str], artifacts: str) -> RunConfig:
    """The config that ``text`` means: a YAML file, the name of a shipped one, or a run as of ``find_run``.

    Args:
        text: As on the command line.
        overrides: ``a.b=value``, on top of what the file or the run has.
        artifacts: The store that holds the run.

    Raises:
        ConfigError: there is no such config or run, it is not valid, or ``last`` is a file here too.
        InputError: several runs begin so.
    """
    if text == LAST and Path(text).is_file():
        raise ConfigError(f"'{LAST}' means the newest run, and a file here has this name; write ./{LAST} for the file")
    try:
        path = find_config(text)
    except ConfigError as error:
        store = open_store(artifacts)
        if not any((store.root / "runs").glob("*.json")):
            raise
        try:
            record = find_run(store, text)
        except InputError as other:
            if f"'{text}' means" in other.message:
                raise
            raise ConfigError(f"{error.message}; and {other.message}", other.problems) from None
        return load_values(RunConfig, record.config, overrides, f"the config of {record.path.stem}")
    return load_config(path, overrides)


def _read_record(path: Path) -> RunRecord:
    try:
        found = path.stat()
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror}); remove it") from error
    is_small_file = stat.S_ISREG(found.st_mode) and found.st_size <= MAX_RECORD_BYTES
    fields = read_json(path) if is_small_file else None
    names = ("run", "name", "started", "state", "keys", "config")
    *words, keys, config = (fields.get(name) if isinstance(fields, dict) else None for name in names)
    if not isinstance(keys, dict) or not isinstance(config, dict):
        raise DamagedFileError(f"{path} is no run record; remove it")
    if not all(isinstance(text, str) for text in [*words, *keys.values()]):
        raise DamagedFileError(f"{path} is no run record; remove it")
    run_id, name, started, state = map(str, words)
    try:
        datetime.fromisoformat(started)
    except ValueError as error:
        raise DamagedFileError(f"{path} is no run record: it started at '{started[:40]}'; remove it") from error
    return RunRecord(path, run_id, name, started, state, keys, config)


def _records_lock(store: Store) -> ArtifactLock:
    """Held while a run's record is written, and while is decided what no run needs."""
    return ArtifactLock(store.root / ".locks" / "runs")


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
    if dry_run or not store.root.is_dir():
        return [Removal(path, reason, _size(path)) for path, reason in _unneeded(store, keep)]
    with _records_lock(store):
        taken = [(path, reason, _take_away(store, path)) for path, reason in _unneeded(store, keep)]
    removals = []
    for path, reason, doomed in taken:
        if doomed is not None:
            removals.append(Removal(path, reason, _size(doomed)))
            discard(doomed)
    return removals


def _unneeded(store: Store, keep: int | None) -> list[tuple[Path, str]]:
    """What no kept run needs, each with the reason."""
    records = read_runs(store)
    kept = [record for rank, record in enumerate(records) if keep is None or rank < keep or record.is_alive()]
    needed = {(stage, key) for record in kept for stage, key in record.keys.items()}
    found = [(record.path, "an older run") for record in records if record not in kept]
    for stage, key, folder in _candidates(store):
        if folder.name.startswith((".damaged-", ".replaced-")):
            found.append((folder, "set aside"))
        elif (stage, key) not in needed:
            found.append((folder, "no kept run needs it"))
    if (store.root / REPRODUCED).is_dir():
        found.append((store.root / REPRODUCED, "a reproduction that was stopped"))
    return found


def _candidates(store: Store) -> Iterator[tuple[str, str, Path]]:
    """(stage, key, folder) of everything in the store that belongs to a key."""
    for stage, key in store.folders():
        yield stage, key, store.path(stage, key)
    for pattern in (".work-*", ".damaged-*", ".replaced-*"):
        for folder in sorted(store.root.glob(f"[!.]*/{pattern}/")):
            yield folder.parent.name, _key_of(folder), folder


def _size(path: Path) -> int:
    """Bytes that removing ``path`` sets free, as far as it is still there; a link frees nothing."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = path.lstat()
        return sum(survey(path)[0].values()) if stat.S_ISDIR(found.st_mode) else found.st_size
    return 0


def reproduction_lock(store: Store) -> ArtifactLock:
    """Held while a run is reproduced under ``REPRODUCED``."""
    return ArtifactLock(store.root / ".locks" / "reproduced")


def _take_away(store: Store, path: Path) -> Path | None:
    """Give a record or a folder a name under which nobody finds it; None when it is gone, or somebody builds that key.

    Out of sight first: a removal that is interrupted must not leave half an artifact under its name.
    """
    is_record, is_whole = path.parent == store.root / "runs", path == store.root / REPRODUCED
    key = path.stem if is_record or is_whole else _key_of(path)
    doomed = path.with_name(f".replaced-{key}-{secrets.token_hex(4)}")
    lock = reproduction_lock(store) if is_whole else store.lock(path.parent.name, key)
    if not is_record and not lock.try_acquire(patience_s=LEASE_S + 2.0):
        return None
    try:
        return path.rename(doomed)
    except FileNotFoundError:
        return None
    finally:
        lock.release()


def _key_of(folder: Path) -> str:
    """The key in ``<key>``, ``.work-<key>`` or ``.damaged-<key>-0``."""
    return folder.name.split("-")[1] if folder.name.startswith(".") else folder.name
