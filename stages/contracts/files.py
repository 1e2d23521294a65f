"""Paths as a person writes them, files that appear whole or not at all, and JSON whose equal values are equal bytes."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stages.contracts.journal import note_files
from stages.errors import DamagedFileError, InputError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
"""What ``os.path.expandvars`` takes for a variable."""


def expand_path(text: str | Path) -> Path:
    """The path that somebody means who writes ``~``, ``~name``, ``$VAR`` or ``${VAR}`` as in a shell.

    A file that is there under a name that would mean no user and no variable (``price$5.jpg``) is that file.

    Raises:
        InputError: no such user, a variable that is not set or is empty, or no path at all.
    """
    written = os.fspath(text)
    expanded = os.path.expanduser(written)  # noqa: PTH111 - pathlib's drops a trailing slash and raises RuntimeError
    names = [first or second for first, second in _VARIABLE.findall(written)]
    unset = [f"${name}" for name in names if not os.environ.get(name)]
    problem = None
    if not written or "\0" in written or not _is_encodable(written):
        raise InputError(f"expected a path, found {written!r}; write the path of a file or a folder")
    if expanded.startswith("~"):
        user = expanded[1:].partition("/")[0]
        problem = f"there is no user '{user}' on this machine" if user else "your home folder is not known"
    elif unset:
        problem = f"{' and '.join(unset)} {'is' if len(unset) == 1 else 'are'} not set"
    if problem is not None and not os.path.lexists(written):
        raise InputError(f"{written}: {problem}; write the path in full")
    path = Path(written if problem is not None else os.path.expandvars(expanded))
    return path.absolute() if path.parts[:1] and path.parts[0].startswith("~") else path  # so that it stays the same


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def stand_in(head: bytes) -> str | None:
    """What stands in the place of a file that was never fetched, told by its first bytes; None where they do not tell.

    Args:
        head: The first bytes, at least 200 where there are as many.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        return "the file is empty"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if text.startswith((b"/annex/objects/", b"../.git/annex/")):
        return "it is a git-annex pointer; fetch the file itself with `git annex get`"
    if text.startswith((b"<!doctype html", b"<html", b"<head")) or (text.startswith(b"<?xml") and b"<error>" in text):
        return "it is a web page, perhaps a login or an error; download the file itself"
    if head.startswith(b"\x1f\x8b"):
        return "it is packed by gzip; unpack it"
    return None


def write_atomic(path: Path, *data: bytes | memoryview) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the whole new one, never a part.

    The bytes may come in pieces.  In a journalled folder (``stages.contracts.journal``) the file is noted as the
    build's own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        note_files({path: data})
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as sorted, indented JSON, atomically; equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON is any
    """Read JSON that ``write_json`` wrote.

    Raises:
        DamagedFileError: the file is missing or is not JSON.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedFileError(f"{path} is not readable JSON ({error}); rebuild the artifact that holds it") from error
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> Any:  # noqa: ANN401 - JSON is any
    """What ``write_json`` wrote, from its bytes; ``where`` names them in the error.

    Raises:
        DamagedFileError: it is no strict JSON in UTF-8, or nested deeper than the parser goes.
    """
    try:
        return json.loads(data.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        words = "nested too deeply" if isinstance(error, RecursionError) else stand_in(data[:512]) or error
        raise DamagedFileError(f"{where} is not readable JSON ({words}); rebuild the artifact that holds it") from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


Model = TypeVar("Model", bound=BaseModel)


def read_model(path: Path, model: type[Model], stage: str) -> Model:
    """Read a ``model`` that ``stage`` wrote as JSON.

    Raises:
        DamagedFileError: the file is missing, is not JSON, or describes something else; with the first few problems.
    """
    try:
        return model.model_validate(read_json(path))
    except ValidationError as error:
        raise DamagedFileError(
            f"{path} is no {model.__name__} of this version; rebuild {stage}",
            [f"{'.'.join(map(str, each['loc']))[:80]}: {each['msg'][:200]}" for each in error.errors()[:8]],
        ) from error
