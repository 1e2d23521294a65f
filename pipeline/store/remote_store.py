"""A store in an object store (s3://, gs://, …) with a local cache: what is there decides, what is here is used.

    <url>/<stage>/<key>/…            an artifact: its files, and manifest.json, which is written last
    <url>/<stage>/.work-<key>/…      unfinished work of the machine that builds it (pipeline.store.work_mirror)
    <url>/.locks/<stage>-<key>/n     leases (pipeline.store.leases)
    <url>/runs/<name>-<run>.json     which artifacts a run used
    <cache>/…                        the same layout as a local store: everything works on files here

The layout of the artifacts is that of a local store, so a plain copy of the bucket is one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.store.artifacts import MANIFEST, Artifact, Store
from pipeline.store.lease_places import LeaseObjects
from pipeline.store.leases import LeaseLock
from pipeline.store.lock_protocol import ArtifactLock
from pipeline.store.locks import KeyLock
from pipeline.store.object_store import ObjectFolder
from pipeline.store.transfers import check_sizes, fetch_artifact, send_files, verify_files
from pipeline.store.work_mirror import WorkMirror, drop_mirror, fetch_work, has_mirror, is_inside
from stages.errors import DamagedFileError, EnvironmentFailure, MissingArtifactError

_KEY = re.compile(r"[0-9a-f]{20}")


def cache_folder(url: str) -> Path:
    """Where the files of the store at ``url`` lie on this machine: under WSSS_CACHE, or the user's cache folder."""
    base = os.environ.get("WSSS_CACHE")
    if not base:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wsss"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", url.partition("://")[2])[:40].strip("-.")
    return Path(base) / "artifacts" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


