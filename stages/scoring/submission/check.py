"""Check an archive for PASCAL VOC 2012's test server, whoever made it: everything that is wrong with it, at once.

Reads one .tar.gz, .tgz or .tar as a stream and decodes its PNGs; writes nothing, unpacks nothing.  The archive is not
trusted: what is read is bounded in bytes, members and pixels, and names are never used as paths.
"""

from __future__ import annotations

import gzip
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from stages.scoring.submission.archive import COMPETITIONS, NUM_VOC_TEST, Competition, result_folder
from stages.scoring.submission.findings import Findings
from stages.scoring.submission.masks import check_mask, png_size, spell_size
from stages.scoring.submission.reference import Expected

MAX_MEMBER_BYTES = 4 << 20
"""Of one file: more than fifteen times what noise of 500 × 500 pixels takes as PNG."""

MAX_ARCHIVE_BYTES = 1 << 29
"""Of everything unpacked: more than 1,456 masks of noise take."""

MAX_MEMBERS = 10_000

_VOC_ID = re.compile(r"20\d\d_\d{6}")
_MAGICS = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
_UNREADABLE = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, struct.error, IndexError, KeyError)
"""What tarfile and gzip raise at damaged bytes."""


def check_archive(path: Path, expected: Expected | None = None) -> Findings:
    """Read the archive at ``path`` and collect everything that the server would refuse or score wrongly.

    Args:
        path: The file.
        expected: The list, sizes and competition that it should fit.

    Raises:
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        return check_stream(file, path.name, expected or Expected())


def check_stream(file: IO[bytes], name: str, expected: Expected) -> Findings:
    """The same for an open file that would be called ``name``."""
    found = Findings(competition=expected.competition)
    kind = _kind_of(file)
    wanted = "gzip" if name.endswith((".tar.gz", ".tgz")) else "tar" if name.endswith(".tar") else None
    if wanted is None:
        found.add("wrong kind of file", f"{name}: expected a name that ends in .tar.gz, .tgz or .tar")
    if kind != (wanted or kind):
        found.add("wrong kind of file", f"{name} holds {kind}, not {wanted}")
    if kind not in ("gzip", "tar"):
        if wanted is None:
            found.add("wrong kind of file", f"{name} holds {kind}")
        return found
    _read_members(gzip.GzipFile(fileobj=file) if kind == "gzip" else file, name, expected, found)
    _compare_names(expected, found)
    _warn(expected, found)
    return found


def _kind_of(file: IO[bytes]) -> str:
    start = file.read(512)
    file.seek(0)
    for magic, kind in _MAGICS.items():
        if start.startswith(magic):
            return kind
    if start[257:262] == b"ustar" or _has_tar_checksum(start):
        return "tar"
    return "nothing" if not start else "something else"


def _has_tar_checksum(start: bytes) -> bool:
    """Whether this is the header of a tar from before 1988, which has no magic."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The stream
# ---------------------------------------------------------------------------------------------------------------------


class _TooMuchError(Exception):
    """The archive unpacks to more than it may."""


