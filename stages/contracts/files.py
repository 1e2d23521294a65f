"""Write files whole or not at all, and JSON whose equal values are equal bytes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from stages.errors import DamagedFileError


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
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
        words = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DamagedFileError(f"{where} is not readable JSON ({words}); rebuild the artifact that holds it") from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
