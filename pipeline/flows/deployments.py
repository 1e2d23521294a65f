"""The deployments: one of the whole flow for each shipped config, one for each stage, one for helpers.

``python -m pipeline.flows.deployments --pool wsss --directory DIR`` brings those at PREFECT_API_URL up to date;
``--write FILE`` writes the same as a ``prefect.yaml`` for ``prefect deploy --all``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.config.run_config import shipped_configs
from pipeline.flows.parameters import STAGE_NAMES
from pipeline.report.tables import STAGE_MEANINGS

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

DEFAULT_POOL = "wsss"
DEFAULT_CONFIG = "demo"
FLOWS = {"wsss": "wsss", "wsss-stage": "wsss_stage", "wsss-shard": "wsss_shard"}
"""Flow name to the function in ``pipeline.flows.flows``."""
SET_DIRECTORY = "prefect.deployments.steps.set_working_directory"
CHECK_PARAMETERS = "pipeline.flows.deployment_check.check_parameters"


@dataclass(frozen=True)
class Deployment:
    """One deployment."""

    flow: str
    name: str
    description: str
    parameters: dict[str, Any]
    tags: tuple[str, ...] = field(default=("wsss",))

    @property
    def entrypoint(self) -> str:
        """Where the flow is, for an installed package."""
        return f"pipeline.flows.flows.{FLOWS[self.flow]}"


def describe_deployments() -> list[Deployment]:
    """All deployments; a shipped config ``voc12_gain.yaml`` is ``wsss/voc12-gain``."""
    runs = [_describe_run(path) for path in shipped_configs()]
    stages = [
        Deployment(
            "wsss-stage",
            stage,
            f"{stage} alone: {STAGE_MEANINGS[stage]}. What it reads must be in the store.",
            {"stage": stage, "config": DEFAULT_CONFIG},
            ("wsss", "stage"),
        )
        for stage in STAGE_NAMES
    ]
    helper = Deployment(
        "wsss-shard",
        "any",
        "A hand with a stage that another run makes in parts; submitted by that run.",
        {"stage": "make_masks", "config": DEFAULT_CONFIG},
        ("wsss", "shard"),
    )
    return [*runs, *stages, helper]


def _describe_run(path: Path) -> Deployment:
    text = path.read_text(encoding="utf-8")
    method = yaml.safe_load(text)["train_classifier"]["method"]["name"]
    headline = text.splitlines()[0].lstrip("# ")
    return Deployment(
        "wsss", path.stem.replace("_", "-"), headline, {"config": path.stem}, ("wsss", method, path.stem.split("_")[0])
    )


def _pull_steps(directory: str, deployment: Deployment) -> list[dict[str, dict[str, str]]]:
    """What a worker does before it loads the flow."""
    return [{SET_DIRECTORY: {"directory": directory}}, {CHECK_PARAMETERS: {"function": FLOWS[deployment.flow]}}]


# ---------------------------------------------------------------------------------------------------------------------
# At a server
# ---------------------------------------------------------------------------------------------------------------------


def register(pool: str, directory: Path, artifacts: str | None = None) -> tuple[int, int]:
    """Bring all deployments at the configured API up to date.

    Args:
        pool: Work pool whose workers run them.
        directory: Working directory of the runs, to which paths of configs and the store are relative.
        artifacts: Root of the store that the runs use; None leaves the flows' default.

    Returns:
        How many there are, and how many of them were new or had changed.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=["wsss"]))
    with get_client(sync_client=True) as client:
        wanted = _requests(client, pool, directory, {} if artifacts is None else {"artifacts": artifacts})
        standing = {(found.flow_id, found.name): found for found in client.read_deployments(deployment_filter=ours)}
        # the schema of a whole config costs the server a quarter of a second: only what differs is sent
        changed = [
            request for request in wanted if _differs(standing.get((request["flow_id"], request["name"])), request)
        ]
        for request in changed:
            client.create_deployment(**request)
    return len(wanted), len(changed)


def _differs(found: Any, request: Mapping[str, Any]) -> bool:  # noqa: ANN401 - a class of Prefect's
    return found is None or any(getattr(found, name) != value for name, value in request.items())


def _requests(client: SyncPrefectClient, pool: str, directory: Path, more: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the server is asked to know of each deployment."""
    from prefect.utilities.callables import parameter_schema

    from pipeline.flows import flows
    from pipeline.store.provenance import code_version

    functions = {name: getattr(flows, function) for name, function in FLOWS.items()}
    ids = {name: client.create_flow(function) for name, function in functions.items()}
    schemas = {
        # Prefect's own schema lets unknown parameters pass when they do not come through its command line
        name: parameter_schema(function).model_dump_for_openapi() | {"additionalProperties": False}
        for name, function in functions.items()
    }
    version = code_version()
    return [
        {
            "flow_id": ids[deployment.flow],
            "name": deployment.name,
            "version": version,
            "description": deployment.description,
            "parameters": {**deployment.parameters, **more},
            "tags": list(deployment.tags),
            "work_pool_name": pool,
            "entrypoint": deployment.entrypoint,
            "pull_steps": _pull_steps(str(directory.absolute()), deployment),
            "parameter_openapi_schema": schemas[deployment.flow],
            "enforce_parameter_schema": True,
        }
        for deployment in describe_deployments()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# As a file
# ---------------------------------------------------------------------------------------------------------------------

HEAD = """\
# What `prefect deploy --all` registers; `wsss up` does the same by itself.
# Written by `python -m pipeline.flows.deployments --write prefect.yaml`; a test compares the two.
# Runs work in the folder where `prefect deploy` was called: paths of configs and of the store are relative to it.
"""


def write_prefect_yaml(path: Path) -> None:
    """Write all deployments in the format of ``prefect deploy``."""
    document = {
        "name": "wsss-pipeline",
        "deployments": [
            {
                "name": deployment.name,
                "entrypoint": deployment.entrypoint,
                "description": deployment.description,
                "tags": list(deployment.tags),
                "parameters": deployment.parameters,
                "enforce_parameter_schema": True,
                "work_pool": {"name": DEFAULT_POOL},
                "pull": _pull_steps("{{ $PWD }}", deployment),
            }
            for deployment in describe_deployments()
        ],
    }
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    path.write_text(HEAD + "\n" + text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Register, or write the file."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.flows.deployments", description=__doc__)
    parser.add_argument("--pool", default=DEFAULT_POOL)
    parser.add_argument("--directory", type=Path, default=Path())
    parser.add_argument("--artifacts", metavar="DIR", help="root of the store that the runs use")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.write is not None:
        write_prefect_yaml(options.write)
        return 0
    number, changed = register(options.pool, options.directory, options.artifacts)
    sys.stdout.write(
        f"{number} deployments on work pool {options.pool}, {changed} of them new or changed; "
        f"runs work in {options.directory.absolute()}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
