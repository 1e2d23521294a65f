"""What a server must know before it can run us: the work pool, the automation for dead runs, the deployments.

Every step looks first and changes only what differs, so it can be repeated at any time.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pipeline.engine.spawn import PYTHON
from pipeline.flows.prefect_api import ApiError, PrefectApi
from pipeline.flows.resubmission import WATCHED_FLOWS
from stages.errors import EnvironmentFailure, InputError

Change = Literal["created", "updated", "unchanged"]

POOL_TYPE = "process"
DEAD_AFTER_S = 70
"""Two heartbeats that did not come, and ten seconds for the server to digest the one before."""
AUTOMATION = "wsss: dead runs"
_CONFLICT = 409
_TIMEOUT_S = 180.0


def set_up_pool(api: PrefectApi, name: str, *, max_runs: int | None, environment: Mapping[str, str]) -> Change:
    """Create the pool unless it is there, and set its limit unless ``max_runs`` is None.

    Args:
        api: The server.
        name: Of the pool.
        max_runs: Flow runs at a time over all its workers.
        environment: Of the process that asks Prefect for its defaults.

    Raises:
        InputError: a pool of that name has another type.
    """
    pool = api.work_pool(name)
    if pool is None:
        body = {"name": name, "type": POOL_TYPE, "base_job_template": _ask_template(environment)}
        try:
            api.call("POST", "/work_pools/", body | {"concurrency_limit": max_runs})
        except ApiError as error:
            if error.status != _CONFLICT:  # another machine was quicker
                raise
        return "created"
    if pool["type"] != POOL_TYPE:
        raise InputError(
            f"work pool {name!r} is of type {pool['type']}, wsss up runs workers of type {POOL_TYPE}: choose another "
            f"name with --pool, or start that pool's workers yourself: prefect worker start --pool {name}"
        )
    if max_runs is None or pool["concurrency_limit"] == max_runs:
        return "unchanged"
    api.call("PATCH", f"/work_pools/{quote(name, safe='')}", {"concurrency_limit": max_runs})
    return "updated"


def _ask_template(environment: Mapping[str, str]) -> dict[str, Any]:
    """The job template of the installed Prefect, so that the UI shows its fields before a worker has been here."""
    code = (
        "import json; from prefect.workers.process import ProcessWorker; "
        "print(json.dumps(ProcessWorker.get_default_base_job_template()))"
    )
    text = _run([*PYTHON, "-c", code], environment, "Prefect's process worker could not be imported")
    return json.loads(text.splitlines()[-1])


def describe_automation() -> dict[str, Any]:
    """The automation: a run of ours that gave a sign of life and then none for ``DEAD_AFTER_S`` is Crashed."""
    ends = ("Completed", "Cached", "Failed", "Cancelled", "Crashed", "AwaitingRetry", "Paused", "Suspended")
    heartbeat = "prefect.flow-run.heartbeat"
    return {
        "name": AUTOMATION,
        "description": f"No sign of life for {DEAD_AFTER_S} s: Crashed; then submitted again. Made by wsss up.",
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "match_related": {"prefect.resource.role": "flow", "prefect.resource.name": list(WATCHED_FLOWS)},
            "after": [heartbeat],
            "expect": [heartbeat, *(f"prefect.flow-run.{end}" for end in ends)],
            "for_each": ["prefect.resource.id"],
            "threshold": 1,
            "within": DEAD_AFTER_S,
        },
        "actions": [
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "name": "Crashed",
                "message": f"no sign of life for {DEAD_AFTER_S} s: its process or its machine died",
            }
        ],
    }


def set_up_automation(api: PrefectApi) -> Change:
    """Create the automation, or bring it to what this version wants; a user's ``enabled: false`` stands."""
    wanted = describe_automation()
    found = api.call("POST", "/automations/filter", {"automations": {"name": {"any_": [AUTOMATION]}}})
    if not found:
        api.call("POST", "/automations/", wanted)
        return "created"
    for spare in found[1:]:  # two machines were set up at the same moment
        api.call("DELETE", f"/automations/{spare['id']}")
    wanted["enabled"] = found[0]["enabled"]
    if _same(wanted, found[0]):
        return "unchanged"
    api.call("PUT", f"/automations/{found[0]['id']}", wanted)
    return "updated"


def _same(wanted: Any, found: Any) -> bool:  # noqa: ANN401 - JSON is any
    """Whether ``found`` has everything of ``wanted``; the server adds keys, and keeps sets in any order."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_same(item, found.get(key)) for key, item in wanted.items())
    if isinstance(wanted, list):
        if not isinstance(found, list) or len(wanted) != len(found):
            return False
        return all(any(_same(item, other) for other in found) for item in wanted)
    return wanted == found


def register_deployments(pool: str, directory: Path, artifacts: str, environment: Mapping[str, str]) -> str:
    """Create or update all deployments, in a process of its own, since that imports Prefect.

    Returns:
        What it says: one line with their number.

    Raises:
        EnvironmentFailure: it failed.
    """
    words = (
        "-m",
        "pipeline.flows.deployments",
        "--pool",
        pool,
        "--directory",
        str(directory),
        "--artifacts",
        artifacts,
    )
    return _run([*PYTHON, *words], environment, "the deployments could not be registered").strip()


def _run(command: list[str], environment: Mapping[str, str], problem: str) -> str:
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailure(f"{problem}: no end after {_TIMEOUT_S:.0f} s; run wsss up again") from error
    if done.returncode:
        raise EnvironmentFailure(f"{problem}; see below, then run wsss up again", done.stderr.splitlines()[-8:])
    return done.stdout
