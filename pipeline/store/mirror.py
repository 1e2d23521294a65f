"""A store's mirror in an object store (s3, gs, …), through fsspec; no locks, since equal keys have equal bytes.

    <url>/<stage>/<key>/…                    an artifact: its files, and manifest.json, which is written last
    <url>/<stage>/.work-<key>/index.json     the last copy of unfinished work: its id, its folder, its files
    <url>/<stage>/.work-<key>/<copier>/…     those files; each process that copies has a folder of its own
    <url>/runs/<name>-<run>.json             which artifacts a run used

A plain copy of the bucket is a local store.  Needs the driver of the URL's protocol (``pip install
'wsss-pipeline[s3]'``), imported at the first access.  Endpoint and credentials come from the driver's own variables and
files; nothing here reads, keeps or prints them.  Listings are never cached: other machines write too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from stages.contracts import read_json, write_json
from stages.errors import DamagedFileError, EnvironmentFailure, InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_S3 = "'wsss-pipeline[s3]'"
DRIVERS = {"s3": _S3, "s3a": _S3, "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
"""Protocol → what pip installs for it."""

MIRROR_EVERY_S = 180.0
"""Seconds between two copies of unfinished work: what a machine's death costs, beside what is not written."""

MANIFEST = "manifest.json"
_NUM_TRANSFERS = 8
_NUM_READERS = 4
"""Threads that digest files: hashlib lets the others run, and a disk is quicker with several readers."""
_SMALL_BYTES = 2**20
"""Smaller files are read at once: twice as quick as the buffer of ``file_digest``."""
_INDEX = "index.json"


