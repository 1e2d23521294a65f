"""A copy of unfinished work in the object store, so that another machine goes on where this one died.

    <url>/<stage>/.work-<key>/…                 the files, each whole
    <url>/<stage>/.work-<key>/.mirror.json      number of the copy and its files, written last
    <root>/<stage>/.mirror-<key>.json           the number that this machine's work folder is level with, or ahead of

Numbers only grow, and only the holder of the key's lock copies, so the larger number is the work that went on.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.store.object_store import ObjectFolder, in_parallel
from stages.contracts import read_json, write_json
from stages.errors import DamagedFileError

MIRROR_EVERY_S = 60.0
"""Seconds between two copies: what a machine's death costs at most, beside what a stage has not written yet."""

_INDEX = ".mirror.json"
_Stamp = tuple[int, int]
"""Size in bytes and time of the last change in ns."""


class WorkMirror:
    """Copies what is new in a work folder, every minute while ``with`` lasts and once more when it ends in an error.

    A stage writes its files under a temporary name and renames them, so what has its own name is whole.  A copy that
    fails is tried again by the next one; losing the mirror is no reason to lose the work.
    """

    def __init__(self, objects: ObjectFolder, folder: str, work: Path, note: Path, check: Callable[[], None]) -> None:
        """Copy ``work`` to ``folder`` of ``objects``.

        Args:
            objects: The store.
            folder: Name of the copy's folder in it.
            work: The work folder.
            note: The local file that keeps the number.
            check: Raises when the key's lock is no longer this process's.
        """
        self._objects, self._folder, self._work, self._note, self._check = objects, folder, work, note, check
        self._sent: dict[str, _Stamp] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._copy_on, daemon=True, name="work-mirror")

    def __enter__(self) -> Self:
        """Begin to copy; the first copy comes after a minute."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; work that failed is copied once more, work that succeeded is published whole anyway."""
        self._stop.set()
        self._thread.join()
        if kind is not None:
            with contextlib.suppress(Exception):  # the stage's own error is the one to tell
                self.copy()

    def _copy_on(self) -> None:
        while not self._stop.wait(MIRROR_EVERY_S):
            with contextlib.suppress(Exception):
                self.copy()

    def copy(self) -> None:
        """Copy what changed since the last copy, the oldest first, and remove what is gone.

        Raises:
            EnvironmentFailure: the store failed, or another worker has the lock.
        """
        found = _snapshot(self._work)
        changed = [name for name, stamp in found.items() if self._sent.get(name) != stamp]
        gone = self._sent.keys() - found.keys()
        if not changed and not gone:
            return
        self._check()
        for name in sorted(changed, key=lambda name: found[name][1]):
            if self._stop.is_set() and threading.current_thread() is self._thread:
                return
            with contextlib.suppress(FileNotFoundError):  # replaced or removed since: the next copy sees to it
                self._objects.send(self._work / name, f"{self._folder}/{name}")
                if _stamp(self._work / name) == found[name]:
                    self._sent[name] = found[name]
        number = max(_number(self._note), _remote_index(self._objects, self._folder).get("number", 0)) + 1
        self._check()
        index = {"number": number, "files": sorted(self._sent.keys() - gone)}
        self._objects.write(f"{self._folder}/{_INDEX}", json.dumps(index).encode())
        write_json(self._note, {"number": number})
        for name in gone:
            self._objects.remove(f"{self._folder}/{name}")
            del self._sent[name]


def fetch_work(objects: ObjectFolder, folder: str, work: Path, note: Path) -> bool:
    """Bring the mirrored work here where it went on after what lies here; whether it did.

    Raises:
        EnvironmentFailure: the store failed.
    """
    index = _remote_index(objects, folder)
    number = index.get("number", 0)
    if number <= (_number(note) if _snapshot(work) else 0):
        return False
    part = work.with_name(f".fetch{work.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    def fetch(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # removed by a copy that was cut off before its index
            objects.fetch(f"{folder}/{name}", part / name)

    in_parallel(fetch, index["files"])
    shutil.rmtree(work, ignore_errors=True)
    part.rename(work)
    write_json(note, {"number": number})
    return True


def has_mirror(objects: ObjectFolder, folder: str) -> bool:
    """Whether there is mirrored work."""
    return bool(_remote_index(objects, folder))


def drop_mirror(objects: ObjectFolder, folder: str, note: Path) -> None:
    """Remove the copy, its index first."""
    objects.remove(f"{folder}/{_INDEX}")
    objects.remove_folder(folder)
    note.unlink(missing_ok=True)


def _remote_index(objects: ObjectFolder, folder: str) -> dict[str, Any]:
    """The index; empty where there is none that can be used."""
    try:
        index = json.loads(objects.read(f"{folder}/{_INDEX}") or b"{}")
        is_ours = isinstance(index["number"], int) and all(is_inside(name) for name in index["files"])
    except (ValueError, KeyError, TypeError):
        return {}
    return index if is_ours else {}


def is_inside(name: object) -> bool:
    """Whether ``name``, which another machine wrote, is a file's name that stays inside the folder it is put in."""
    return isinstance(name, str) and not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))


def _number(note: Path) -> int:
    try:
        return int(read_json(note)["number"])
    except (DamagedFileError, KeyError, TypeError, ValueError):
        return 0


def _stamp(file: Path) -> _Stamp:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _snapshot(work: Path) -> dict[str, _Stamp]:
    """The whole files under ``work``."""
    found: dict[str, _Stamp] = {}
    for path in work.rglob("*"):
        if path.name.startswith(".tmp-") or path.name.endswith(".part"):
            continue
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                found[path.relative_to(work).as_posix()] = _stamp(path)
    return found
