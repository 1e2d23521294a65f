"""The few calls of Prefect's REST API that setting up, watching and resubmitting need.

Without Prefect's own client, whose import costs seconds and 100 MB in a process that lives for weeks.  The calls are
those that Prefect's command line makes.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlsplit

from pipeline.flows.environment import API_URL, bypass_proxy, is_on_this_machine
from stages.errors import EnvironmentFailure, InputError

TIMEOUT_S = 30.0
NOT_FOUND = 404


class ApiError(EnvironmentFailure):
    """The server answered a call with an error."""

    def __init__(self, message: str, status: int = 0) -> None:
        """Keep the HTTP status; 0 when there was no answer."""
        super().__init__(message)
        self.status = status


class PrefectApi:
    """One server."""

    def __init__(self, url: str) -> None:
        """Check ``url``, the value of PREFECT_API_URL.

        Raises:
            InputError: it is no URL of an API.
        """
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"{API_URL} must be a URL such as http://127.0.0.1:4200/api, got {url!r}; correct or unset it"
            )
        if is_on_this_machine(url):
            bypass_proxy(host=parts.hostname)

    @property
    def ui_url(self) -> str:
        """Where people look."""
        return self.url.removesuffix("/api")

    def call(self, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401 - JSON is any
        """One call and its answer.

        Raises:
            ApiError: no answer, or one that says no.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, _headers(), method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read(500).decode(errors="replace")
            raise ApiError(f"{method} {self.url}{path}: HTTP {error.code} {detail}", error.code) from error
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(f"{self.url} does not answer ({_reason(error)})") from error
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise ApiError(f"{self.url}{path} does not answer as a Prefect API") from error

    # -- health ------------------------------------------------------------------------------------------------------

    def problem(self) -> str:
        """Why the server cannot be used; empty when it is healthy."""
        try:
            found = self.call("GET", "/health")
        except ApiError as error:
            return error.message
        return (
            "" if found is True else f"{self.url}/health does not answer as a Prefect API (does the URL end in /api?)"
        )

    # -- work pools --------------------------------------------------------------------------------------------------

    def work_pool(self, name: str) -> dict[str, Any] | None:
        """The pool, or None."""
        try:
            return self.call("GET", f"/work_pools/{quote(name, safe='')}")
        except ApiError as error:
            if error.status == NOT_FOUND:
                return None
            raise

    def workers(self, pool: str) -> dict[str, bool]:
        """Names of the pool's workers that the server knows, and whether it hears from them."""
        found = self.call("POST", f"/work_pools/{quote(pool, safe='')}/workers/filter", {})
        return {worker["name"]: worker["status"] == "ONLINE" for worker in found}

    # -- flow runs ---------------------------------------------------------------------------------------------------

    def flow_runs(self, flows: Sequence[str], state: str, *, pool: str | None = None) -> list[dict[str, Any]]:
        """Runs of these flows that a deployment made, whose state is of this type; the latest first, at most 200.

        Args:
            flows: Names.
            state: Type, such as CRASHED.
            pool: Only of this work pool; None is any.
        """
        body: dict[str, Any] = {
            "flows": {"name": {"any_": list(flows)}},
            "flow_runs": {"state": {"type": {"any_": [state]}}, "deployment_id": {"is_null_": False}},
            "sort": "EXPECTED_START_TIME_DESC",
            "limit": 200,
        }
        if pool is not None:
            body["work_pools"] = {"name": {"any_": [pool]}}
        return self.call("POST", "/flow_runs/filter", body)

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        """One run."""
        return self.call("GET", f"/flow_runs/{flow_run_id}")

    def states(self, flow_run_id: str) -> list[dict[str, Any]]:
        """All states that a run has had, the first one first."""
        found = self.call("GET", f"/flow_run_states/?flow_run_id={flow_run_id}")
        return sorted(found, key=lambda state: state["timestamp"])

    def set_state(self, flow_run_id: str, state: Mapping[str, Any], *, force: bool = False) -> bool:
        """Propose a state; whether the server took it."""
        answer = self.call("POST", f"/flow_runs/{flow_run_id}/set_state", {"state": dict(state), "force": force})
        return answer["status"] == "ACCEPT"

    def schedule_again(self, flow_run_id: str, message: str, *, transition_id: str, delay_s: float = 0.0) -> bool:
        """Put a run that ended back into its queue, as ``prefect flow-run retry`` does.

        Args:
            flow_run_id: The run; its workers go on in the store where it stopped.
            message: Of the new state.
            transition_id: The same for whoever reacts to the same end: the server takes it once.
            delay_s: Seconds from now.
        """
        when = datetime.now(UTC) + timedelta(seconds=delay_s)
        details = {"scheduled_time": when.isoformat(), "transition_id": transition_id}
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": message, "state_details": details}
        return self.set_state(flow_run_id, state)

    def log(self, flow_run_id: str, text: str, *, level: int = 30) -> None:
        """Write into a run's own log; a server that hiccups costs the line."""
        line = {
            "name": "wsss.supervisor",
            "level": level,
            "message": text,
            "timestamp": datetime.now(UTC).isoformat(),
            "flow_run_id": flow_run_id,
        }
        with contextlib.suppress(ApiError):
            self.call("POST", "/logs/", [line])


def _headers() -> dict[str, str]:
    """As Prefect's own client: PREFECT_API_KEY, or PREFECT_API_AUTH_STRING ``user:password``."""
    headers = {"Content-Type": "application/json"}
    key, login = os.environ.get("PREFECT_API_KEY"), os.environ.get("PREFECT_API_AUTH_STRING")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    elif login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    return headers


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return getattr(reason, "strerror", None) or str(reason) or type(error).__name__
