"""The artifact store: folders that appear whole or not at all, found by stage and key.

    <root>/<stage>/<key>/            a published artifact: its files and manifest.json
    <root>/<stage>/.work-<key>/      unfinished work; a later build of the same key continues there
    <root>/<stage>/.damaged-<key>-n/ an artifact, or files of unfinished work, not as they were written, set aside
    <root>/<stage>/.unsent-<key>     the artifact of this key is not wholly in the mirror yet
    <root>/.locks/<stage>-<key>      one lock per key; with .<part> behind it, one per part of the work
    <root>/runs/<name>-<run>.json    which artifacts a run used

An artifact is published by writing manifest.json last and one rename.  ``content`` of the manifest is identical for
identical results; ``run`` says when, where and how long; ``sha256`` is of the two as canonical JSON.  A look-up checks
the manifest, and names and sizes of the files; ``require`` and ``verify`` read every byte.
A store behind a URL is such a folder in this machine's cache with a mirror (pipeline.store.mirror): what is not here is
looked for there, what is published here is published there.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.store.locks import ArtifactLock
from pipeline.store.mirror import DRIVERS, MANIFEST, Mirror, WorkCopy, find_changes, find_damage, is_inside
from stages.contracts import JOURNAL, expand_path, open_journal, parse_json, read_journal, read_json, write_json
from stages.errors import DamagedFileError, EnvironmentFailure, InputError, MissingArtifactError

SCHEMA = 2
"""Version of the manifest's layout; another one is no hit."""

_TEMPORARY = ".tmp-"
_BETWEEN_RENAMES_S = 2.0
"""How long a look-up waits for the second of the two renames that replace an artifact."""


