"""Which crashed runs go on, decided from the states that the server keeps; and what is then asked of the server."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipeline.flows.prefect_api import ApiError
from pipeline.flows.resubmission import (
    AGAIN,
    INTERRUPTED,
    MAX_AGE_S,
    PENDING_TIMEOUT_S,
    Resubmitter,
    decide,
    is_settled,
)

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
SCHEDULED, LATE, PENDING, RUNNING = "SCHEDULED", "SCHEDULED:Late", "PENDING", "RUNNING"
CRASHED, FAILED, CANCELLING, CANCELLED = "CRASHED:out of memory", "FAILED", "CANCELLING", "CANCELLED"
TRIED = (PENDING, RUNNING, CRASHED)


def history(*names: str, age_s: float = 10.0) -> list[dict[str, Any]]:
    """States, each TYPE:message, one second apart, the last one ``age_s`` old."""
    found = []
    for index, name in enumerate(names):
        kind, _, message = name.partition(":")
        when = NOW - timedelta(seconds=age_s + len(names) - 1 - index)
        found.append({"type": kind, "message": message or None, "timestamp": when.isoformat().replace("+00:00", "Z")})
    return found


def again(number: int) -> str:
    return f"SCHEDULED:{AGAIN} ({number} of 3): out of memory"


def test_a_first_crash_is_submitted_again_at_once():
    found = decide(history(SCHEDULED, *TRIED), now=NOW)
    assert (found.number, found.delay_s, found.reason) == (1, 0.0, "out of memory")


@pytest.mark.parametrize(("times", "number", "delay_s"), [(1, 2, 10.0), (2, 3, 60.0), (3, 0, 0.0)])
def test_at_most_three_times_and_slower_each_time(times: int, number: int, delay_s: float):
    states = [SCHEDULED, *TRIED]
    for index in range(times):
        states += [again(index + 1), LATE, *TRIED]
    found = decide(history(*states), now=NOW)
    assert (found.number, found.delay_s) == (number, delay_s)


@pytest.mark.parametrize("end", [(RUNNING,), (RUNNING, FAILED), (RUNNING, CANCELLING, CANCELLED), ()])
def test_other_ends_are_left_alone(end: tuple[str, ...]):
    assert decide(history(SCHEDULED, PENDING, *end), now=NOW).number == 0


def test_a_crash_while_it_was_being_cancelled_is_left_alone():
    assert decide(history(SCHEDULED, PENDING, RUNNING, CANCELLING, CRASHED), now=NOW).number == 0
    retried = history(SCHEDULED, PENDING, RUNNING, CANCELLING, CANCELLED, "SCHEDULED:Retried via CLI", *TRIED)
    assert decide(retried, now=NOW).number == 1


def test_a_retry_by_hand_starts_the_count_anew():
    used_up = [SCHEDULED, *TRIED, again(1), *TRIED, again(2), *TRIED, again(3), *TRIED]
    assert decide(history(*used_up), now=NOW).number == 0
    assert decide(history(*used_up, "SCHEDULED:Retried via CLI", *TRIED), now=NOW).number == 1


def test_an_interruption_by_wsss_down_does_not_count():
    states = [SCHEDULED, *TRIED, again(1), *TRIED]
    for _ in range(5):
        states += [f"SCHEDULED:{INTERRUPTED} on box", *TRIED]
    assert decide(history(*states), now=NOW).number == 2


def test_the_second_report_of_a_crash_does_not_count():
    assert decide(history(SCHEDULED, *TRIED, again(1), CRASHED), now=NOW).number == 1


def test_an_old_crash_is_history():
    assert decide(history(SCHEDULED, *TRIED, age_s=MAX_AGE_S + 1), now=NOW).number == 0


def test_a_crash_settles_unless_its_worker_is_dead():
    assert not is_settled(history(CRASHED, age_s=1)[0], now=NOW)
    assert is_settled(history(CRASHED, age_s=6)[0], now=NOW)
    assert is_settled(history("CRASHED:its worker box-gpu0 died", age_s=0)[0], now=NOW)


# -- with a server ----------------------------------------------------------------------------------------------------


class FakeApi:
    """One run of a server."""

    def __init__(self, states: list[dict[str, Any]], *, pid: str | None = "7") -> None:
        self.history, self.pid = states, pid
        self.current: list[dict[str, Any]] = []
        self.scheduled: list[tuple[str, str, float]] = []
        self.logs: list[str] = []

    def _run(self) -> dict[str, Any]:
        last = self.current[-1] if self.current else self.history[-1]
        state_id = f"state-{len(self.history) + len(self.current)}"
        return {
            "id": "run",
            "name": "red-fox",
            "state": last,
            "state_id": state_id,
            "state_type": last["type"],
            "infrastructure_pid": self.pid,
        }

    def flow_runs(self, flows, state: str, *, pool: str | None = None) -> list[dict[str, Any]]:
        return [self._run()] if self._run()["state_type"] == state else []

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        return self._run()

    def states(self, flow_run_id: str) -> list[dict[str, Any]]:
        return [*self.history, *self.current]

    def set_state(self, flow_run_id: str, state: dict[str, Any], *, force: bool = False) -> bool:
        self.current.append({"timestamp": NOW.isoformat(), "message": None, **state})
        return True

    def schedule_again(self, flow_run_id: str, message: str, *, transition_id: str, delay_s: float = 0.0) -> bool:
        self.scheduled.append((message, transition_id, delay_s))
        return self.set_state(flow_run_id, {"type": "SCHEDULED", "message": message})

    def log(self, flow_run_id: str, text: str) -> None:
        self.logs.append(text)


def watch(api: FakeApi) -> Resubmitter:
    return Resubmitter(api, "wsss", logging.getLogger("test"))


def test_a_crashed_run_goes_back_into_its_queue_once():
    api = FakeApi(history(SCHEDULED, *TRIED))
    watcher = watch(api)
    assert [watcher.sweep(NOW), watcher.sweep(NOW)] == [1, 0]
    ((message, _, delay_s),) = api.scheduled
    assert (message, delay_s) == (f"{AGAIN} (1 of 3): out of memory", 0.0)
    assert api.logs == [message], "the run's own log says so"


def test_two_supervisors_propose_the_same_transition():
    first, second = (FakeApi(history(SCHEDULED, *TRIED)) for _ in range(2))
    watch(first).sweep(NOW)
    watch(second).sweep(NOW)
    assert first.scheduled[0][1] == second.scheduled[0][1]


def test_a_server_that_fails_once_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    api = FakeApi(history(SCHEDULED, *TRIED))
    watcher = watch(api)
    with monkeypatch.context() as patched:

        def away(*_: object, **__: object) -> None:
            raise ApiError("away")

        patched.setattr(api, "schedule_again", away)
        with pytest.raises(ApiError):
            watcher.sweep(NOW)
    assert watcher.sweep(NOW) == 1


@pytest.mark.parametrize(("age_s", "expected"), [(PENDING_TIMEOUT_S - 1, []), (PENDING_TIMEOUT_S + 1, ["CRASHED"])])
def test_a_run_that_was_taken_and_never_begun_crashes(age_s: float, expected: list[str]):
    api = FakeApi(history(SCHEDULED, PENDING, age_s=age_s))
    watch(api).sweep(NOW)
    assert [state["type"] for state in api.current] == expected


@pytest.mark.parametrize(
    ("state", "pid", "expected"),
    [
        (RUNNING, "7", ["CRASHED"]),
        (PENDING, None, ["CRASHED"]),
        (CANCELLING, "7", ["CANCELLED"]),
        (RUNNING, "8", []),  # another worker has it by now
        ("COMPLETED", "7", []),
        (CRASHED, "7", []),
    ],
)
def test_the_run_of_a_dead_worker(state: str, pid: str | None, expected: list[str]):
    api = FakeApi(history(SCHEDULED, state), pid=pid)
    watch(api).crash_lost("run", {7, 9}, "box-gpu0")
    assert [found["type"] for found in api.current] == expected
    assert all(found["message"] == "its worker box-gpu0 died" for found in api.current)
