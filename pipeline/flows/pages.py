"""What a flow says to Prefect's server beside its states: its name, its result, and that all of it has arrived."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.context import FlowRunContext
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from pipeline.engine.outcomes import RunOutcome
from pipeline.flows.summary import summarise_run
from pipeline.store.provenance import code_version
from stages.errors import EnvironmentFailure

RECORD_TIMEOUT_S = 10.0
"""Most seconds to wait until a server that is about to end has recorded every task run."""

FILES_URL = "WSSS_FILES_URL"
"""Variable with the URL under which the store's ``reports`` folder is served; ``wsss up`` sets it for its workers."""


def check_api() -> None:
    """Find out whether the configured API answers.

    Raises:
        EnvironmentFailure: it does not.
    """
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
        if error is not None:
            raise EnvironmentFailure(
                f"the Prefect API {client.api_url} does not answer ({error}); start it (wsss up), correct "
                "PREFECT_API_URL, or run without it: --engine local"
            )


def name_run(name: str) -> None:
    """Give the flow run of this context a name that says what it makes."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.name == name:
        return
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:  # a name is not worth a run
        client.update_flow_run(context.flow_run.id, name=name)


def warn_of_other_code() -> None:
    """Say in the run's log when its deployment was made by another version of this code than the worker has.

    Artifacts cannot be confused by that: each stage's VERSION is in its key.
    """
    context = FlowRunContext.get()
    deployment_id = None if context is None or context.flow_run is None else context.flow_run.deployment_id
    if deployment_id is None:
        return
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        expected, found = client.read_deployment(deployment_id).version, code_version()
        if expected != found:
            get_run_logger().warning(
                "this worker has wsss %s, the deployment was made by %s: bring both to one version, then run `wsss up` "
                "(or `prefect deploy --all`) again; a stage whose VERSION differs is built anew, never mixed up",
                found,
                expected,
            )


def show_result(
    name: str,
    title: str,
    command: str,
    outcome: RunOutcome,
    report: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Put the page of a run beside its flow run; a server that hiccups costs the page, not the run.

    Args:
        name: What the page is about; pages of one name are versions of each other.
        title: Of the page.
        command: The same run from a command line.
        outcome: What became of it.
        report: Its report.
        picture: Examples as a PNG.
    """
    links = {} if report is None else {"report": _url(report) or str(report)}
    markdown = summarise_run(title, command, outcome.stages, links, picture=_url(picture) if picture else None)
    key = re.sub(r"[^a-z0-9]+", "-", f"result-{name}".lower()).strip("-")
    try:
        create_markdown_artifact(markdown, key=key, description=f"{title}: stages, numbers, IoU of every class")
    except Exception as error:
        get_run_logger().warning("the page of results could not be sent to the server: %s", error)


def _url(path: Path) -> str | None:
    base = os.environ.get(FILES_URL)
    return f"{base.rstrip('/')}/{path.name}" if base else None


@contextlib.contextmanager
def recorded(flow_run_id: Callable[[], UUID | None]) -> Iterator[None]:
    """Leave only after the server has what this process sent: logs, events, and a final state of each task run.

    Prefect sends all three in the background and the server digests events later still; one that ends at once would
    show a finished run with task runs that are pending for ever.

    Args:
        flow_run_id: Asked at the end; None does not wait.
    """
    try:
        yield
    finally:
        found = flow_run_id()
        if found is not None:
            APILogWorker.drain_all(timeout=5.0)
            EventsWorker.drain_all(timeout=5.0)
            _wait_for_task_runs(found)


def _wait_for_task_runs(flow_run_id: UUID) -> None:
    of_this_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    end = time.monotonic() + RECORD_TIMEOUT_S
    with get_client(sync_client=True) as client:
        while time.monotonic() < end:
            task_runs = client.read_task_runs(flow_run_filter=of_this_run)
            if all(task_run.state is not None and task_run.state.is_final() for task_run in task_runs):
                return
            time.sleep(0.1)
