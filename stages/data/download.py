"""Fetch PASCAL VOC 2012 and SBD, unpack them safely, and make trainaug.

Reads: two archives, from the public servers or from where the user put them.
Writes: the archives, ``VOCdevkit/VOC2012`` and ``benchmark_RELEASE`` below the given folder.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import shutil
import socket
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stages.contracts import IMAGE_SUFFIXES, MASK_SUFFIXES, Progress
from stages.data.readers import files_by_id, read_id_list
from stages.data.records import Problems
from stages.data.sbd import NUM_TRAINAUG, convert_sbd
from stages.errors import EnvironmentFailure, InputError

_FREE_BYTES = 8 * 1024**3
"""Both archives (3.4 GB) and what they unpack to."""

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Archive:
    """A public archive."""

    name: str
    url: str
    md5: str


VOC_ARCHIVE = Archive(
    "VOCtrainval_11-May-2012.tar",
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "6cd6e144f989b92b3379bac3b3de84fd",
)
SBD_ARCHIVE = Archive(
    "benchmark.tgz",
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    "82b4d87ceb2ed10f6038a1cba92111cb",
)
"""Names, places and md5s as torchvision's VOCSegmentation and SBDataset have them (a test compares)."""


def fetch_voc(
    directory: Path,
    progress: Progress,
    *,
    voc_archive: Archive = VOC_ARCHIVE,
    sbd_archive: Archive = SBD_ARCHIVE,
    expected: int = NUM_TRAINAUG,
) -> Path:
    """Have VOC 2012 with trainaug below ``directory``; what is there already is not fetched or unpacked again.

    An archive that the user put into ``directory`` by hand is used when its md5 is right.

    Args:
        directory: Where everything goes; made when absent.
        progress: Says what is being done.
        voc_archive: VOC's training and validation data.
        sbd_archive: The Semantic Boundaries Dataset.
        expected: Images that trainaug must have.

    Returns:
        The folder VOCdevkit/VOC2012, for ``data.root``.

    Raises:
        InputError: no network, a wrong archive, or no folder; says what to fetch by hand and where to put it.
        EnvironmentFailure: too little disk.
        OSError: the disk became full.
        DataError: the unpacked data are not complete.
    """
    root = directory / "VOCdevkit" / "VOC2012"
    if (root / "ImageSets/Segmentation/trainaug.txt").is_file() and _has_voc(root):
        progress.info(f"{root} is complete")
        return root
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{directory}: is a file or lies below one; name a folder") from error
    if not _has_voc(root):
        _unpack(directory, voc_archive, (voc_archive, sbd_archive), progress)
    if not _has_sbd(directory):
        _unpack(directory, sbd_archive, (sbd_archive,), progress)
        (directory / "benchmark_RELEASE" / ".unpacked").touch()
    progress.info("making trainaug from SBD")
    count = convert_sbd(directory, root, progress, expected=expected)
    progress.info(f"{root} has trainaug with {count:,} images; set data.root={root}")
    return root


def _has_voc(root: Path) -> bool:
    """Whether every image and mask of VOC's train and val lists is there."""
    images = files_by_id(root, "JPEGImages", IMAGE_SUFFIXES, Problems())
    masks = files_by_id(root, "SegmentationClass", MASK_SUFFIXES, Problems())
    for name in ("train", "val"):
        listed = read_id_list(root / f"ImageSets/Segmentation/{name}.txt", name, Problems())
        if listed is None or not listed.ids:
            return False
        if not all(i in images and i in masks for i in listed.ids):
            return False
    return (root / "Annotations").is_dir()


def _has_sbd(directory: Path) -> bool:
    """Whether SBD was unpacked to its end by us, or unpacked here by hand in another layout."""
    unpacked = (directory / "benchmark_RELEASE" / ".unpacked").is_file()
    return unpacked or (directory / "cls").is_dir() or (directory / "dataset/cls").is_dir()


def _unpack(directory: Path, archive: Archive, wanted: Sequence[Archive], progress: Progress) -> None:
    path = directory / archive.name
    if not path.is_file():
        _check_disk(directory)
        progress.info(f"fetching {archive.url}")
        _download(directory, archive, wanted)
    progress.info(f"checking and unpacking {path}")
    if _md5(path) != archive.md5:
        raise InputError(
            f"{path}: its md5 is not {archive.md5}: the file is incomplete or another one; "
            f"delete it and run again, or fetch {archive.url} by hand"
        )
    try:
        with tarfile.open(path) as tar:
            # "data" refuses absolute names, names that leave the folder, links out of it, and devices
            tar.extractall(directory, filter="data")
    except tarfile.TarError as error:
        raise InputError(f"{path}: cannot be unpacked safely ({error}); fetch {archive.url} again") from error


def _check_disk(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _FREE_BYTES:
        text = f"{directory}: {free / 1024**3:.1f} GiB free, VOC and SBD need {_FREE_BYTES / 1024**3:.0f} GiB"
        raise EnvironmentFailure(f"{text}; free some or name another folder")


def _download(directory: Path, archive: Archive, wanted: Sequence[Archive]) -> None:
    from torchvision.datasets.utils import download_url

    part = directory / f"{archive.name}.part"  # a stopped download never looks like a whole one
    try:
        with _timeout():
            download_url(archive.url, str(directory), filename=part.name, md5=archive.md5)
        part.replace(directory / archive.name)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        missing = [item for item in wanted if not (directory / item.name).is_file()]
        raise InputError(
            f"could not fetch {archive.name} ({error}); without a network, put these files into {directory} and "
            "run the same command again:",
            [f"{item.url} (md5 {item.md5})" for item in missing],
        ) from error


@contextmanager
def _timeout() -> Iterator[None]:
    """A server that stops answering is an error after a minute; torchvision's loader would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