class RemoteStore(Store):
    """The artifacts under one URL.

    An artifact is in the store when its manifest is there, whatever lies in the cache.  ``lookup`` reads manifests;
    only ``require`` brings files here.  Inside the lock of its key, ``lookup`` also sends up a whole artifact that
    lies in the cache alone: the upload that a death cut off is finished, what somebody removed there comes back.
    """

    poll_s = 3.0  # a look is a request for each shard

    def __init__(self, url: str, root: Path | None = None) -> None:
        """Use the folder at ``url``.

        Args:
            url: Such as ``s3://bucket/folder``.
            root: The cache; by default ``cache_folder(url)``.
        """
        self._objects = ObjectFolder(url)
        super().__init__(root or cache_folder(self._objects.url))

    @property
    def location(self) -> str:
        """The URL."""
        return self._objects.url

    def check_visible(self) -> None:
        """Make sure that the store answers.

        Raises:
            EnvironmentFailure: it does not, or there is no such bucket.
        """
        self._objects.children()

    # -- finding ------------------------------------------------------------------------------------------------------

    def lookup(self, stage: str, key: str, *, damaged: Callable[[str], None] | None = None) -> Artifact | None:
        """The artifact as its manifest tells; its files may be elsewhere (``is_local``).

        Raises:
            EnvironmentFailure: the store cannot be read.
        """
        here = super().lookup(stage, key)
        try:
            manifest = self._remote_manifest(stage, key)
            if manifest is not None and here is not None and here.content == manifest["content"]:
                # it may have been built again elsewhere: the same files, another run
                return dataclasses.replace(here, manifest=manifest)
            if manifest is not None:
                found = Artifact(stage, key, self.path(stage, key), manifest, is_local=False)
                check_sizes(self._objects, found)
                return found
        except DamagedFileError as error:
            if damaged is not None:
                damaged(error.message)
            return None
        return self._send(here) if here is not None and self._holds(stage, key) else None

    def require(self, stage: str, key: str) -> Artifact:
        """The artifact with its files here, each compared with the manifest's sha256 as it came.

        Raises:
            MissingArtifactError: there is none that is whole.
            DamagedFileError: a file differs from the manifest, the second time too.
            EnvironmentFailure: the store cannot be read, or the cache not written.
        """
        for is_last in (False, True):
            artifact = self.lookup(stage, key)
            if artifact is None:
                raise MissingArtifactError(
                    f"{self._url(stage, key)} is missing or damaged; run the stage {stage} again"
                )
            if artifact.is_local:
                return artifact
            try:
                return self._fetch(artifact)
            except DamagedFileError:  # damaged on its way, or replaced meanwhile
                if is_last:
                    raise
        raise AssertionError("the last try returns or raises")

    def folders(self) -> Iterator[tuple[str, str]]:
        """(stage, key) of every artifact folder in the store, sorted."""
        for stage in self._objects.children():
            if not stage.startswith(".") and stage not in ("runs", "reports"):
                yield from ((stage, key) for key in self._objects.children(stage) if _KEY.fullmatch(key))

    def _url(self, stage: str, key: str) -> str:
        return f"{self._objects}/{stage}/{key}"

    def _remote_manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """The manifest in the store; None where there is none.

        Raises:
            DamagedFileError: there is one that cannot be used.
        """
        data = self._objects.read(f"{stage}/{key}/{MANIFEST}")
        if data is None:
            return None
        where = f"{self._url(stage, key)}/{MANIFEST}"
        try:
            manifest = self._check_manifest(json.loads(data), stage, key, where)
        except ValueError as error:
            raise DamagedFileError(f"{where} is not readable JSON ({error})") from error
        outside = [name for name in manifest["content"]["files"] if not is_inside(name)]
        if outside:
            raise DamagedFileError(f"{where} names a file outside of its artifact: {outside[0]}")
        return manifest

    def _fetch(self, artifact: Artifact) -> Artifact:
        """Bring the files into the cache, one process of this machine at a time."""
        with KeyLock(self.root / ".locks" / f"fetch-{artifact.stage}-{artifact.key}"):
            here = super().lookup(artifact.stage, artifact.key)  # another process may have been first
            if here is None or here.content != artifact.content:
                fetch_artifact(self._objects, artifact)
            return self._open(artifact.stage, artifact.key)

    # -- building -----------------------------------------------------------------------------------------------------

    def _new_lock(self, stage: str, key: str, waiting: Callable[[str], None] | None) -> ArtifactLock:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFailure(
                f"{self.root}, the cache of {self.location}, cannot be made ({error.strerror}); set WSSS_CACHE to a "
                "folder that can be written"
            ) from error
        return LeaseLock(LeaseObjects(self._objects, f".locks/{stage}-{key}"), waiting=waiting, lost=self.on_lost)

    def has_work(self, stage: str, key: str) -> bool:
        """Whether there is unfinished work, here or of another machine."""
        return super().has_work(stage, key) or has_mirror(self._objects, self._mirrored(stage, key))

    def work_dir(self, stage: str, key: str, *, fresh: bool = False) -> tuple[Path, bool]:
        """The folder to build in, here; work of another machine that went further is fetched.  Needs the lock."""
        work, note = self.work_path(stage, key), self._note(stage, key)
        if fresh:
            drop_mirror(self._objects, self._mirrored(stage, key), note)
        else:
            fetch_work(self._objects, self._mirrored(stage, key), work, note)
        return super().work_dir(stage, key, fresh=fresh)

    def mirror(self, stage: str, key: str) -> WorkMirror:
        """Copy the work folder up every minute while ``with`` lasts.  Needs the lock."""
        return WorkMirror(
            self._objects,
            self._mirrored(stage, key),
            self.work_path(stage, key),
            self._note(stage, key),
            lambda: self._check_held(stage, key),
        )

    def set_aside(self, stage: str, key: str) -> Path | str:
        """Keep the manifest of a damaged artifact under another name: its files will be replaced.  Needs the lock."""
        if self.path(stage, key).exists():
            super().set_aside(stage, key)
        name, number = f"{stage}/{key}/{MANIFEST}", 0
        while not self._objects.create(aside := f"{stage}/.damaged-{key}-{number}", self._objects.read(name) or b""):
            number += 1
        self._objects.remove(name)
        return f"{self._objects}/{aside}"

    def remove(self, stage: str, key: str) -> None:
        """Remove an artifact and its unfinished work, in the store and here.  Needs the lock."""
        self._objects.remove(f"{stage}/{key}/{MANIFEST}")
        self._objects.remove_folder(f"{stage}/{key}")
        drop_mirror(self._objects, self._mirrored(stage, key), self._note(stage, key))
        super().remove(stage, key)

    def publish(self, stage: str, key: str, *, content: Mapping[str, Any], run: Mapping[str, Any]) -> Artifact:
        """Publish in the cache, then send the files up, the manifest last.  Needs the lock.

        Raises:
            EnvironmentFailure: the store failed; the artifact is whole here, and the next build of it only sends it.
        """
        return self._send(super().publish(stage, key, content=content, run=run))

    def _send(self, artifact: Artifact) -> Artifact:
        """Make the store hold ``artifact``, which lies here whole; calling it again changes nothing."""
        stage, key = artifact.stage, artifact.key
        self._check_held(stage, key)
        if self._sent_content(stage, key) != artifact.content:  # other bytes: until the end there is no artifact
            self._objects.remove(f"{stage}/{key}/{MANIFEST}")
        send_files(self._objects, artifact)
        self._check_held(stage, key)
        self._objects.send(artifact.path / MANIFEST, f"{stage}/{key}/{MANIFEST}")
        drop_mirror(self._objects, self._mirrored(stage, key), self._note(stage, key))
        return artifact

    def _sent_content(self, stage: str, key: str) -> Any:  # noqa: ANN401 - JSON is any
        try:
            manifest = self._remote_manifest(stage, key)
        except DamagedFileError:
            return None
        return None if manifest is None else manifest["content"]

    @staticmethod
    def _mirrored(stage: str, key: str) -> str:
        return f"{stage}/.work-{key}"

    def _note(self, stage: str, key: str) -> Path:
        return self.root / stage / f".mirror-{key}.json"

    # -- upkeep -------------------------------------------------------------------------------------------------------

    def share(self, path: Path) -> None:
        """Copy a file under the cache to the same name in the store, or remove it there when it is gone here."""
        name = path.relative_to(self.root).as_posix()
        if path.exists():
            self._objects.send(path, name)
        else:
            self._objects.remove(name)

    def verify(self, stage: str, key: str) -> list[str]:
        """Read every file in the store, and the copy here where there is one; what is wrong, file by file."""
        try:
            manifest = self._remote_manifest(stage, key)
        except DamagedFileError as error:
            return [error.message]
        if manifest is None:
            return [f"{self._url(stage, key)}/{MANIFEST} is missing"]
        problems = verify_files(self._objects, Artifact(stage, key, self.path(stage, key), manifest, is_local=False))
        here = super().verify(stage, key) if self.path(stage, key).exists() else []
        return problems + here