@dataclass(frozen=True)
class Artifact:
    """A published artifact whose files were all there, with their sizes, when it was looked up.

    They lie under ``path`` where the store has no mirror, and once ``Store.require`` has brought them.
    """

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
    """The artifacts under one folder, and in its mirror."""

    def __init__(self, root: Path, mirror: Mirror | None = None) -> None:
        """Use ``root``; it is made when the first artifact is built."""
        self.root = root
        self.on_lost: Callable[[EnvironmentFailure], None] | None = None
        """Called from another thread when a lease was lost that was asked for later: the work under it must stop."""
        self._mirror = mirror
        self._locks: dict[tuple[str, str], ArtifactLock] = {}
        self._whole: dict[tuple[str, str], tuple[tuple[int, int], Artifact]] = {}
        """Artifacts whose files were found here; they are not looked at again until the manifest is another."""
        self._sound: dict[tuple[str, str], tuple[int, int]] = {}
        """Stamp of the manifest of those of them whose every byte was compared with it."""

    @property
    def location(self) -> str:
        """What ``open_store`` makes this store of again, in whatever process: the folder, or a URL."""
        return str(self.root) if self._mirror is None else self._mirror.url

    @property
    def is_mirrored(self) -> bool:
        """Whether the store is behind a URL, and other machines publish there too."""
        return self._mirror is not None

    def check_visible(self) -> None:
        """Make sure, in a worker that joins a run, that it sees the store in which the run's artifacts are.

        Raises:
            EnvironmentFailure: it does not, or the mirror cannot be read and written.
        """
        if self._mirror is not None:
            self._mirror.check()
        elif not self.root.is_dir():
            raise EnvironmentFailure(
                f"{self.root.absolute()} is not to be seen on {socket.gethostname()}; mount it here under this name, "
                "or let the run use a store that every worker reaches (--artifacts /mnt/…, --artifacts s3://…)"
            )

    @property
    def digest_cache(self) -> Path:
        """Where digests of the data sets' files are kept, so that unchanged files are not read again."""
        return self.root / ".digests.json"

    def path(self, stage: str, key: str) -> Path:
        """Where the artifact stands once it is published."""
        return self.root / stage / key

    def lookup(
        self, stage: str, key: str, *, damaged: Callable[[str], None] | None = None, fresh: bool = False
    ) -> Artifact | None:
        """The artifact, or None when there is none that is whole.

        One that was found whole is not looked at again while its manifest is the same file, but for ``fresh``.  Of the
        mirror only the manifest and a listing are read.  Under the lock of the key an upload that was cut off is
        finished.  ``damaged`` hears what is wrong with an artifact that cannot be used.

        Raises:
            EnvironmentFailure: the mirror cannot be read.
        """
        known = self._whole.pop((stage, key), None)
        if not fresh and known is not None and known[0] == _stamp(self.path(stage, key) / MANIFEST):
            self._whole[stage, key] = known
            return known[1]
        problem = ""
        try:
            if self._is_there(stage, key):
                return self._look_here(stage, key)
        except DamagedFileError as error:
            problem = error.message
        try:
            if self._mirror and (manifest := self._mirrored_manifest(self._mirror, stage, key)):
                name, files = f"{stage}/{key}", manifest["content"]["files"]
                damage = find_damage(f"{self._mirror.url}/{name}", files, self._mirror.sizes(name))
                if not damage:
                    return Artifact(stage, key, self.path(stage, key), manifest)
                problem = next(iter(damage.values()))
        except DamagedFileError as error:
            problem = error.message
        if problem and damaged is not None:
            damaged(problem)
        return None

    def _look_here(self, stage: str, key: str) -> Artifact | None:
        """The artifact in its folder; None where it is only half in the mirror, or goes meanwhile."""
        while self._is_there(stage, key):
            stamp = _stamp(self.path(stage, key) / MANIFEST)
            try:
                if not (self._mirror and self._unsent(stage, key).exists()):
                    return self._open(stage, key)
                if not self._holds(stage, key):
                    return None
                return self._send(self._mirror, stage, key)
            except DamagedFileError:
                if stamp == _stamp(self.path(stage, key) / MANIFEST) and self._is_there(stage, key):
                    raise  # else another process has replaced or removed it meanwhile
        return None

    def require(self, stage: str, key: str) -> Artifact:
        """The artifact with its files here, each compared with the manifest's sha256, once by each ``Store``.

        One that is damaged is set aside, which needs the lock of its key; from a damaged copy of what is in the mirror
        the mirror heals.

        Raises:
            MissingArtifactError: there is none that is whole.
            DamagedFileError: a file is damaged; the artifact is set aside, so that the next run builds it again.  Or a
                file lies in it that is none of its own: a stage might read it.
            EnvironmentFailure: the mirror cannot be read, or the cache not written.
        """
        while True:
            if (artifact := self.lookup(stage, key)) is None:
                place = f"{self.location}/{stage}/{key}"
                raise MissingArtifactError(f"{place} is missing or damaged; run the stage {stage} again")
            if self._mirror and (stage, key) not in self._whole:
                return self._bring(self._mirror, artifact)
            stamp, files = self._whole[stage, key][0], artifact.content["files"]
            if self._sound.get((stage, key)) == stamp:
                return artifact
            damage, strangers = examine(artifact.path, files)
            # what a file manager or a network mount leaves behind has such a name, and no stage reads it
            visible = [text for name, text in strangers.items() if not Path(name).name.startswith(".")]
            if damage:
                self._give_up(stage, key, stamp, sorted(damage.values()))
            elif visible:
                raise DamagedFileError(f"{stage} {key} has files that it was not written with; remove them", visible)
            else:
                self._sound[stage, key] = stamp

    def _give_up(self, stage: str, key: str, stamp: tuple[int, int], problems: list[str]) -> None:
        """Set the damaged artifact with this manifest aside, and say so where there is no other copy of it."""
        try:
            with self.lock(stage, key):
                if _stamp(self.path(stage, key) / MANIFEST) != stamp:
                    return  # another process has seen to it
                if self._mirror and not self._unsent(stage, key).exists():
                    self._set_aside_here(stage, key)
                    return
                aside = self.set_aside(stage, key)
        except (OSError, EnvironmentFailure) as error:  # others may use this store, and read it only
            text = f"{self.path(stage, key)} is damaged and cannot be set aside ({error}); remove it, then run {stage}"
            raise DamagedFileError(f"{text} again", problems) from error
        raise DamagedFileError(
            f"{stage} {key} is damaged; set aside as {aside}. The next run that needs it builds it again", problems
        )

    def _bring(self, mirror: Mirror, artifact: Artifact) -> Artifact:
        stage, key = artifact.stage, artifact.key
        with ArtifactLock(self.root / ".locks" / f"fetch-{stage}-{key}"):
            with contextlib.suppress(DamagedFileError):  # another process may have been first
                return self._open(stage, key)
            artifact = self._fetch(mirror, artifact)
        self._sound[stage, key] = self._whole[stage, key][0]
        return artifact

    def _fetch(self, mirror: Mirror, artifact: Artifact) -> Artifact:
        stage, key, files = artifact.stage, artifact.key, artifact.content["files"]
        part = artifact.path.with_name(f".fetch-{key}")
        part.mkdir(parents=True, exist_ok=True)
        for stranger in survey(part)[0].keys() - files.keys():
            (part / stranger).unlink()
        problems = mirror.fetch(f"{stage}/{key}", files, part)
        if problems and (problems := mirror.fetch(f"{stage}/{key}", files, part)):  # not only damaged on its way
            aside = self.set_aside(stage, key)
            shutil.rmtree(part)
            raise DamagedFileError(
                f"{stage} {key} is damaged in {mirror.url}; set aside as {aside}. Run the same command again: it "
                f"rebuilds {stage}",
                problems,
            )
        write_json(part / MANIFEST, dict(artifact.manifest))
        self._unsent(stage, key).unlink(missing_ok=True)
        return self._put_in_place(part, stage, key)

    def _open(self, stage: str, key: str) -> Artifact:
        path = self.path(stage, key)
        stamp, manifest = _stamp(path / MANIFEST), self.manifest(stage, key)
        with contextlib.suppress(OSError):  # of the build, which needs it until the artifact stands here
            discard(path / JOURNAL)
        sizes, others = survey(path)
        if MANIFEST in others:
            raise DamagedFileError(f"{path / MANIFEST} is a link, not a file")
        if damage := find_damage(path, manifest["content"]["files"], sizes):
            raise DamagedFileError(next(iter(damage.values())))
        self._whole[stage, key] = (stamp, Artifact(stage, key, path, manifest))
        return self._whole[stage, key][1]

    def manifest(self, stage: str, key: str) -> dict[str, Any]:
        """The manifest, checked to be as it was written and of this artifact; the files are not looked at.

        Raises:
            DamagedFileError: there is none, it is another's, or it was edited.
        """
        path = self.path(stage, key) / MANIFEST
        return check_manifest(read_json(path), str(path), stage, key)

    def _mirrored_manifest(self, mirror: Mirror, stage: str, key: str) -> dict[str, Any] | None:
        if (data := mirror.read(f"{stage}/{key}/{MANIFEST}")) is None:
            return None
        where = f"{mirror.url}/{stage}/{key}/{MANIFEST}"
        return check_manifest(parse_json(data, where), where, stage, key)

    def newest_manifests(self, stage: str) -> Iterator[dict[str, Any]]:
        """The manifests of a stage's artifacts, the newest first; damaged ones are left out."""
        files = [file for file in self.root.glob(f"{stage}/*/{MANIFEST}") if not file.parent.name.startswith(".")]
        for file in sorted(files, key=_stamp, reverse=True):
            with contextlib.suppress(DamagedFileError):
                yield self.manifest(stage, file.parent.name)

    def folders(self) -> Iterator[tuple[str, str]]:
        """(stage, key) of every artifact folder here and in the mirror, whole or damaged, sorted."""
        found = {(folder.parent.name, folder.name) for folder in self.root.glob("*/*/")}
        if self._mirror:
            found |= {(stage, key) for stage in self._mirror.names() for key in self._mirror.names(stage)}
        for stage, key in sorted(found):
            if not stage.startswith(".") and re.fullmatch(r"[0-9a-f]{20}", key):
                yield stage, key

    def artifacts(self, *, damaged: Callable[[str], None] | None = None) -> Iterator[Artifact]:
        """All whole artifacts, by stage and key; ``damaged`` hears what is wrong with each of the others."""
        for stage, key in self.folders():
            if artifact := self.lookup(stage, key, damaged=damaged):
                yield artifact

    def lock(
        self, stage: str, key: str, *, part: str = "", waiting: Callable[[str], None] | None = None
    ) -> ArtifactLock:
        """The lock that whoever builds, replaces or removes this artifact holds; see ``on_lost`` too.

        ``part``, such as ``3of8``, locks that part of the work alone; ``waiting`` is called once with a description of
        the holder when another holds it.
        """
        path = self.root / ".locks" / (f"{stage}-{key}.{part}" if part else f"{stage}-{key}")
        lock = ArtifactLock(path, waiting=waiting, lost=self.on_lost)
        if not part and not self._holds(stage, key):
            self._locks[stage, key] = lock
        return lock

    def _holds(self, stage: str, key: str) -> bool:
        """Whether a lock that this store handed out is held."""
        return (stage, key) in self._locks and self._locks[stage, key].is_held

    def mirror(self, stage: str, key: str) -> AbstractContextManager[object]:
        """Keep unfinished work safe from the loss of this machine while ``with`` lasts: a copy in the mirror."""
        return self._work_copy(self._mirror, stage, key) if self._mirror else contextlib.nullcontext()

    def _work_copy(self, mirror: Mirror, stage: str, key: str) -> WorkCopy:
        return WorkCopy(mirror, f"{stage}/.work-{key}", self.work_path(stage, key))

    def share(self, path: Path) -> None:
        """Put a file under ``root`` that is no artifact (a run's record) into the mirror too, or remove it there."""
        if self._mirror:
            name = path.relative_to(self.root).as_posix()
            if path.exists():
                self._mirror.put("", [name], self.root)
            else:
                self._mirror.remove(name)

    def work_path(self, stage: str, key: str) -> Path:
        """Where unfinished work of this key lies; it need not exist."""
        return self.root / stage / f".work-{key}"

    def has_work(self, stage: str, key: str) -> bool:
        """Whether there is unfinished work, here or in the mirror, that a build would continue."""
        is_here = any(not _is_temporary(name) for name in survey(self.work_path(stage, key))[0])
        return is_here or (self._mirror is not None and bool(self._work_copy(self._mirror, stage, key).index()))

    def work_dir(self, stage: str, key: str, *, fresh: bool = False) -> tuple[Path, bool]:
        """The folder to build in, and whether it holds earlier work, of another machine too; none if ``fresh``.

        Needs the lock.

        Raises:
            EnvironmentFailure: the mirror cannot be read and written.
        """
        path = self.work_path(stage, key)
        if self._mirror:
            self._mirror.check()
            copy = self._work_copy(self._mirror, stage, key)
            copy.drop() if fresh else copy.fetch()
        if fresh and path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        return path, self.has_work(stage, key)

    def keep_own_work(self, stage: str, key: str) -> list[str]:
        """Journal what is written into the work folder from now on, and set aside what no journal vouches for.

        Needs the lock; others may be writing parts meanwhile.

        Returns:
            What was set aside, by its name in the work folder; then a last line with the folder where it is.
        """
        work = self.work_path(stage, key)
        open_journal(work)
        strangers = _find_strangers(work)
        if not strangers:
            return []
        aside = self._unused_aside(stage, key)
        for name in strangers:
            with contextlib.suppress(FileNotFoundError):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).rename(aside / name)
        return [*strangers, str(aside)]

    def set_aside(self, stage: str, key: str) -> Path | str:
        """Rename a damaged artifact out of the way; returns where it is.  Needs the lock."""
        self._whole.pop((stage, key), None)
        if self._mirror and (data := self._mirror.read(f"{stage}/{key}/{MANIFEST}")) is not None:
            # the files there are replaced by the next build; without a manifest they are no artifact
            self._mirror.write(f"{stage}/.damaged-{key}.json", data)
            self._mirror.remove(f"{stage}/{key}/{MANIFEST}")
            if not self.path(stage, key).exists():
                return f"{self._mirror.url}/{stage}/.damaged-{key}.json"
        return self._set_aside_here(stage, key)

    def _set_aside_here(self, stage: str, key: str) -> Path:
        self._whole.pop((stage, key), None)
        return self.path(stage, key).rename(self._unused_aside(stage, key))

    def _unused_aside(self, stage: str, key: str) -> Path:
        targets = (self.root / stage / f".damaged-{key}-{number}" for number in itertools.count())
        return next(target for target in targets if not os.path.lexists(target))

    def publish(self, stage: str, key: str, *, content: Mapping[str, Any], run: Mapping[str, Any]) -> Artifact:
        """Turn the work folder into the artifact in one rename, replacing an older one, and mirror it.  Needs the lock.

        ``content`` has version, config, inputs and mask_supervision, to which schema, stage, key and files are added;
        ``run`` has times, host, packages, revision, metrics and warnings.

        Raises:
            EnvironmentFailure: the lock was lost meanwhile, or the mirror failed; then the artifact is whole here, and
                the next build of it only sends it.
            DamagedFileError: a file is not as its journal has it, or in none; the next build of it sets it aside.
        """
        if self._holds(stage, key):
            self._locks[stage, key].check_held()
        work = self.work_path(stage, key)
        (work / MANIFEST).unlink(missing_ok=True)
        content = {**content, "schema": SCHEMA, "stage": stage, "key": key, "files": _seal(work, stage)}
        manifest = {"content": content, "run": dict(run)}
        write_json(work / MANIFEST, {**manifest, "sha256": _digest(manifest)})
        for folder in [*(path for path in work.rglob("*") if path.is_dir()), work]:
            _sync_folder(folder)
        if self._mirror:
            self._unsent(stage, key).touch()
        artifact = self._put_in_place(work, stage, key)
        return self._send(self._mirror, stage, key) if self._mirror else artifact

    def _put_in_place(self, folder: Path, stage: str, key: str) -> Artifact:
        """Rename ``folder`` to the artifact, in the place of an older one."""
        final = self.path(stage, key)
        replaced = self._replaced(stage, key)
        discard(replaced)
        if os.path.lexists(final):
            final.rename(replaced)
        folder.rename(final)
        _sync_folder(final.parent)
        with contextlib.suppress(OSError):
            discard(replaced)
        return self._open(stage, key)

    def _is_there(self, stage: str, key: str) -> bool:
        """Whether there is a folder of the artifact; waits for a process that is just between its two renames."""
        end = time.monotonic() + _BETWEEN_RENAMES_S
        while not self.path(stage, key).is_dir():
            if not os.path.lexists(self._replaced(stage, key)) or time.monotonic() > end:
                return self.path(stage, key).is_dir()
            time.sleep(0.02)
        return True

    def _replaced(self, stage: str, key: str) -> Path:
        return self.root / stage / f".replaced-{key}"

    def _unsent(self, stage: str, key: str) -> Path:
        return self.root / stage / f".unsent-{key}"

    def _send(self, mirror: Mirror, stage: str, key: str) -> Artifact:
        """Put an artifact that is whole here into the mirror, in the place of its unfinished work there.

        Raises:
            DamagedFileError: it is not as it was written any more; nothing was sent.
        """
        artifact = self._open(stage, key)
        if damage := examine(artifact.path, artifact.content["files"])[0]:
            raise DamagedFileError(next(iter(damage.values())))
        del self._whole[stage, key]  # until it is there
        with contextlib.suppress(DamagedFileError):
            there = self._mirrored_manifest(mirror, stage, key)
            if there is not None and there["content"] != artifact.content:
                mirror.remove_folder(f"{stage}/{key}", first=MANIFEST)  # until the end there is no artifact
        mirror.put(f"{stage}/{key}", list(artifact.content["files"]), artifact.path)
        mirror.put(f"{stage}/{key}", [MANIFEST], artifact.path)
        self._unsent(stage, key).unlink(missing_ok=True)
        self._work_copy(mirror, stage, key).drop()
        return self._open(stage, key)

    def verify(self, stage: str, key: str) -> list[str]:
        """Read every file of an artifact, here and in the mirror, and compare it with the manifest; what is wrong.

        Nothing is wrong with an artifact that another process removes or replaces meanwhile.
        """
        problems, mirrored, path = [], None, self.path(stage, key)
        try:
            if self._mirror and (mirrored := self._mirrored_manifest(self._mirror, stage, key)):
                self.root.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=self.root, prefix=".verify-") as scratch:
                    problems += self._mirror.fetch(f"{stage}/{key}", mirrored["content"]["files"], Path(scratch))
        except DamagedFileError as error:
            problems.append(error.message)
        while path.exists():
            stamp = _stamp(path / MANIFEST)
            found = self._verify_here(stage, key)
            if not found or (stamp == _stamp(path / MANIFEST) and path.exists()):
                return problems + found
        return problems

    def _verify_here(self, stage: str, key: str) -> list[str]:
        path = self.path(stage, key)
        try:
            damage, strangers = examine(path, self.manifest(stage, key)["content"]["files"])
        except DamagedFileError as error:
            return [error.message]
        return sorted([*damage.values(), *strangers.values()])


