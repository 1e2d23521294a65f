"""The last stage: writes down what it was told to leave out."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from stages.contracts import Progress, Runtime, StageResult, write_json

VERSION = 1


def finish(
    *, combined: Path | None, exclude: Collection[str], out: Path, progress: Progress, runtime: Runtime
) -> StageResult:
    write_json(out / "finished.json", {"exclude": sorted(exclude), "combined": combined is not None})
    return StageResult(metrics={"finish.excluded": len(exclude)})