class _Bounded:
    """A stream that ends with an error instead of filling the memory."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile) -> None:
        self._stream = stream
        self._total = 0
        self._step = 0

    def next_member(self) -> None:
        """Let as much be read again as one member with its headers may have."""
        self._step = 0

    def read(self, count: int) -> bytes:
        """At most ``count`` bytes."""
        data = self._stream.read(count)
        self._total += len(data)
        self._step += len(data)
        if self._total > MAX_ARCHIVE_BYTES or self._step > 2 * MAX_MEMBER_BYTES:
            raise _TooMuchError
        return data


def _read_members(stream: IO[bytes] | gzip.GzipFile, name: str, expected: Expected, found: Findings) -> None:
    """Walk through the archive; stops where it cannot be read on."""
    bounded = _Bounded(stream)
    try:
        with tarfile.open(fileobj=bounded, mode="r|") as archive:  # pyright: ignore[reportCallIssue, reportArgumentType] - read is all it needs
            for number, member in enumerate(archive):
                bounded.next_member()
                if number == MAX_MEMBERS:
                    found.add("too large", f"{name} has more than {MAX_MEMBERS:,} members; the rest was not read")
                    return
                if member.size > MAX_MEMBER_BYTES:
                    text = f"{member.name} has {member.size:,} bytes; what comes after it was not read"
                    found.add("too large", text)
                    return
                _check_member(archive, member, expected, found)
        _check_end(bounded, name, found)
    except _TooMuchError:
        found.add("too large", f"{name} unpacks to more than it may; the rest was not read")
    except _UNREADABLE as error:
        seen = f"after {len(found.masks):,} masks: " if found.masks else ""
        found.add("not readable", f"{name} {seen}{error or type(error).__name__}")


def _check_end(bounded: _Bounded, name: str, found: Findings) -> None:
    """Read what is behind the last member: only zeros may be, and gzip checks its sum there."""
    while data := bounded.read(1 << 16):
        bounded.next_member()
        if data.strip(b"\0"):
            found.add("not readable", f"{name} has bytes behind its end, or a damaged header")
            return


def _check_member(archive: tarfile.TarFile, member: tarfile.TarInfo, expected: Expected, found: Findings) -> None:
    path = member.name.removeprefix("./")
    if path.startswith("/") or ".." in PurePosixPath(path).parts or "\\" in path:
        found.add("unsafe path", f"'{member.name}'")
    elif member.islnk() or member.issym():
        found.add("link", f"{path} → {member.linkname}")
    elif member.isdir():
        if path not in ("", ".", *_allowed_folders()):
            found.add("other member", f"{path}/")
    elif not member.isreg() or member.issparse():
        found.add("no plain file", path)
    else:
        _check_file(archive, member, path, expected, found)


def _allowed_folders() -> Iterator[str]:
    for competition in COMPETITIONS:
        folder = PurePosixPath(result_folder(competition))
        yield from (str(part) for part in (folder, *folder.parents))


def _check_file(
    archive: tarfile.TarFile, member: tarfile.TarInfo, path: str, expected: Expected, found: Findings
) -> None:
    folder, _, file_name = path.rpartition("/")
    competition: Competition | None = next((c for c in COMPETITIONS if folder == result_folder(c)), None)
    if competition is None or not file_name.endswith(".png") or file_name.startswith("."):
        found.add("other member", path)
        return
    found.competition = found.competition or competition
    if competition != found.competition:
        found.add("two competitions", f"{path}, expected {found.competition}")
        return
    image_id = file_name.removesuffix(".png")
    if image_id in found.masks:
        found.add("duplicate name", file_name)
    found.masks[image_id] = None
    reader = archive.extractfile(member)
    data = reader.read() if reader else b""
    size = expected.size_of(image_id) if expected.size_of else None
    found.num_unsized += size is None
    found.sizes.update(filter(None, [png_size(data)]))
    for kind, text in check_mask(data, size):
        found.add(kind, f"{file_name} {text}")


# ---------------------------------------------------------------------------------------------------------------------
# All names
# ---------------------------------------------------------------------------------------------------------------------


def _compare_names(expected: Expected, found: Findings) -> None:
    """Names against the list, or against VOC's way of naming; the count only where the archive was read to its end."""
    is_whole = not {"not readable", "too large"} & set(found.counts)
    if expected.ids is None:
        _add_all(found, "wrong name", (name for name in found.masks if not _VOC_ID.fullmatch(name)), "no image of VOC")
        if is_whole and len(found.masks) != NUM_VOC_TEST:
            found.add("wrong count", f"{len(found.masks):,} masks, VOC2012's test list has {NUM_VOC_TEST:,} images")
        return
    listed = set(expected.ids)
    if is_whole:
        _add_all(found, "missing image", (name for name in expected.ids if name not in found.masks))
    _add_all(found, "extra image", (name for name in found.masks if name not in listed))


def _add_all(found: Findings, kind: str, names: Iterable[str], text: str = "") -> None:
    for name in names:
        found.add(kind, f"{name}.png {text}".rstrip())


def _warn(expected: Expected, found: Findings) -> None:
    """Say what is allowed here and hardly meant."""
    if expected.ids is not None and len(set(expected.ids)) != NUM_VOC_TEST:
        found.warnings.append(
            f"the list has {len(set(expected.ids)):,} images, VOC2012's test list has {NUM_VOC_TEST:,}: "
            "the server takes only an archive of these"
        )
    if expected.size_of and found.num_unsized:
        found.warnings.append(f"masks without an image to compare their size with: {found.num_unsized:,}")
    if found.num_unsized > 1 and len(found.sizes) == 1:
        text = f"all masks are {spell_size(*found.sizes)}; VOC's images differ: are these the sizes of the images?"
        found.warnings.append(text)
