"""What the shards of an artifact are: parts of its work, each an artifact of its own until they are put together.

Shard 3 of 8 of ``make_masks/<key>`` is ``make_masks-shard/<first 12 digits of key>00030008`` (number and count in hex),
with a manifest and a lock of its own.  So all shards of an artifact are found by its key, into however many parts an
earlier run cut it.  Number 0 of 0 is the order for a forced build: while it stands, the published artifact is to be
built again, from shards that were begun since.
Reads and moves folders of the store; imports neither torch nor Prefect.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engine.stage_table import StageSpec
from pipeline.store.artifacts import MANIFEST, Artifact, Store
from stages.contracts import Part, write_atomic

SUFFIX = "-shard"
"""Behind a stage's name: where its shards are in the store."""

_WHOLE_DIGITS = 12
"""Digits of the whole's key in a shard's: 48 bits tell apart all the artifacts of a stage that a disk holds."""

_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Shard:
    """One part of the artifact ``<stage>/<whole>``."""

    stage: str
    """The whole's stage."""
    whole: str
    """The whole's key."""
    part: Part

    @property
    def place(self) -> tuple[str, str]:
        """Stage and key under which the store has it."""
        return self.stage + SUFFIX, f"{self.whole[:_WHOLE_DIGITS]}{self.part.index + 1:04x}{self.part.count:04x}"

    def __str__(self) -> str:
        """``shard 3 of 8``."""
        return f"shard {self.part.index + 1} of {self.part.count}"


def shard_count(spec: StageSpec, run: Any) -> int:  # noqa: ANN401 - the table's run type
    """Into how many shards a run cuts a stage: ``runtime.shards`` where the stage can be made in parts, else 1."""
    runtime = getattr(run, "runtime", None)
    return 1 if spec.shard_units is None or runtime is None or not spec.in_parts(run) else runtime.shards


def shards_of(stage: str, whole: str, count: int) -> tuple[Shard, ...]:
    """The ``count`` shards of an artifact, in order."""
    return tuple(Shard(stage, whole, Part(index, count)) for index in range(count))


def is_shard_of(place: tuple[str, str], stage: str, whole: str) -> bool:
    """Whether ``place``, a stage and a key, is a shard of the artifact ``<stage>/<whole>`` or the order for it."""
    return place[0] == stage + SUFFIX and place[1].startswith(whole[:_WHOLE_DIGITS])


def existing_shards(store: Store, stage: str, whole: str) -> list[Shard]:
    """The shards of an artifact that are published, damaged or begun, of whatever count, in order."""
    found = {key for where, key in store.folders() if is_shard_of((where, key), stage, whole)}
    for folder in (store.root / (stage + SUFFIX)).glob(f".work-{whole[:_WHOLE_DIGITS]}*/"):
        found.add(folder.name.removeprefix(".work-"))
    return [Shard(stage, whole, part) for part in map(_part_of, sorted(found)) if part is not None]


def _part_of(key: str) -> Part | None:
    """What a shard's key says; None for the order."""
    digits = re.fullmatch(r"([0-9a-f]{4})([0-9a-f]{4})", key[_WHOLE_DIGITS:])
    number, count = (int(text, 16) for text in digits.groups()) if digits else (0, 0)
    return Part(number - 1, count) if 1 <= number <= count else None


# ---------------------------------------------------------------------------------------------------------------------
# The order for a forced build
# ---------------------------------------------------------------------------------------------------------------------


def _order_place(stage: str, whole: str) -> tuple[str, str]:
    return stage + SUFFIX, whole[:_WHOLE_DIGITS] + "0" * 8


def place_order(store: Store, stage: str, whole: str, replaced: Artifact | None) -> None:
    """Let all who build shards know that nothing from before now counts.  Needs the lock of the whole.

    Args:
        store: The store.
        stage: The whole's stage.
        whole: The whole's key.
        replaced: The artifact that is there and is to be built again.
    """
    place = _order_place(stage, whole)
    with store.lock(*place):
        store.work_dir(*place, fresh=True)
        run = {"order": secrets.token_hex(8), "replaces": None if replaced is None else dict(replaced.run)}
        store.publish(*place, content={"whole": whole, "mask_supervision": []}, run=run)


