"""What a build has written: the digest of every file, so that nothing else is taken for its work.

A folder with ``.wsss-journal/`` in it is journalled: ``write_atomic`` anywhere below it first notes name and sha256.  A
build that was stopped goes on with what the journal vouches for, and with nothing else that lies there.
Writes ``.wsss-journal/<process>``, a file for each process, since appending to one file from several machines is safe
on no network mount: lines of sha256 and name as JSON.  A torn line vouches for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

JOURNAL = ".wsss-journal"

_TOKEN = secrets.token_hex(6)
"""Tells processes of equal number on several machines apart; a forked process has another number."""


def open_journal(folder: Path) -> None:
    """Have ``folder``, and note from now on what is written below it; what lies there is not vouched for."""
    (folder / JOURNAL).mkdir(parents=True, exist_ok=True)


def note_files(files: Mapping[Path, Iterable[bytes | memoryview]]) -> None:
    """Vouch for files that are about to appear with these bytes, where a folder above all of them is journalled.

    Before they appear, so that no file of the build's own is ever without its line.  Not synced: what is lost with the
    power costs time, no more.
    """
    folder = _journalled_folder(_absolute(next(iter(files))))
    if folder is None:
        return
    lines = ""
    for path, parts in files.items():
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        # a line of its own also behind one that a full disk cut off
        lines += f"\n{digest.hexdigest()} {json.dumps(_absolute(path).relative_to(folder).as_posix())}\n"
    descriptor = os.open(folder / JOURNAL / f"{_TOKEN}-{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, lines.encode())
    finally:
        os.close(descriptor)


def is_journalled(path: Path) -> bool:
    """Whether what is written at ``path`` is noted, and what lies there is a build's own."""
    return _journalled_folder(_absolute(path)) is not None


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would leave a folder that is reached by a link


def _journalled_folder(path: Path) -> Path | None:
    return next((parent for parent in path.parents if (parent / JOURNAL).is_dir()), None)


def read_journal(folder: Path) -> set[tuple[str, str]] | None:
    """Name, relative to ``folder``, and sha256 of all that was written below it; None where it is not journalled.

    A file that was replaced is there with each of its contents: all of them are the build's own.
    """
    if not (folder / JOURNAL).is_dir():
        return None
    found = set[tuple[str, str]]()
    for path in (folder / JOURNAL).iterdir():
        for line in path.read_bytes().splitlines():
            digest, _, name = line.partition(b" ")
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                found.add((json.loads(name), digest.decode()))
    return found
