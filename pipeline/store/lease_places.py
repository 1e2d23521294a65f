"""Where leases lie: a folder of a file system or of an object store, with a file or object for each generation."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Protocol

from pipeline.store.object_store import ObjectFolder
from stages.errors import EnvironmentFailure

_GONE = {errno.ENOENT, errno.ESTALE}

_proven: set[str] = set()
"""URLs whose store refused a second create before this process's eyes."""


class LeasePlace(Protocol):
    """Numbered objects, one per generation of one lock; what is listed is as new as what was last written."""

    poll_s: float
    """Seconds between two looks of one who waits."""

    def __str__(self) -> str:
        """Where it is, for messages."""
        ...

    def generations(self) -> list[int]:
        """The numbers that are there, in any order."""
        ...

    def create(self, generation: int, data: bytes) -> bool:
        """Make one that was not there; False when another was first."""
        ...

    def read(self, generation: int) -> bytes | None:
        """What is in one; None when it is not there."""
        ...

    def replace(self, generation: int, data: bytes) -> bool:
        """Write one anew if it is there and the newest; False when it is not."""
        ...

    def remove(self, generation: int) -> None:
        """Remove one; harmless when it is not there."""
        ...


class LeaseFolder:
    """Leases in a folder, also on a mount that several machines share and that has no flock."""

    poll_s = 0.2

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, which is made with the first lease."""
        self._folder = folder

    def __str__(self) -> str:
        """The folder."""
        return str(self._folder)

    def generations(self) -> list[int]:
        """The numbers that are there."""
        try:
            return [int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()]
        except FileNotFoundError:
            return []

    def create(self, generation: int, data: bytes) -> bool:
        """Make one with O_EXCL, which NFS keeps too."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self._path(generation), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        self._write(descriptor, data)
        return True

    def read(self, generation: int) -> bytes | None:
        """What is in one."""
        try:
            return self._path(generation).read_bytes()
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise

    def replace(self, generation: int, data: bytes) -> bool:
        """Write in place: a file that somebody removed must not come back, as it would with a rename."""
        if max(self.generations(), default=0) != generation:
            return False
        try:
            descriptor = os.open(self._path(generation), os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        self._write(descriptor, data)
        return True

    def remove(self, generation: int) -> None:
        """Remove one."""
        with contextlib.suppress(FileNotFoundError):
            self._path(generation).unlink()

    def _path(self, generation: int) -> Path:
        return self._folder / str(generation)

    @staticmethod
    def _write(descriptor: int, data: bytes) -> None:
        # a reader that sees a part of it sees something that changed, which is all it looks for
        try:
            os.pwrite(descriptor, data, 0)
            os.ftruncate(descriptor, len(data))
        finally:
            os.close(descriptor)  # on NFS this is what sends it to the server


class LeaseObjects:
    """Leases as objects; one who waits looks less often, since every look is a paid request."""

    poll_s = 0.5

    def __init__(self, objects: ObjectFolder, folder: str) -> None:
        """Use the objects under ``folder``."""
        self._objects, self._folder = objects, folder

    def __str__(self) -> str:
        """The URL."""
        return f"{self._objects}/{self._folder}"

    def generations(self) -> list[int]:
        """The numbers that are there."""
        return [int(name) for name in self._objects.children(self._folder) if name.isdecimal()]

    def create(self, generation: int, data: bytes) -> bool:
        """Make one, and make sure that the store really refuses a second one.

        Raises:
            EnvironmentFailure: it does not, so that two workers could hold one lock.
        """
        if not self._objects.create(self._name(generation), data):
            return False
        if self._objects.url in _proven:
            return True
        if self._objects.create(self._name(generation), data + b" "):
            self._objects.remove(self._name(generation))
            raise EnvironmentFailure(
                f"{self}: the store ignored a conditional create (If-None-Match), so workers could not exclude each "
                "other; use a store that honours it, or a shared folder"
            )
        _proven.add(self._objects.url)
        return True

    def read(self, generation: int) -> bytes | None:
        """What is in one."""
        return self._objects.read(self._name(generation))

    def replace(self, generation: int, data: bytes) -> bool:
        """Write one anew if it is the newest.

        A newer one that appears between the look and the write decides all the same: the newest always does.
        """
        if max(self.generations(), default=0) != generation:
            return False
        self._objects.write(self._name(generation), data)
        return True

    def remove(self, generation: int) -> None:
        """Remove one."""
        self._objects.remove(self._name(generation))

    def _name(self, generation: int) -> str:
        return f"{self._folder}/{generation}"
