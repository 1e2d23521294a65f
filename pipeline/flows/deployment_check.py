"""A pull step that refuses the run of a deployment which was made for other parameters than the flow has now.

Prefect itself would let such a run crash with a traceback; here it fails with a line that says what to do.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.states import Failed

from stages.errors import ConfigError

_FLOW_RUN_ID = "PREFECT__FLOW_RUN_ID"


def check_parameters(function: str) -> None:
    """Compare the parameters of the flow run that this process is for with those of its flow.

    Args:
        function: Name of the flow in ``pipeline.flows.flows``.

    Raises:
        ConfigError: the flow has no such parameter; the flow run is Failed with the same text.
    """
    from pipeline.flows import flows

    with get_client(sync_client=True) as client:
        run_id = UUID(os.environ[_FLOW_RUN_ID])
        problem = find_unknown(client.read_flow_run(run_id).parameters, inspect.signature(getattr(flows, function).fn))
        if problem:
            client.set_flow_run_state(run_id, Failed(message=problem), force=True)
            raise ConfigError(problem)


def find_unknown(parameters: Collection[str], signature: inspect.Signature) -> str:
    """What is wrong with ``parameters``; empty when nothing is."""
    unknown = sorted(set(parameters) - signature.parameters.keys())
    if not unknown:
        return ""
    return (
        f"the deployment is of another version of wsss: its parameters {', '.join(unknown)} are not known here "
        f"(known: {', '.join(signature.parameters)}); run `wsss up` again, or `prefect deploy --all`, then "
        "start the run anew"
    )