class Mirror:
    """The objects under one URL, by names relative to it; every failure is one line that says what to do."""

    def __init__(self, url: str) -> None:
        """Name the place; nothing is imported and nothing asked yet.

        Raises:
            InputError: a protocol that is not known, or credentials in the URL.
        """
        protocol, _, rest = url.partition("://")
        if protocol not in DRIVERS:
            known = ", ".join(f"{name}://" for name in DRIVERS)
            raise InputError(
                f"{protocol}:// cannot hold artifacts; use one of {known}, or mount it and give the folder"
            )
        name = rest.partition("/")[0].rpartition("@")[0]
        if "?" in rest or ":" in name or (name and protocol not in ("abfs", "az")):
            raise InputError(f"{protocol}://…: credentials do not belong in a URL; set the driver's variables instead")
        if not rest.strip("/"):
            raise InputError(f"{protocol}://: the bucket is missing; write {protocol}://BUCKET/FOLDER")
        self.url = f"{protocol}://{rest.strip('/')}"

    @cached_property
    def _access(self) -> tuple[AbstractFileSystem, str]:
        from fsspec.core import url_to_fs

        return url_to_fs(self.url, use_listings_cache=False)

    @contextlib.contextmanager
    def _objects(self, name: str, *, missing_ok: bool = False) -> Iterator[tuple[Any, str]]:
        """The file system and the path of ``name``; ``missing_ok`` ends ``with`` quietly where that is not there."""
        try:
            system, root = self._access
            yield system, f"{root}/{name}".rstrip("/")
        except Exception as error:
            has_bucket = "bucket does not exist" not in str(error).lower()
            if missing_ok and has_bucket and isinstance(error, FileNotFoundError):
                return
            if isinstance(error, OSError) and str(error.filename or "").startswith("/"):
                raise  # about a file of this machine; the drivers' own errors carry no such name
            raise EnvironmentFailure(f"{self.url}/{name}".rstrip("/") + f": {self._explain(error)}") from error

    def _explain(self, error: Exception) -> str:
        kind = type(error).__name__
        # the driver's words, without what a URL may carry before its host
        words = re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()) or kind)[:300]
        if isinstance(error, ImportError):
            return f"the driver is not installed; pip install {DRIVERS[self.url.partition('://')[0]]}"
        if "bucket does not exist" in words.lower():
            return "the bucket does not exist; make it, or correct --artifacts"
        if "Credential" in kind or "AuthenticationError" in kind:
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or what your store's driver reads"
            return f"no credentials were found; {remedy}"
        if isinstance(error, PermissionError):
            remedy = "check which credentials this machine uses and that they may list, read, write and delete there"
            return f"access was denied ({words}); {remedy}"
        if isinstance(error, (ConnectionError, TimeoutError)) or re.search("Connect|Timeout|Endpoint", kind):
            remedy = "check the network and the endpoint (AWS_ENDPOINT_URL), then run the same command again"
            return f"the store does not answer ({words}); {remedy}"
        return f"the store failed ({kind}: {words}); run the same command again"

    def check(self) -> None:
        """Make sure, before any work, that objects can be listed, written and deleted here.

        Raises:
            EnvironmentFailure: they cannot.
        """
        self.names()
        self.write(name := f".check-{secrets.token_hex(8)}", b"")
        self.remove(name)

    def names(self, folder: str = "") -> list[str]:
        """Names directly under ``folder``, without what is below them, sorted."""
        with self._objects(folder, missing_ok=True) as (system, path):
            return sorted(found.rstrip("/").rpartition("/")[2] for found in system.ls(path, detail=False))
        return []

    def sizes(self, folder: str) -> dict[str, int]:
        """Size in bytes of every object under ``folder``, by its name relative to that."""
        with self._objects(folder) as (system, path):
            found = system.find(f"{path}/", detail=True)  # empty where there is nothing
        return {name.removeprefix(f"{path}/"): entry["size"] for name, entry in sorted(found.items())}

    def read(self, name: str) -> bytes | None:
        """What is in an object; None when there is none."""
        with self._objects(name, missing_ok=True) as (system, path):
            return system.cat_file(path)
        return None

    def write(self, name: str, data: bytes) -> None:
        """Make or replace an object."""
        with self._objects(name) as (system, path):
            system.pipe_file(path, data)

    def put(self, folder: str, names: Sequence[str], source: Path) -> None:
        """Copy files of a local folder up, several at a time; each object is there whole or not at all."""
        with self._objects(folder) as (system, path):
            targets = [f"{path}/{name}" for name in names]
            system.put([str(source / name) for name in names], targets, batch_size=_NUM_TRANSFERS)

    def get(self, folder: str, names: Sequence[str], into: Path) -> None:
        """Copy objects down, several at a time."""
        with self._objects(folder) as (system, path):
            targets = [str(into / name) for name in names]
            system.get([f"{path}/{name}" for name in names], targets, batch_size=_NUM_TRANSFERS)

    def remove(self, name: str) -> None:
        """Remove an object; harmless when it is not there."""
        with self._objects(name, missing_ok=True) as (system, path):
            system.rm_file(path)

    def remove_folder(self, folder: str, *, first: str) -> None:
        """Remove every object under ``folder``, and ``first`` before the others."""
        self.remove(f"{folder}/{first}")
        if names := self.sizes(folder):
            with self._objects(folder, missing_ok=True) as (system, path):
                system.rm([f"{path}/{name}" for name in names])

    def fetch(self, folder: str, files: Mapping[str, Any], into: Path) -> list[str]:
        """Bring an artifact's files into a folder; what an earlier call brought whole is kept.

        Returns:
            What is wrong with the files in the store, one line each; those are not kept here.
        """
        problems = find_damage(f"{self.url}/{folder}", files, self.sizes(folder))
        wanted = [name for name in files if name not in problems and not _is_whole(into / name, files[name])]
        self.get(folder, wanted, into)
        changed = find_changes(f"{self.url}/{folder}", files, wanted, into)
        for name in changed:
            (into / name).unlink(missing_ok=True)
        return sorted((problems | changed).values())


