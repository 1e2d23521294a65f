"""Check an archive for PASCAL VOC 2012's test server, whoever made it: everything that is wrong with it, at once.

Reads one .tar.gz, .tgz or .tar as a stream and decodes its PNGs; writes nothing, unpacks nothing.  The archive is not
trusted: what is read is bounded in bytes, members and pixels, and names are never used as paths.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image

from stages.contracts import IGNORE_INDEX, MASK_FORMATS, open_quietly, voc_palette
from stages.data.adapters.voc import VOC_CLASSES
from stages.errors import DataError
from stages.scoring.submission.archive import COMPETITIONS, NUM_VOC_TEST, Competition, result_folder
from stages.scoring.submission.reference import Expected, Size

MAX_MEMBER_BYTES = 4 << 20
"""Of one file: more than fifteen times what noise of 500 × 500 pixels takes as PNG."""

MAX_ARCHIVE_BYTES = 1 << 29
"""Of everything unpacked: more than 1,456 masks of noise take."""

MAX_MEMBERS = 10_000

_VOC_ID = re.compile(r"20\d\d_\d{6}")
_MAGICS = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
_UNREADABLE_ARCHIVE = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, struct.error, IndexError, KeyError)
"""What tarfile and gzip raise at damaged bytes."""

MAX_SIDE_PX = 500
"""The longer side of VOC's images is at most this; what is larger was not scaled back to the image's size."""

MAX_DECODED_PX = 1 << 24
"""A mask that says that it has more pixels is not decoded."""

_PNG_START = b"\x89PNG\r\n\x1a\n"
_UNREADABLE_PNG = (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, Image.DecompressionBombError)
"""What Pillow raises at damaged bytes."""

SHOWN = 5
"""Files of one kind of problem that are named."""

REMEDIES: dict[str, str] = {
    "wrong kind of file": "make it with `tar czf results.tar.gz results`",
    "not readable": "pack it again, and compare the sizes if it was copied",
    "too large": "pack the masks alone: together they stay far below 512 MiB, each below 4",
    "unsafe path": "pack from the folder that holds results/, with relative names",
    "link": "pack the files themselves (tar --dereference)",
    "no plain file": "pack the masks alone",
    "two competitions": "send one archive for each",
    "other member": "pack nothing but the masks, e.g. on macOS with COPYFILE_DISABLE=1",
    "duplicate name": "keep one of them",
    "missing image": "add its mask",
    "extra image": "remove it: it is not in the list",
    "wrong name": "a mask is called as its image, e.g. 2008_000006.png",
    "wrong count": "predict every image of ImageSets/Segmentation/test.txt",
    "no PNG": "save masks as PNG",
    "damaged PNG": "write it again",
    "wrong mode": "save class indices with VOC's palette (mode P), not colours, and without convert('P')",
    "wrong palette": "use VOC's 256 colours in VOC's order; the server reads the indices behind them",
    "wrong value": "the server knows 0 (background) to 20; a prediction has no void (255)",
    "wrong size": "a mask has the size of its image: undo padding and scaling",
}
"""What can be wrong, in the order of the report, with what to do."""


@dataclass
class Findings:
    """What was found in an archive; problems are counted by kind and the first few kept."""

    masks: dict[str, None] = field(default_factory=dict)
    """Ids of the masks in the archive's order."""
    competition: Competition | None = None
    sizes: set[Size] = field(default_factory=set)
    """Every size that a mask has."""
    num_unsized: int = 0
    """Masks whose image's size is not known."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of problems by kind."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, kind: str, text: str) -> None:
        """Count one problem."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.texts.setdefault(kind, [])
        if len(shown) < SHOWN:
            shown.append(text.encode(errors="backslashreplace").decode())

    def problems(self) -> list[str]:
        """One line for each kind: how many, the first few, what to do."""
        return [self._line(kind) for kind in REMEDIES if kind in self.counts]

    def raise_problems(self, path: Path, outcome: str = "") -> None:
        """End with all problems of the archive at ``path``, where there are any.

        Raises:
            DataError: there are.
        """
        count = sum(self.counts.values())
        if count:
            raise DataError(
                f"{path}: {count:,} problem{'s' if count > 1 else ''} in the archive{outcome}", self.problems()
            )

    def _line(self, kind: str) -> str:
        count, shown = self.counts[kind], self.texts[kind]
        more = f"; … {count - len(shown):,} more" if count > len(shown) else ""
        return f"{kind} ({count:,}): {'; '.join(shown)}{more}. {REMEDIES[kind][0].upper()}{REMEDIES[kind][1:]}"


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
        """Allow as much again as one member with its headers may have."""
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
    """Walk through the archive, as far as it can be read."""
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
    except _UNREADABLE_ARCHIVE as error:
        seen = f"after {len(found.masks):,} masks: " if found.masks else ""
        found.add("not readable", f"{name} {seen}{error or type(error).__name__}")


