"""Write files whole or not at all, and JSON whose equal values are equal bytes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

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
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not readable JSON ({error}); rebuild the artifact that holds it") from error


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