def order_of(store: Store, stage: str, whole: str) -> str | None:
    """What tells the forced build that is under way from all others; None where none is.

    A shard of a forced build has it in its manifest.  Another machine may have older shards in its cache.
    """
    order = store.lookup(*_order_place(stage, whole))
    return None if order is None else order.run["order"]


def remove_order(store: Store, stage: str, whole: str) -> None:
    """The artifact is built again, or nobody is at it.  Needs the lock of the whole."""
    place = _order_place(stage, whole)
    if store.lookup(*place) is not None:
        with store.lock(*place):
            store.remove(*place)


def is_ordered(store: Store, artifact: Artifact) -> bool:
    """Whether a forced build is to replace this very ``artifact``, which some earlier build published."""
    order = store.lookup(*_order_place(artifact.stage, artifact.key))
    return order is not None and order.run.get("replaces") == artifact.run


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def link_files(source: Path, target: Path) -> None:
    """Let ``target`` have every finished file of ``source`` that it has not; a copy where links cannot be made."""
    for name, file in _finished_files(source):
        _link(file, target / name)


def _link(file: Path, copy: Path) -> None:
    if copy.exists():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, copy)
    except (FileNotFoundError, FileExistsError):
        return  # removed, or put there, by another process meanwhile
    except OSError:  # another file system, or one without hard links
        write_atomic(copy, file.read_bytes())


def unlink_files(source: Path, target: Path) -> None:
    """Undo ``link_files``: remove from ``target`` the files that are the same as in ``source``."""
    for name, file in _finished_files(source):
        if _is_same(file, target / name):
            (target / name).unlink()


def _is_same(file: Path, other: Path) -> bool:
    try:
        return file.samefile(other)
    except FileNotFoundError:
        return False


def _finished_files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Relative and full path of the files of an artifact or of unfinished work."""
    for parent, _, names in os.walk(folder):  # which bears that another process moves the folder away
        for file in (Path(parent, name) for name in names if not name.startswith(_TEMPORARY)):
            if file != folder / MANIFEST:
                yield file.relative_to(folder), file


# ---------------------------------------------------------------------------------------------------------------------
# Upkeep: all of it needs the lock of the whole
# ---------------------------------------------------------------------------------------------------------------------


def adopt_shards(store: Store, stage: str, whole: str, *, besides: int = 0) -> None:
    """Bring what earlier runs finished in shards into the work folder of the whole, and remove those shards.

    Args:
        store: The store.
        stage: The whole's stage.
        whole: The whole's key.
        besides: Leave alone the shards of this count.  Those that somebody is at are left alone too.
    """
    for shard in existing_shards(store, stage, whole):
        if shard.part.count == besides:
            continue
        lock = store.lock(*shard.place)
        if not lock.try_acquire():
            continue
        try:
            target = store.work_path(stage, whole)
            if store.lookup(*shard.place) is not None:
                link_files(store.require(*shard.place).path, target)
            link_files(store.work_path(*shard.place), target)
            store.remove(*shard.place)
        finally:
            lock.release()


def discard_shards(store: Store, stage: str, whole: str, waiting: Callable[[str], None]) -> None:
    """Remove all shards of an artifact, also those that others are at, once they are through.

    Args:
        store: The store.
        stage: The whole's stage.
        whole: The whole's key.
        waiting: Called with who is at a shard, and at which.
    """
    for shard in existing_shards(store, stage, whole):
        with store.lock(*shard.place, waiting=lambda holder, shard=shard: waiting(f"{holder} builds {shard}")):
            store.remove(*shard.place)


def clear_shards(store: Store, stage: str, whole: str) -> None:
    """Remove the shards of an artifact that is published, but for those that somebody is at, and its order."""
    for shard in existing_shards(store, stage, whole):
        lock = store.lock(*shard.place)
        if lock.try_acquire():
            try:
                store.remove(*shard.place)
            finally:
                lock.release()
    remove_order(store, stage, whole)