def _check_end(bounded: _Bounded, name: str, found: Findings) -> None:
    """Read what follows the last member: only zeros may, and gzip checks its sum there."""
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
    found.sizes.update(filter(None, [_png_size(data)]))
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
    """Warn of what is allowed here but hardly intended."""
    if expected.ids is not None and len(set(expected.ids)) != NUM_VOC_TEST:
        found.warnings.append(
            f"the list has {len(set(expected.ids)):,} images, VOC2012's test list has {NUM_VOC_TEST:,}: "
            "the server takes only an archive of these"
        )
    if expected.size_of and found.num_unsized:
        found.warnings.append(f"masks without an image to compare their size with: {found.num_unsized:,}")
    if found.num_unsized > 1 and len(found.sizes) == 1:
        text = f"all masks are {_spell_size(*found.sizes)}; VOC's images differ: are these the sizes of the images?"
        found.warnings.append(text)


# ---------------------------------------------------------------------------------------------------------------------
# One mask
# ---------------------------------------------------------------------------------------------------------------------


def check_mask(data: bytes, size: Size | None = None) -> Iterator[tuple[str, str]]:
    """Everything that is wrong with one mask, as (kind, what was found).

    Args:
        data: The bytes of the PNG.
        size: (height, width) of its image; None where that is not known.
    """
    found = _png_size(data)
    if found is None:
        yield "no PNG", f"starts with {data[:4]!r}"
        return
    yield from _check_size(found, size)
    if found[0] * found[1] > MAX_DECODED_PX:
        if found == size:
            yield "wrong size", f"is {_spell_size(found)} as its image, too large to be looked at"
        return
    try:
        with open_quietly(io.BytesIO(data), MASK_FORMATS) as image:
            image.load()
            yield from _check_pixels(image)
    except _UNREADABLE_PNG as error:
        yield "damaged PNG", f"({error})"


def _png_size(data: bytes) -> Size | None:
    """What the PNG's header says; None where there is none.  Pillow sees nothing before its size is known."""
    if not data.startswith(_PNG_START) or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    return height, width


def _check_size(found: Size, size: Size | None) -> Iterator[tuple[str, str]]:
    if size is not None and found != size:
        yield "wrong size", f"is {_spell_size(found)}, its image {_spell_size(size)}"
    if size is None and max(found) > MAX_SIDE_PX:
        yield "wrong size", f"is {_spell_size(found)}, VOC's images have at most {MAX_SIDE_PX} a side"


def _spell_size(size: Size) -> str:
    """Width and height for people."""
    return f"{size[1]} × {size[0]} (width × height)"


def _check_pixels(image: Image.Image) -> Iterator[tuple[str, str]]:
    if image.mode != "P":
        yield "wrong mode", f"has mode {image.mode}"
        return
    values = [value for value, count in enumerate(image.histogram()) if count]
    wrong = [value for value in values if value > len(VOC_CLASSES)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        void = " (void)" if IGNORE_INDEX in wrong[:3] else ""
        yield "wrong value", f"has {', '.join(map(str, wrong[:3]))}{more}{void}"
    colours = bytes(image.getpalette("RGB") or ())
    for value, name in enumerate(("background", *VOC_CLASSES)):
        found, right = colours[3 * value : 3 * value + 3], voc_palette()[value].tobytes()
        if found != right and (found or value in values):  # a palette may end before a class that does not occur
            yield "wrong palette", f"shows {name} ({value}) as {tuple(found) or 'nothing'}, VOC's is {tuple(right)}"
            return
