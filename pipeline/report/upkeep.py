"""Where the report of a run stands in the store, and when it is written anew.

Reads a run's artifacts; writes ``<store>/reports/<name>-<key>.html`` and the picture beside it.  The key of the last
artifact is in the names, so neither can show another result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.engine.outcomes import RunOutcome
    from pipeline.engine.plan import Plan
    from pipeline.store.artifacts import Artifact, Store


def run_name(run_config: RunConfig, plan: Plan) -> str:
    """Name and key of what the run is for: ``demo-1f0c23ab``."""
    return f"{run_config.name}-{plan.keys[plan.table.names[-1]][:8]}"


def report_path(run_config: RunConfig, plan: Plan, store: Store, *, is_complete: bool) -> Path:
    """The report's file; a run that has not reached its end has one of its own."""
    suffix = "" if is_complete else "-partial"
    return store.root / "reports" / f"{run_name(run_config, plan)}{suffix}.html"


def ensure_report(run_config: RunConfig, plan: Plan, store: Store, outcome: RunOutcome) -> Path | None:
    """The report of a run that reached its end, None for another; written again only when one of its stages was."""
    states = {stage.stage: stage.state for stage in outcome.stages}
    if plan.table.names[-1] not in states:
        return None
    path = report_path(run_config, plan, store, is_complete=True)
    if path.is_file() and all(state in ("cached", "skipped") for state in states.values()):
        return path

    from pipeline.report.page import build_report

    found = {name: store.require(name, key) for name, key in plan.keys.items()}
    return build_report(run_config, folders(found), manifests(found), plan.data.root, path, states=states)


def ensure_picture(report: Path, run_config: RunConfig, plan: Plan, store: Store) -> Path:
    """One PNG of examples beside ``report``, written again only when the report is newer."""
    path = report.with_suffix(".png")
    if path.is_file() and path.stat().st_mtime_ns >= report.stat().st_mtime_ns:
        return path

    from pipeline.report.picture_sections import write_picture_grid

    found = {name: store.require(name, key) for name, key in plan.keys.items()}
    shown = run_config.evaluate.written_score
    return write_picture_grid(folders(found), plan.data.root, path, predictions=shown)


def folders(found: Mapping[str, Artifact]) -> dict[str, Path]:
    """The folder of each artifact."""
    return {name: artifact.path for name, artifact in found.items()}


def manifests(found: Mapping[str, Artifact]) -> dict[str, Mapping[str, Any]]:
    """The manifest of each artifact."""
    return {name: artifact.manifest for name, artifact in found.items()}
