"""Which crashed flow runs are submitted again, and how often: a decision that the server alone remembers.

A run that is submitted again is the same flow run: it goes back into its queue, the next free worker takes it, and the
store has what it had finished.  Failed and cancelled runs are never touched.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.flows.prefect_api import ApiError, PrefectApi

FLOWS = ("wsss", "wsss-stage")
"""Flows that are submitted again; a ``wsss-shard`` is only a hand, without which its stage goes on."""
WATCHED_FLOWS = (*FLOWS, "wsss-shard")
MAX_TIMES = 3
DELAYS_S = (0.0, 10.0, 60.0)
"""Seconds before the first, second and third time."""
AGAIN = "submitted again by wsss"
INTERRUPTED = "interrupted by wsss down"
SETTLE_S = 5.0
"""A worker that lives reports the end of a process a second time, seconds later, whatever state the run is in then."""
LOST = "its worker"
"""How the message of a run begins whose worker cannot report any more."""
MAX_AGE_S = 7 * 24 * 3600.0
"""A crash that nobody has answered for so long is history."""
PENDING_TIMEOUT_S = 300.0
"""A run that a worker has taken and not begun for so long has lost its worker: Prefect itself would wait for ever."""

_FINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})


@dataclass(frozen=True)
class Decision:
    """What becomes of a crashed run."""

    number: int
    """The how-manieth time it is submitted again; 0 when it is left alone."""
    reason: str
    delay_s: float = 0.0


def decide(states: Sequence[Mapping[str, Any]], *, now: datetime) -> Decision:
    """Decide about a run from all states that it has had.

    Args:
        states: As the server has them, the first one first.
        now: The time, with a time zone.

    Returns:
        Submit it again when it crashed, fewer than ``MAX_TIMES`` before, and nobody had cancelled it.  A retry by hand
        starts the count anew; an interruption by ``wsss down`` does not count.
    """
    if not states or states[-1]["type"] != "CRASHED":
        return Decision(0, "it did not crash")
    if (now - datetime.fromisoformat(states[-1]["timestamp"])).total_seconds() > MAX_AGE_S:
        return Decision(0, "it crashed long ago")
    times, is_cancelled, before = 0, False, ""
    for state in states:
        message = state.get("message") or ""
        if state["type"] == "SCHEDULED" and before in _FINAL:
            is_cancelled = False
            times = times + 1 if message.startswith(AGAIN) else times if message.startswith(INTERRUPTED) else 0
        if state["type"] == "CRASHED" and before == "SCHEDULED":
            times = max(0, times - 1)  # the second report of the crash before: nothing had begun
        is_cancelled |= state["type"] in ("CANCELLING", "CANCELLED")
        before = state["type"]
    if is_cancelled:
        return Decision(0, "it was being cancelled")
    if times >= MAX_TIMES:
        return Decision(0, f"it crashed again after {MAX_TIMES} times")
    reason = (states[-1].get("message") or "no reason given").partition(". ")[0]
    return Decision(times + 1, reason.rstrip("."), DELAYS_S[times])


def is_settled(state: Mapping[str, Any], *, now: datetime) -> bool:
    """Whether nobody will report this crash again."""
    age_s = (now - datetime.fromisoformat(state["timestamp"])).total_seconds()
    return age_s > SETTLE_S or (state.get("message") or "").startswith(LOST)


class Resubmitter:
    """Looks for crashed runs, of every pool, and puts them back into their queue."""

    def __init__(self, api: PrefectApi, pool: str, log: logging.Logger) -> None:
        """Watch ``api``.

        Args:
            api: The server.
            pool: Whose runs begin soon after they are taken, because its workers start processes.
            log: Hears what was done.
        """
        self._api, self._pool, self._log = api, pool, log
        self._done: set[str] = set()
        """States that were decided about, so that a run is not read again and again."""

    def sweep(self, now: datetime | None = None) -> int:
        """Look once; how many runs were submitted again.

        Raises:
            ApiError: the server is away.
        """
        now = now or datetime.now(UTC)
        for run in self._api.flow_runs(WATCHED_FLOWS, "PENDING", pool=self._pool):
            self._crash_stuck(run, now)
        number = 0
        for run in self._api.flow_runs(FLOWS, "CRASHED"):
            if run["state_id"] not in self._done and is_settled(run["state"], now=now):
                number += self._answer(run, now)
                self._done.add(run["state_id"])
        return number

    def _answer(self, run: Mapping[str, Any], now: datetime) -> bool:
        decision = decide(self._api.states(run["id"]), now=now)
        if not decision.number:
            self._log.info("flow run %s (%s): left alone, %s", run["name"], run["id"], decision.reason)
            return False
        text = f"{AGAIN} ({decision.number} of {MAX_TIMES}): {decision.reason}"
        # the same id from every supervisor that sees this crash: the server takes the first
        transition_id = str(uuid.uuid5(uuid.NAMESPACE_URL, run["state_id"]))
        if self._api.flow_run(run["id"])["state_id"] != run["state_id"]:
            return False
        if not self._api.schedule_again(run["id"], text, transition_id=transition_id, delay_s=decision.delay_s):
            return False
        self._log.info("flow run %s (%s): %s", run["name"], run["id"], text)
        self._api.log(run["id"], text)
        return True

    def _crash_stuck(self, run: Mapping[str, Any], now: datetime) -> None:
        waited_s = (now - datetime.fromisoformat(run["state"]["timestamp"])).total_seconds()
        if waited_s > PENDING_TIMEOUT_S:
            crash(self._api, run, f"taken by a worker {waited_s:.0f} s ago and never begun", self._log)

    def crash_lost(self, flow_run_id: str, pids: Collection[int], worker: str) -> None:
        """Mark a run of a dead worker, unless another process has it by now.

        Args:
            flow_run_id: The run.
            pids: Its processes on this machine, which have ended.
            worker: Whose run it was.

        Raises:
            ApiError: the server is away.
        """
        try:
            run = self._api.flow_run(flow_run_id)
        except ApiError as error:
            if error.status:
                return
            raise
        if run["infrastructure_pid"] in {None, *map(str, pids)}:
            crash(self._api, run, f"{LOST} {worker} died", self._log)


def crash(api: PrefectApi, run: Mapping[str, Any], reason: str, log: logging.Logger) -> None:
    """End a run that no process is at any more: as Crashed, or as Cancelled where that was under way."""
    kind = {"RUNNING": "CRASHED", "PENDING": "CRASHED", "CANCELLING": "CANCELLED"}.get(run["state_type"])
    if kind and api.set_state(run["id"], {"type": kind, "name": kind.capitalize(), "message": reason}, force=True):
        log.info("flow run %s (%s): %s, %s", run["name"], run["id"], kind.lower(), reason)
