"""The artifact store: folders that appear whole or not at all, found by stage and key.

    <root>/<stage>/<key>/            a published artifact: its files and manifest.json
    <root>/<stage>/.work-<key>/      unfinished work; a later build of the same key continues there
    <root>/<stage>/.damaged-<key>-n/ an artifact that lost a file, set aside
    <root>/.locks/<stage>-<key>      one lock per key
    <root>/runs/<name>-<run>.json    which artifacts a run used

An artifact is published by writing manifest.json last and one rename.  ``content`` of the manifest is identical for
identical results; ``run`` says when, where and how long.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.store.lock_protocol import ArtifactLock
from pipeline.store.locks import KeyLock
from pipeline.store.object_store import is_url
from stages.contracts import read_json, write_json
from stages.errors import DamagedFileError, EnvironmentFailure, MissingArtifactError

SCHEMA = 1
"""Version of the manifest's layout; another one is no hit."""

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Artifact:
    """A published artifact whose files were all there, with their sizes, when it was looked up."""

    stage: str
    key: str
    path: Path
    manifest: Mapping[str, Any]
    is_local: bool = True
    """Whether the files lie under ``path``; those of a remote store's artifact do once ``Store.require`` has run."""

    @property
    def content(self) -> Mapping[str, Any]:
        """What the artifact is; identical for identical results."""
        return self.manifest["content"]

    @property
    def run(self) -> Mapping[str, Any]:
        """When, where and how it was built, its metrics and warnings."""
        return self.manifest["run"]

    @property
    def metrics(self) -> dict[str, Any]:
        """The stage's metrics."""
        return dict(self.run.get("metrics", {}))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the stage warned of while it was built."""
        return tuple(self.run.get("warnings", ()))

    @property
    def mask_supervision(self) -> frozenset[str]:
        """Ids of the training images whose true masks were used."""
        return frozenset(self.content["mask_supervision"])

    @property
    def size_bytes(self) -> int:
        """Sum of the file sizes."""
        return sum(entry["size"] for entry in self.content["files"].values())


class Store:
    """The artifacts under one folder."""

    poll_s: ClassVar[float] = 0.5
    """Seconds between two looks at what others build."""

    def __init__(self, root: Path) -> None:
        """Use ``root``; it is made when the first artifact is built."""
        self.root = root
        self.on_lost: Callable[[EnvironmentFailure], None] | None = None
        """Called from another thread when a lock that only a heartbeat keeps was taken over: the work must stop.  Holds
        for the locks that are made after it is set; without it a build goes on, and is refused when it publishes."""
        self._locks: dict[tuple[str, str], ArtifactLock] = {}

    @property
    def location(self) -> str:
        """What ``open_store`` makes this store of again, in whatever process: the folder, or a URL."""
        return str(self.root)

    def check_visible(self) -> None:
        """Make sure, in a worker that joins a run, that it sees the store in which the run's artifacts are.

        Raises:
            EnvironmentFailure: it does not.
        """
        if not self.root.is_dir():
            raise EnvironmentFailure(
                f"{self.root.absolute()} is not to be seen on {socket.gethostname()}; mount it here under this name, "
                "or let the run use a store that every worker reaches (--artifacts /mnt/…, --artifacts s3://…)"
            )

    @property
    def digest_cache(self) -> Path:
        """Where digests of the data sets' files are kept, so that unchanged files are not read again."""
        return self.root / ".digests.json"

    # -- finding ------------------------------------------------------------------------------------------------------

    def path(self, stage: str, key: str) -> Path:
        """Where the artifact stands once it is published."""
        return self.root / stage / key

    def lookup(
        self, stage: str, key: str, *, damaged: Callable[[str], None] | None = None, fresh: bool = False
    ) -> Artifact | None:
        """The artifact, or None when there is none that is whole.

        Args:
            stage: Stage name.
            key: Cache key.
            damaged: Called with what is wrong when there is an artifact that cannot be used.
        """
        path = self.path(stage, key)
        if not path.is_dir():
            return None
        try:
            return self._open(stage, key)
        except DamagedFileError as error:
            if damaged is not None:
                damaged(error.message)
            return None

    def require(self, stage: str, key: str) -> Artifact:
        """The artifact.

        Raises:
            MissingArtifactError: there is none that is whole.
        """
        artifact = self.lookup(stage, key)
        if artifact is None:
            raise MissingArtifactError(f"{self.path(stage, key)} is missing or damaged; run the stage {stage} again")
        return artifact

    def _open(self, stage: str, key: str) -> Artifact:
        manifest = self.manifest(stage, key)
        for name, entry in manifest["content"]["files"].items():
            _check_size(self.path(stage, key) / name, entry["size"])
        return Artifact(stage, key, self.path(stage, key), manifest)

    def manifest(self, stage: str, key: str) -> dict[str, Any]:
        """The manifest, checked to be one of this schema and of this artifact; the files are not looked at.

        Raises:
            DamagedFileError: there is none, or it is another's.
        """
        path = self.path(stage, key) / MANIFEST
        return self._check_manifest(read_json(path), stage, key, str(path))

    @staticmethod
    def _check_manifest(manifest: Any, stage: str, key: str, path: str) -> dict[str, Any]:  # noqa: ANN401 - JSON is any
        try:
            content = manifest["content"]
            is_ours = [content["schema"], content["stage"], content["key"]] == [SCHEMA, stage, key]
            is_ours &= isinstance(content["mask_supervision"], list) and isinstance(manifest["run"], dict)
            is_ours &= all({"size", "sha256"} <= entry.keys() for entry in content["files"].values())
        except (KeyError, TypeError, AttributeError):
            is_ours = False
        if not is_ours:
            raise DamagedFileError(f"{path} does not describe {stage} {key}")
        return manifest

    def newest_manifests(self, stage: str) -> Iterator[dict[str, Any]]:
        """The manifests of a stage's artifacts, the newest first; damaged ones are left out."""
        files = [file for file in self.root.glob(f"{stage}/*/{MANIFEST}") if not file.parent.name.startswith(".")]
        for file in sorted(files, key=_modified_ns, reverse=True):
            with contextlib.suppress(DamagedFileError):
                yield self.manifest(stage, file.parent.name)

    def folders(self) -> Iterator[tuple[str, str]]:
        """(stage, key) of every artifact folder, whole or damaged, sorted."""
        for folder in sorted(self.root.glob("*/*/")):
            is_ours = not folder.parent.name.startswith(".") and re.fullmatch(r"[0-9a-f]{20}", folder.name)
            if is_ours:
                yield folder.parent.name, folder.name

    def artifacts(self) -> Iterator[Artifact]:
        """All whole artifacts, by stage and key."""
        for stage, key in self.folders():
            artifact = self.lookup(stage, key)
            if artifact is not None:
                yield artifact

    # -- building -----------------------------------------------------------------------------------------------------

    def lock(
        self, stage: str, key: str, *, part: str = "", waiting: Callable[[str], None] | None = None
    ) -> ArtifactLock:
        """The lock that whoever builds, replaces or removes this artifact holds; see ``on_lost`` too.

        Args:
            stage: Stage name.
            key: Cache key.
            waiting: Called once with a description of the holder when another holds it.
        """
        if part:
            return KeyLock(self.root / ".locks" / f"{stage}-{key}.{part}", waiting=waiting, lost=self.on_lost)
        lock = self._new_lock(stage, key, waiting)
        if not self._holds(stage, key):
            self._locks[stage, key] = lock
        return lock

    def _new_lock(self, stage: str, key: str, waiting: Callable[[str], None] | None) -> ArtifactLock:
        return KeyLock(self.root / ".locks" / f"{stage}-{key}", waiting=waiting, lost=self.on_lost)

    def _holds(self, stage: str, key: str) -> bool:
        """Whether a lock that this store handed out is held."""
        lock = self._locks.get((stage, key))
        return lock is not None and lock.is_held

    def _check_held(self, stage: str, key: str) -> None:
        """Publish nothing under a lock that another worker has taken over meanwhile."""
        if self._holds(stage, key):
            self._locks[stage, key].check_held()

    def mirror(self, stage: str, key: str) -> AbstractContextManager[object]:
        """Keep unfinished work safe from the loss of this machine while ``with`` lasts; here the folder itself does."""
        del stage, key
        return contextlib.nullcontext()

    def share(self, path: Path) -> None:
        """Let other machines see a file under ``root`` that is no artifact (a run's record); here they do."""
        del path

    def work_path(self, stage: str, key: str) -> Path:
        """Where unfinished work of this key lies; it need not exist."""
        return self.root / stage / f".work-{key}"

    def has_work(self, stage: str, key: str) -> bool:
        """Whether there is unfinished work that a build would continue."""
        return any(not file.name.startswith(_TEMPORARY) for file in _files(self.work_path(stage, key)))

    def work_dir(self, stage: str, key: str, *, fresh: bool = False) -> tuple[Path, bool]:
        """The folder to build in, and whether it holds earlier work.  Needs the lock.

        Args:
            stage: Stage name.
            key: Cache key.
            fresh: Throw earlier work away.
        """
        path = self.work_path(stage, key)
        if fresh and path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        return path, self.has_work(stage, key)

    def set_aside(self, stage: str, key: str) -> Path | str:
        """Rename a damaged artifact out of the way; returns where it is.  Needs the lock."""
        number = 0
        while (target := self.root / stage / f".damaged-{key}-{number}").exists():
            number += 1
        self.path(stage, key).rename(target)
        return target

    def remove(self, stage: str, key: str) -> None:
        """Remove an artifact and the unfinished work of its key, if they are there.  Needs the lock."""
        for folder in (self.path(stage, key), self.work_path(stage, key)):
            if folder.is_dir():
                # out of sight first: a removal that is interrupted must not leave half an artifact under its name
                doomed = folder.with_name(f".replaced-{key}-{os.getpid()}")
                shutil.rmtree(doomed, ignore_errors=True)
                folder.rename(doomed)
                shutil.rmtree(doomed)

    def publish(self, stage: str, key: str, *, content: Mapping[str, Any], run: Mapping[str, Any]) -> Artifact:
        """Turn the work folder into the artifact in one rename, replacing an older one.  Needs the lock.

        Args:
            stage: Stage name.
            key: Cache key.
            content: Version, config, inputs and mask_supervision; schema, stage, key and files are added here.
            run: Times, host, packages, revision, metrics and warnings.

        Raises:
            EnvironmentFailure: the lock was taken over by another worker meanwhile.
        """
        self._check_held(stage, key)
        work, final = self.work_path(stage, key), self.path(stage, key)
        (work / MANIFEST).unlink(missing_ok=True)
        files = {}
        for file in _files(work):
            if file.name.startswith(_TEMPORARY):
                file.unlink()  # half of an atomic write whose process was killed
            else:
                files[file.relative_to(work).as_posix()] = _describe_and_sync(file)
        for folder in [*(path for path in work.rglob("*") if path.is_dir()), work]:
            _sync_folder(folder)
        content = {**content, "schema": SCHEMA, "stage": stage, "key": key, "files": files}
        write_json(work / MANIFEST, {"content": content, "run": dict(run)})
        _sync_folder(work)
        replaced = final.with_name(f".replaced-{key}")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        work.rename(final)
        _sync_folder(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return self._open(stage, key)

    # -- upkeep -------------------------------------------------------------------------------------------------------

    def verify(self, stage: str, key: str) -> list[str]:
        """Read every file of an artifact and compare it with the manifest; what is wrong, file by file."""
        try:
            manifest = self.manifest(stage, key)
        except DamagedFileError as error:
            return [error.message]
        problems = []
        for name, entry in manifest["content"]["files"].items():
            file = self.path(stage, key) / name
            try:
                _check_size(file, entry["size"])
            except DamagedFileError as error:
                problems.append(error.message)
                continue
            if _sha256(file) != entry["sha256"]:
                problems.append(f"{file}: the content differs from the manifest's sha256")
        return problems


def open_store(location: str | Path) -> Store:
    """The store at a folder or a URL; nothing is asked of it yet.

    Args:
        location: A folder, ``file://`` and a folder, or ``s3://bucket/folder`` and the like.

    Raises:
        InputError: a URL that cannot be a store.
        EnvironmentFailure: a file stands where the folder should be.
    """
    location = str(location).removeprefix("file://")
    if is_url(location):
        from pipeline.store.remote_store import RemoteStore

        return RemoteStore(location)
    root = Path(location)
    if root.exists() and not root.is_dir():
        raise EnvironmentFailure(f"{root} is no folder; choose another one with --artifacts DIR")
    return Store(root)


def _check_size(file: Path, size: int) -> None:
    try:
        found = file.stat().st_size
    except OSError:
        raise DamagedFileError(f"{file} is missing") from None
    if found != size:
        raise DamagedFileError(f"{file} has {found} bytes instead of {size}")


def _modified_ns(file: Path) -> int:
    """When ``file`` was written; 0 for one that another process has removed meanwhile."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _files(folder: Path) -> list[Path]:
    """The regular files under ``folder``, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe_and_sync(file: Path) -> dict[str, Any]:
    """Size and digest of ``file``, which is on the disk afterwards."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    return {"size": file.stat().st_size, "sha256": digest}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
