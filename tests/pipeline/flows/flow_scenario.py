"""Run the flow on what an earlier run has built, and a task that fails; print what the server recorded as JSON.

A process of its own: Prefect reads its environment when it is imported, and its background threads stay.
"""

import json
import os
import sys
from pathlib import Path

from pipeline.flows.embedded_server import embedded_server
from pipeline.flows.environment import set_prefect_environment


class Heard:
    """A listener that keeps the stages' states."""

    def __init__(self) -> None:
        self.states: list[str] = []

    def stage_started(self, stage: str, key: str) -> None: ...

    def step(self, *arguments: object, **values: object) -> None: ...

    def info(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def output(self, text: str) -> None: ...

    def stage_finished(self, outcome) -> None:
        self.states.append(outcome.state)


def main() -> None:
    set_prefect_environment()
    with embedded_server(Path(os.environ["PREFECT_HOME"])) as wait:
        wait()
        found = {
            "cached": cached_run(),
            "failed": failed_task(),
            "refused": refused_config(),
            "given up": fourth_start(),
        }
        json.dump(found | {"runs": recorded()}, sys.stdout)


def cached_run() -> list[str]:
    from pipeline.config.run_config import load_config
    from pipeline.engine.run import Run
    from pipeline.flows.flows import run_flow
    from pipeline.store.artifacts import open_store

    heard = Heard()
    run = Run(load_config(Path("tiny.yaml")), open_store("artifacts"), listener=heard)
    outcome = run_flow(run, "tiny.yaml", is_server_ending=True)
    assert [stage.state for stage in outcome.stages] == heard.states
    return heard.states


def failed_task() -> dict:
    from prefect import flow

    from pipeline.flows.tasks import run_as_task
    from stages.errors import DataError

    @flow(name="failing", persist_result=False)
    def failing() -> None:
        def body() -> None:
            raise DataError("remove the damaged images", ["a.jpg: truncated"])

        run_as_task("make_masks", body)

    try:
        failing()
    except DataError as error:
        return {"message": error.message, "problems": list(error.problems)}
    raise AssertionError("the flow did not fail")


def refused_config() -> str:
    from pipeline.flows.flows import wsss

    return wsss("no_such_config.yaml", return_state=True).message


def fourth_start() -> str:
    from types import SimpleNamespace

    from pipeline.flows import flows

    flows.this_flow_run = SimpleNamespace(run_count=4)
    state = flows.wsss("tiny.yaml", return_state=True)
    return f"{state.type.name} {state.message}"


def recorded() -> list[dict]:
    """Every flow run in order of its start, with its task runs and log lines."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import FlowRunSort

    runs = []
    with get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(sort=FlowRunSort.START_TIME_ASC):
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))
            tasks.sort(key=lambda task: task.start_time)
            logs = client.read_logs(log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])))
            runs.append(
                {
                    "state": flow_run.state_name,
                    "message": flow_run.state.message,
                    "parameters": flow_run.parameters,
                    "tasks": [[task.name, task.state_name, task.state.message] for task in tasks],
                    "logs": [line.message for line in logs],
                }
            )
    return runs


if __name__ == "__main__":
    main()