class WorkCopy:
    """Unfinished work in the mirror, so that another machine goes on where this one died.

    A stage writes its files under a temporary name and renames them, so what has its own name is whole.  While ``with``
    lasts, what is new is copied every few minutes, and once more when it ends in an error.  A copy that fails is tried
    again by the next one: losing the mirror is no reason to lose the work.
    """

    def __init__(self, mirror: Mirror, folder: str, work: Path) -> None:
        """Copy nothing yet; ``folder`` is where the copy of ``work`` is in the mirror."""
        self._mirror, self._folder, self._work = mirror, folder, work
        self._note = work.with_name(f".mirror{work.name}.json")
        """Has the id of the copy that ``work`` is level with, or ahead of."""
        self._copier = secrets.token_hex(8)
        self._sent: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._copy_on, daemon=True, name="work-copy")

    def __enter__(self) -> Self:
        """Begin to copy, after the first few minutes."""
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop; work that succeeded is published whole anyway."""
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
        """Copy what changed since the last copy, the oldest first, then the index, without what is gone.

        Raises:
            EnvironmentFailure: the store failed.
        """
        found = self._whole_files()
        changed = [name for name, stamp in found.items() if self._sent.get(name) != stamp]
        if not changed and self._sent.keys() <= found.keys():
            return
        for name in sorted(changed, key=lambda name: found[name][1]):
            if self._stop.is_set() and threading.current_thread() is self._thread:
                return
            with contextlib.suppress(FileNotFoundError):  # replaced or removed since: the next copy sees to it
                self._mirror.put(f"{self._folder}/{self._copier}", [name], self._work)
                self._sent[name] = found[name]
        self._sent = {name: stamp for name, stamp in self._sent.items() if name in found}
        index = {"id": secrets.token_hex(8), "copier": self._copier, "files": sorted(self._sent)}
        self._mirror.write(f"{self._folder}/{_INDEX}", json.dumps(index).encode())
        write_json(self._note, {"id": index["id"]})

    def _whole_files(self) -> dict[str, tuple[int, int]]:
        """The whole files of the work: name → size in bytes and time of the last change in ns."""
        found: dict[str, tuple[int, int]] = {}
        for path in self._work.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not path.name.startswith(".tmp-"):
                    found[path.relative_to(self._work).as_posix()] = (path.stat().st_size, path.stat().st_mtime_ns)
        return found

    def fetch(self) -> None:
        """Bring the copy here, unless the work that lies here is level with it or ahead of it.

        Raises:
            EnvironmentFailure: the store failed.
        """
        index = self.index()
        with contextlib.suppress(DamagedFileError, TypeError, KeyError):
            if not index or (self._whole_files() and index["id"] == read_json(self._note)["id"]):
                return
        part = self._work.with_name(f".fetch{self._work.name}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self._mirror.get(f"{self._folder}/{index['copier']}", index["files"], part)
        shutil.rmtree(self._work, ignore_errors=True)
        part.rename(self._work)
        write_json(self._note, {"id": index["id"]})

    def drop(self) -> None:
        """Remove the copy, its index first."""
        self._mirror.remove_folder(self._folder, first=_INDEX)
        self._note.unlink(missing_ok=True)

    def index(self) -> dict[str, Any]:
        """What the copy consists of; empty where there is none that can be used."""
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            index = json.loads(self._mirror.read(f"{self._folder}/{_INDEX}") or b"{}")
            if index["id"] and all(map(is_inside, [index["copier"], *index["files"]])):
                return index
        return {}


def is_inside(name: object) -> bool:
    """Whether ``name``, which another machine wrote, is a file's name that stays inside the folder it is put in."""
    return isinstance(name, str) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def find_damage(where: Path | str, files: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, str]:
    """What the sizes of an artifact's files tell: name of each missing or cut one → what is wrong."""
    problems = {}
    for name, entry in files.items():
        if name not in sizes:
            problems[name] = f"{where}/{name} is missing"
        elif sizes[name] != entry["size"]:
            problems[name] = f"{where}/{name} has {sizes[name]} bytes instead of {entry['size']}"
    return problems


def find_changes(where: Path | str, files: Mapping[str, Any], names: Sequence[str], folder: Path) -> dict[str, str]:
    """Those of the ``names`` that are not in ``folder`` as the manifest has them → what is wrong; reads every byte."""

    def read(share: Sequence[str]) -> dict[str, str]:
        found = {name: _difference(folder / name, files[name]) for name in share}
        return {name: f"{where}/{name}{text}" for name, text in found.items() if text}

    with ThreadPoolExecutor(
        _NUM_READERS
    ) as pool:  # a task for each of ten thousand masks would cost as much as reading
        shares = pool.map(read, [names[first::_NUM_READERS] for first in range(_NUM_READERS)])
        return {name: text for share in shares for name, text in share.items()}


def _difference(file: Path, expected: Mapping[str, Any]) -> str:
    """What is wrong with ``file``, to be said behind its name; empty when it is as ``expected``."""
    try:
        with file.open("rb", buffering=0) as stream:
            is_small = expected["size"] < _SMALL_BYTES
            digest = hashlib.sha256(stream.readall()) if is_small else hashlib.file_digest(stream, "sha256")
    except FileNotFoundError:
        return " is missing"
    except OSError as error:
        return f" cannot be read ({error.strerror})"
    return "" if digest.hexdigest() == expected["sha256"] else ": the content differs from the manifest's sha256"


def _is_whole(file: Path, expected: Mapping[str, Any]) -> bool:
    is_there = file.is_file() and file.stat().st_size == expected["size"]
    return is_there and not _difference(file, expected)
