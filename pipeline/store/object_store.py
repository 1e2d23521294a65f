"""One folder of an object store (s3, gs, …) through fsspec: whole objects in and out, and each failure in one line.

Needs the driver of the URL's protocol (``pip install 'wsss-pipeline[s3]'``), which is imported at the first access.
Endpoint and credentials come from the driver's own variables and files; nothing here reads, keeps or prints them.
Listings are never cached: other machines write too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stages.errors import EnvironmentFailure, InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Protocol → the extra of this distribution that installs its driver."""

PROTOCOLS = ("s3", "s3a", "gs", "gcs", "abfs", "az", "memory")
"""Stores that create an object exclusively, in one request; without that no lock can be made of objects."""

NUM_TRANSFERS = 8
"""Files that travel at the same time."""

_Item = TypeVar("_Item")


def is_url(location: str) -> bool:
    """Whether ``location`` names a store by a URL and not a folder.

    Raises:
        InputError: it was a URL and lost a slash on its way through a path.
    """
    if re.match(rf"({'|'.join(PROTOCOLS)}):/[^/]", location):
        raise InputError(f"{location} looks like a URL that lost a slash; write {location.replace(':/', '://', 1)}")
    return "://" in location


class ObjectFolder:
    """The objects under one URL, by names relative to it (``make_masks/<key>/manifest.json``)."""

    def __init__(self, url: str) -> None:
        """Name the folder; nothing is imported and nothing asked yet.

        Raises:
            InputError: a protocol that cannot hold a store, or credentials in the URL.
        """
        protocol, _, rest = url.partition("://")
        if protocol not in PROTOCOLS:
            raise InputError(
                f"{protocol}:// cannot hold artifacts, since it has no exclusive create for the locks; use one of "
                f"{', '.join(f'{name}://' for name in PROTOCOLS[:-1])}, or mount it and give the folder"
            )
        if "@" in rest.partition("/")[0] and protocol not in ("abfs", "az"):
            raise InputError(
                f"{protocol}://…: credentials do not belong into a URL; set the driver's variables instead"
            )
        if not rest.strip("/"):
            raise InputError(f"{protocol}://: the bucket is missing; write {protocol}://BUCKET/FOLDER")
        self.url = f"{protocol}://{rest.strip('/')}"
        self._protocol = protocol

    def __str__(self) -> str:
        """The URL."""
        return self.url

    @cached_property
    def _access(self) -> tuple[AbstractFileSystem, str]:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise _no_driver(self._protocol) from error
        with self._explained(""):
            return url_to_fs(self.url, use_listings_cache=False)

    def _path(self, name: str) -> str:
        return f"{self._access[1]}/{name}".rstrip("/")

    # -- one object ---------------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """What is in an object; None when there is none."""
        with self._explained(name):
            try:
                return bytes(self._access[0].cat_file(self._path(name)))  # pyright: ignore[reportArgumentType]
            except FileNotFoundError as error:
                if _is_bucket(error):
                    raise
                return None

    def write(self, name: str, data: bytes) -> None:
        """Make or replace an object."""
        with self._explained(name):
            self._access[0].pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Make an object that was not there; False when another was first.  ``data`` must be unlike anybody else's."""
        with self._explained(name):
            try:
                self._access[0].pipe_file(self._path(name), data, mode="create")
            except Exception:
                # refused, in whatever words; or made by a request whose answer was lost and which was sent again
                found = self.read(name)
                if found is None:
                    raise
                return found == data
        return True

    def send(self, file: Path, name: str) -> None:
        """Copy a local file up; the object is there whole or not at all."""
        with self._explained(name):
            self._access[0].put_file(str(file), self._path(name))

    def fetch(self, name: str, file: Path) -> None:
        """Copy an object down.

        Raises:
            FileNotFoundError: there is none.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._explained(name, passing=FileNotFoundError):
            self._access[0].get_file(self._path(name), str(file))

    def blocks(self, name: str, size_bytes: int = 2**22) -> Iterator[bytes]:
        """The content of an object piece by piece.

        Raises:
            FileNotFoundError: there is none.
        """
        with (
            self._explained(name, passing=FileNotFoundError),
            self._access[0].open(self._path(name), "rb", block_size=size_bytes) as stream,
        ):
            while block := stream.read(size_bytes):
                yield bytes(block)  # pyright: ignore[reportArgumentType]

    def remove(self, name: str) -> None:
        """Remove an object; harmless when it is not there."""
        with self._explained(name), contextlib.suppress(FileNotFoundError):
            self._access[0].rm_file(self._path(name))

    # -- many ---------------------------------------------------------------------------------------------------------

    def children(self, folder: str = "") -> list[str]:
        """Names directly under ``folder``, without what is below them, sorted."""
        with self._explained(folder):
            try:
                paths = self._access[0].ls(self._path(folder), detail=False)
            except FileNotFoundError as error:
                if _is_bucket(error):
                    raise
                return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def sizes(self, folder: str) -> dict[str, int]:
        """Size in bytes of every object under ``folder``, by its name relative to that."""
        start = f"{self._path(folder)}/"
        with self._explained(folder):
            try:
                found: Any = self._access[0].find(start, detail=True)
            except FileNotFoundError as error:
                if _is_bucket(error):
                    raise
                return {}
        return {path.removeprefix(start): entry["size"] for path, entry in sorted(found.items()) if path != start}

    def remove_folder(self, folder: str) -> None:
        """Remove every object under ``folder``."""
        in_parallel(lambda name: self.remove(f"{folder}/{name}"), self.sizes(folder))

    # -- failures -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _explained(self, name: str, *, passing: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """One clear line for whatever the driver raises; ``passing`` goes through where it is not about the bucket."""
        try:
            yield
        except (EnvironmentFailure, InputError):
            raise
        except Exception as error:
            if isinstance(error, passing) and not _is_bucket(error):
                raise
            if _is_local(error):  # of the file beside it: a full disk has its own words
                raise
            raise self._explain(error, name) from error

    def _explain(self, error: Exception, name: str) -> EnvironmentFailure:
        where = f"{self.url}/{name}".rstrip("/")
        kind = type(error).__name__
        if isinstance(error, ImportError):
            return _no_driver(self._protocol)
        if _is_bucket(error) or isinstance(error, FileNotFoundError):
            return EnvironmentFailure(f"{where}: the bucket does not exist; make it, or correct --artifacts")
        if "Credential" in kind or "AuthenticationError" in kind:
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or what your store's driver reads"
            return EnvironmentFailure(f"{where}: no credentials were found; {remedy}")
        if isinstance(error, PermissionError):
            return EnvironmentFailure(
                f"{where}: access was denied ({_words(error)}); check which credentials this machine uses and that "
                "they may list, read, write and delete there"
            )
        if isinstance(error, (ConnectionError, TimeoutError)) or re.search("Connect|Timeout|Endpoint", kind):
            return EnvironmentFailure(
                f"{where}: the store does not answer ({_words(error)}); check the network and the endpoint "
                "(AWS_ENDPOINT_URL), then run the same command again"
            )
        return EnvironmentFailure(f"{where}: the store failed ({kind}: {_words(error)}); run the same command again")


def in_parallel(action: Callable[[_Item], object], items: Iterable[_Item]) -> None:
    """Do ``action`` for every item, several at a time; the first error ends it."""
    with ThreadPoolExecutor(NUM_TRANSFERS, thread_name_prefix="transfer") as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _no_driver(protocol: str) -> EnvironmentFailure:
    package = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}.get(protocol, "fsspec")
    package = f"'wsss-pipeline[{EXTRAS[protocol]}]'" if protocol in EXTRAS else package
    return EnvironmentFailure(f"{protocol}://: the driver is not installed; pip install {package}")


def _is_bucket(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) and "bucket does not exist" in str(error).lower()


def _is_local(error: Exception) -> bool:
    """Whether it is about a file of this machine: the drivers' errors carry no file name of ours."""
    return isinstance(error, OSError) and isinstance(error.filename, str) and Path(error.filename).is_absolute()


def _words(error: Exception) -> str:
    """The driver's own words on one line, without what a URL may carry before its host."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"//[^/@\s]+@", "//", text)[:300]
