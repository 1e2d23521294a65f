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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.locks import KeyLock
from stages.contracts import read_json, write_json
from stages.errors import DamagedFileError, MissingArtifactError

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

    def __init__(self, root: Path) -> None:
        """Use ``root``; it is made when the first artifact is built."""
        self.root = root

    @property
    def digest_cache(self) -> Path:
        """Where digests of the data sets' files are kept, so that unchanged files are not read again."""
        return self.root / ".digests.json"

    # -- finding ------------------------------------------------------------------------------------------------------

    def path(self, stage: str, key: str) -> Path:
        """Where the artifact stands once it is published."""
        return self.root / stage / key

    def lookup(self, stage: str, key: str, *, damaged: Callable[[str], None] | None = None) -> Artifact | None:
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
        manifest = read_json(path)
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

    def lock(self, stage: str, key: str, *, waiting: Callable[[str], None] | None = None) -> KeyLock:
        """The lock that whoever builds, replaces or removes this artifact holds."""
        return KeyLock(self.root / ".locks" / f"{stage}-{key}", waiting=waiting)

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

    def set_aside(self, stage: str, key: str) -> Path:
        """Rename a damaged artifact out of the way.  Needs the lock."""
        number = 0
        while (target := self.root / stage / f".damaged-{key}-{number}").exists():
            number += 1
        self.path(stage, key).rename(target)
        return target

    def publish(self, stage: str, key: str, *, content: Mapping[str, Any], run: Mapping[str, Any]) -> Artifact:
        """Turn the work folder into the artifact in one rename, replacing an older one.  Needs the lock.

        Args:
            stage: Stage name.
            key: Cache key.
            content: Version, config, inputs and mask_supervision; schema, stage, key and files are added here.
            run: Times, host, packages, revision, metrics and warnings.
        """
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