def open_store(location: str | Path) -> Store:
    """The store at a folder, with ``file://`` or without, or at ``s3://bucket/folder`` and the like.

    Raises:
        InputError: a URL that cannot be a store, or a path that means nothing.
        EnvironmentFailure: a file stands where the folder should be.
    """
    location = str(location).removeprefix("file://")
    if re.match(rf"({'|'.join(DRIVERS)}):/[^/]", location):
        url = Mirror(location.replace(":/", "://", 1)).url  # which refuses credentials without repeating them
        raise InputError(f"{location} looks like a URL that lost a slash; write {url}")
    if "://" in location:
        url = Mirror(location).url
        base = os.environ.get("WSSS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wsss"
        name = re.sub(r"[^A-Za-z0-9.]+", "-", url.partition("://")[2])[:40].strip("-.")
        digest = hashlib.sha256(url.encode()).hexdigest()[:12]
        return Store(expand_path(base) / "artifacts" / f"{name}-{digest}", Mirror(url))
    root = expand_path(location)
    if root.exists() and not root.is_dir():
        raise EnvironmentFailure(f"{root} is no folder; choose another one with --artifacts DIR")
    return Store(root)


def check_manifest(manifest: Any, where: str, stage: str, key: str | None = None) -> dict[str, Any]:  # noqa: ANN401 - JSON is any
    """``manifest``, which stands at ``where``, if it is the one that was written for this artifact.

    Args:
        manifest: The parsed JSON.
        where: Names it in the error.
        stage: Whose it must be.
        key: The artifact's key; None for one of any key.

    Raises:
        DamagedFileError: it is of another layout, of another artifact, or was edited.
    """
    outside = list[str]()
    try:
        content = manifest["content"]
        is_ours = [content["schema"], content["stage"], content["key"]] == [SCHEMA, stage, key or content["key"]]
        is_ours &= isinstance(content["mask_supervision"], list) and isinstance(manifest["run"], dict)
        is_ours &= all({"size", "sha256"} <= entry.keys() for entry in content["files"].values())
        outside = [name for name in content["files"] if not is_inside(name)]
    except (KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise DamagedFileError(f"{where} does not describe {stage} {key or 'in this layout'}")
    if outside:
        raise DamagedFileError(f"{where} names a file outside of its artifact: {outside[0]!r}")
    if manifest.get("sha256") != _digest({name: value for name, value in manifest.items() if name != "sha256"}):
        raise DamagedFileError(f"{where} was edited: its content differs from its own sha256")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of ``manifest`` as canonical JSON; of what was written and of what is read back it is the same."""
    parsed = json.loads(json.dumps(manifest))  # keys as they come back: text
    text = json.dumps(parsed, sort_keys=True, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def examine(folder: Path, files: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """What is wrong with an artifact's files, and which there are beside them: name to one line; reads every byte."""
    sizes, others = survey(folder)
    damage = find_damage(folder, files, sizes)
    damage |= find_changes(folder, files, [name for name in files if name not in damage], folder)
    if MANIFEST in others:
        damage[MANIFEST] = f"{folder / MANIFEST} is a link, not a file"
    strangers = {
        name
        for name in (sizes.keys() | others) - files.keys() - {MANIFEST}
        if not (_is_of_the_system(name) or name.startswith(f"{JOURNAL}/"))
    }
    return damage, {name: f"{folder / name} is no file of this artifact" for name in sorted(strangers)}


def survey(folder: Path) -> tuple[dict[str, int], set[str]]:
    """Sizes in bytes of the regular files under ``folder``, and the names of what is neither file nor folder.

    Links are not followed, but for ``folder`` itself; a folder that cannot be read is among the others, and what
    another process removes meanwhile is left out.
    """
    sizes, others, waiting = dict[str, int](), set[str](), [""]
    while waiting:
        inner = waiting.pop()
        try:
            with os.scandir(folder / inner) as found:
                entries = list(found)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            others.add(inner.rstrip("/"))
            continue
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{inner}{entry.name}/")
                elif entry.is_file(follow_symlinks=False):
                    sizes[inner + entry.name] = entry.stat(follow_symlinks=False).st_size
                else:
                    others.add(inner + entry.name)
    return sizes, others


def _seal(work: Path, stage: str) -> dict[str, Any]:
    """Size and sha256 of every file of the finished work, by name; each is on the disk then, and halves are removed.

    Raises:
        DamagedFileError: something is neither file nor folder, or not as the journal of the work has it, where it has
            one.
    """
    sizes, others = survey(work)
    if others:
        raise DamagedFileError(f"{work / min(others)} is neither file nor folder; remove {work} and run {stage} again")
    vouched, files, strangers = read_journal(work), dict[str, Any](), list[str]()
    for name, size in sorted(sizes.items()):
        if name.startswith(f"{JOURNAL}/"):
            continue
        if _is_temporary(name):
            (work / name).unlink()  # half of an atomic write whose process was killed
            continue
        with (work / name).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        if vouched is None or (name, digest) in vouched:
            files[name] = {"size": size, "sha256": digest}
        elif _is_of_the_system(name):
            (work / name).unlink()
        else:
            strangers.append(name)
    if strangers:
        raise DamagedFileError(
            f"{work} has files that are not as {stage} wrote them: {strangers[0]}"
            f"{f' and {len(strangers) - 1:,} more' if strangers[1:] else ''}; run the same command again: it sets them "
            "aside and makes what is missing"
        )
    return files


def _find_strangers(work: Path) -> list[str]:
    """What in a work folder is not as a build of it has written it, sorted; reads every byte.

    Others may write meanwhile: a file is in the journal before it is there, so the files are listed first, and what
    does not fit is looked at again.
    """
    sizes, others = survey(work)
    names = [name for name in sizes if not (_is_temporary(name) or _is_of_the_system(name))]
    for _ in range(2):
        vouched = read_journal(work) or set()
        names = [name for name in names if (name, _digest_of(work / name)) not in vouched]
    return sorted({*names, *others} - {JOURNAL})


def _digest_of(file: Path) -> str:
    """The sha256 of a file; none that fits where it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


def discard(path: Path) -> None:
    """Remove a folder, a file, or a link without what it leads to; harmless when it is gone, or goes meanwhile."""
    while os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_of_the_system(name: str) -> bool:
    """Whether a file browser left it."""
    last = name.rpartition("/")[2]
    return last in (".DS_Store", "Thumbs.db", "desktop.ini") or last.startswith("._")


def _is_temporary(name: str) -> bool:
    """Whether it is half of an atomic write, or the journal of the work."""
    return name.startswith(f"{JOURNAL}/") or name.rpartition("/")[2].startswith(_TEMPORARY)


def _stamp(file: Path) -> tuple[int, int]:
    """When ``file`` was written, and its inode; zeros for one that another process has removed meanwhile."""
    with contextlib.suppress(OSError):
        found = file.stat()
        return found.st_mtime_ns, found.st_ino
    return 0, 0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
