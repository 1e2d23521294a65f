"""A stage with one input."""

from __future__ import annotations

from pathlib import Path

from stages.contracts import Progress, Runtime, StageConfig, StageResult, write_json

VERSION = 1


class CombineConfig(StageConfig):
    factor: float = 1.0
    is_used: bool = True


def combine(
    config: CombineConfig, *, collected: Path, data_root: Path | None, out: Path, progress: Progress, runtime: Runtime
) -> StageResult:
    texts = sorted(path.read_text() for path in collected.glob("*.txt"))
    write_json(out / "sub" / "combined.json", {"texts": texts, "factor": config.factor, "root": str(data_root)})
    return StageResult(metrics={"combine.length": len(texts)})
