"""The files of one artifact between the object store and the cache, each compared with its manifest.

Reads and writes ``<url>/<stage>/<key>/`` and ``<cache>/<stage>/<key>/``.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.store.artifacts import MANIFEST, Artifact
from pipeline.store.object_store import ObjectFolder, in_parallel
from stages.contracts import write_json
from stages.errors import DamagedFileError, EnvironmentFailure


def check_sizes(objects: ObjectFolder, artifact: Artifact) -> None:
    """Every file is in the store in its size.

    Raises:
        DamagedFileError: one is missing, or another size.
    """
    folder = _folder(artifact)
    sizes = objects.sizes(folder)
    for name, entry in artifact.content["files"].items():
        if name not in sizes:
            raise DamagedFileError(f"{objects}/{folder}/{name} is missing")
        if sizes[name] != entry["size"]:
            raise DamagedFileError(f"{objects}/{folder}/{name} has {sizes[name]} bytes instead of {entry['size']}")


def send_files(objects: ObjectFolder, artifact: Artifact) -> None:
    """Send up all files but the manifest, whatever is there: it may be damaged.

    Raises:
        EnvironmentFailure: the store failed.
    """
    folder, files = _folder(artifact), artifact.content["files"]
    in_parallel(lambda name: objects.send(artifact.path / name, f"{folder}/{name}"), files)
    check_sizes(objects, artifact)
    for stranger in objects.sizes(folder).keys() - files.keys():
        objects.remove(f"{folder}/{stranger}")


def fetch_artifact(objects: ObjectFolder, artifact: Artifact) -> None:
    """Bring the files to ``artifact.path``, all or none; what a cut-off call has brought whole is kept.

    Raises:
        DamagedFileError: a file is missing or differs from the manifest.
        EnvironmentFailure: the store failed, or the disk is full.
    """
    final = artifact.path
    part, replaced = final.with_name(f".fetch-{artifact.key}"), final.with_name(f".replaced-{artifact.key}")
    files = artifact.content["files"]
    _check_space(artifact)
    in_parallel(lambda name: _fetch_file(objects, f"{_folder(artifact)}/{name}", part / name, files[name]), files)
    for stranger in {path for path in part.rglob("*") if path.is_file()} - {part / name for name in files}:
        stranger.unlink()
    write_json(part / MANIFEST, dict(artifact.manifest))
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    part.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def verify_files(objects: ObjectFolder, artifact: Artifact) -> list[str]:
    """Read every file in the store; what is wrong, file by file, sorted."""
    problems: list[str] = []
    folder, files = _folder(artifact), artifact.content["files"]
    in_parallel(lambda name: problems.extend(_verify_file(objects, f"{folder}/{name}", files[name])), files)
    return sorted(problems)


def _folder(artifact: Artifact) -> str:
    return f"{artifact.stage}/{artifact.key}"


def _check_space(artifact: Artifact) -> None:
    cache = artifact.path.parent
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < artifact.size_bytes:
        raise EnvironmentFailure(
            f"{cache}: {free / 2**20:.0f} MB free, {artifact.size_bytes / 2**20:.0f} MB are needed; remove old folders "
            "of the cache, or set WSSS_CACHE to a folder on another disk"
        )


def _fetch_file(objects: ObjectFolder, name: str, file: Path, expected: Mapping[str, Any]) -> None:
    wanted = (expected["size"], expected["sha256"])
    if file.is_file() and _describe(file) == wanted:
        return
    try:
        objects.fetch(name, file)
    except FileNotFoundError:
        raise DamagedFileError(f"{objects}/{name} is missing") from None
    found = _describe(file)
    if found != wanted:
        file.unlink()
        raise DamagedFileError(
            f"{objects}/{name}: expected {wanted[0]} bytes with sha256 {wanted[1]}, found {found[0]} bytes with "
            f"{found[1]}; build it anew with --force {name.partition('/')[0]}"
        )


def _describe(file: Path) -> tuple[int, str]:
    """Size in bytes and sha256."""
    with file.open("rb") as stream:
        return file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def _verify_file(objects: ObjectFolder, name: str, expected: Mapping[str, Any]) -> list[str]:
    digest, size = hashlib.sha256(), 0
    try:
        for block in objects.blocks(name):
            digest.update(block)
            size += len(block)
    except FileNotFoundError:
        return [f"{objects}/{name} is missing"]
    if size != expected["size"]:
        return [f"{objects}/{name} has {size} bytes instead of {expected['size']}"]
    if digest.hexdigest() != expected["sha256"]:
        return [f"{objects}/{name}: the content differs from the manifest's sha256"]
    return []
