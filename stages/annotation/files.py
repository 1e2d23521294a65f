"""Read what an annotation tool wrote, whoever hands it over: a file, a folder, or a zip.

Nothing is unpacked to the disk, XML may declare no entities, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from stages.errors import DataError, InputError

_MOST_BYTES = 2**31
"""What the files of one annotation may hold together."""

_SHOWN = 20
"""Problems that an error names; it says how many there are."""


class FileModel(BaseModel):
    """A part of a tool's JSON: what we read of it; tools write more."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


_Content = TypeVar("_Content")


def some_problems(problems: Sequence[str]) -> list[str]:
    """The first problems, and how many more there are."""
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([f"and {more:,} more"] if more > 0 else [])]


def read_files(source: Path, suffixes: Sequence[str]) -> dict[str, bytes]:
    """The files of ``source`` that end so, by their path in it.

    Args:
        source: A file, a folder, or a zip.
        suffixes: Such as ``.json``, lower case; a file that is named itself may end as it likes.

    Raises:
        InputError: it is not there, holds no such file or too much, or is a zip that is damaged or has paths that lead
            out of it.
    """
    try:
        if source.is_dir():
            paths = sorted(path for path in source.rglob("*") if path.is_file() and _ends(path.name, suffixes))
            _check_bytes(source, sum(path.stat().st_size for path in paths))
            found = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
        elif zipfile.is_zipfile(source):
            found = _read_zip(source, suffixes)
        else:
            _check_bytes(source, source.stat().st_size)
            found = {source.name: source.read_bytes()}
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); name a file, a folder or a zip") from error
    if not found:
        raise InputError(f"{source}: expected {' or '.join(suffixes)} in it, found none; see --format")
    return found


def read_only_file(source: Path, suffix: str) -> tuple[str, bytes]:
    """The name and the bytes of the one file of ``source`` that ends so.

    Raises:
        InputError: as ``read_files``, or there are several.
    """
    found = read_files(source, [suffix])
    if len(found) > 1:
        raise InputError(f"{source}: expected one {suffix}, found {len(found)}; name the one", some_problems([*found]))
    ((name, data),) = found.items()
    return (str(source) if name == source.name else f"{source}: {name}"), data


def _ends(name: str, suffixes: Sequence[str]) -> bool:
    return name.lower().endswith(tuple(suffixes)) and not name.startswith(".")


def _check_bytes(source: Path, size: int) -> None:
    if size > _MOST_BYTES:
        raise InputError(f"{source}: holds {size / 2**30:.1f} GiB of annotations, expected at most 2; split it")


def _read_zip(source: Path, suffixes: Sequence[str]) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(source) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            unsafe = [member.filename for member in members if not _is_inside(member.filename)]
            if unsafe:
                raise InputError(f"{source}: has paths that lead out of it; pack it anew", some_problems(unsafe))
            wanted = [member for member in members if _ends(PurePosixPath(member.filename).name, suffixes)]
            _check_bytes(source, sum(member.file_size for member in wanted))
            return {member.filename: archive.read(member) for member in wanted}
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:  # damaged, encrypted, unknown
        raise InputError(f"{source}: not a readable zip ({error}); pack it anew") from error


def _is_inside(name: str) -> bool:
    """Whether a path in an archive stays below the folder that it would be unpacked in."""
    path = PurePosixPath(name)
    has_drive = len(path.parts) > 0 and ":" in path.parts[0]
    return not (path.is_absolute() or has_drive or ".." in path.parts or "\\" in name or "\0" in name or not path.parts)


def parse_json(name: str, data: bytes, kind: type[_Content]) -> _Content:
    """What is read of a tool's JSON, as ``kind``.

    Raises:
        DataError: it is no JSON, or not of this format; every wrong place is named.
    """
    content = _load_json(name, data)
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, found['loc'])) or 'all of it'}: {found['msg']}" for found in error.errors()]
        text = f"{name}: not of this format; see --format, and export from the tool again"
        raise DataError(text, some_problems(problems)) from error


def _load_json(name: str, data: bytes) -> Any:  # noqa: ANN401 - JSON is any
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not readable JSON ({error}); export from the tool again") from error


class _Tree(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Entities need a document type: without one there are no bombs and no files from outside."""
        raise ValueError("it declares a document type, which no annotation tool does")


def parse_xml(name: str, data: bytes) -> ElementTree.Element:
    """The root of an XML file.

    Raises:
        DataError: it is no XML, or declares a document type.
    """
    parser = ElementTree.XMLParser(target=_Tree())
    try:
        parser.feed(data)
        return parser.close()
    except (ValueError, LookupError, ElementTree.ParseError) as error:  # LookupError: unknown encoding
        raise DataError(f"{name}: not readable XML ({error}); export from the tool again") from error
