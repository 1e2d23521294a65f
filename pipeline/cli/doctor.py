"""``wsss doctor``: is this machine fit for a run?"""

from __future__ import annotations

import dataclasses

import typer

from pipeline.cli.options import ArtifactsOption, JsonOption
from pipeline.cli.output import get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS

_MARKS = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}


def doctor(context: typer.Context, artifacts: ArtifactsOption = DEFAULT_ARTIFACTS, as_json: JsonOption = False) -> None:
    """Check interpreter, packages, device, CRF, disk, store and memory; exit 4 when something is missing."""
    from pipeline.cli.machine import examine
    from stages.errors import EnvironmentFailure

    output = get_output(context)
    checks = examine(artifacts)
    output.document = {"checks": [dataclasses.asdict(check) for check in checks]}
    for check in checks:
        remedy = f"  → {check.remedy}" if check.remedy else ""
        output.say(f"{_MARKS[check.status]}  {check.name:9} {check.found}{remedy}")
    failed = [
        f"{check.name}: {check.found}{check.remedy and '; '}{check.remedy}"
        for check in checks
        if check.status == "failed"
    ]
    if failed:
        raise EnvironmentFailure("this machine is not fit for a run yet", failed)
