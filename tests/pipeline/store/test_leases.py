"""A lease has one holder at a time, ends with its holder, and a holder that lost it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.store import leases, locks
from pipeline.store.artifacts import Store
from pipeline.store.lease_places import LeaseFolder
from pipeline.store.leases import LeaseLock
from pipeline.store.locks import USE_LEASES, KeyLock
from stages.errors import EnvironmentFailure
from tests.pipeline.store.test_store import KEY, STAGE, build

HOLD = """
import os, sys, time
from pathlib import Path
from pipeline.store import leases
from pipeline.store.lease_places import LeaseFolder
if sys.argv[2] == "elsewhere":
    leases._machine = lambda: "another machine"
lock = leases.LeaseLock(LeaseFolder(Path(sys.argv[1])))
assert lock.try_acquire()
if sys.argv[2] == "fork" and os.fork() == 0:
    lock.release()  # not the child's to give
    with __import__("contextlib").suppress(Exception):
        lock.check_held()
        os._exit(1)
    os.write(1, b"refused\\n")
    os._exit(0)
os.write(1, b"%d\\n" % os.getpid())
time.sleep(60)
"""

RACE = """
import sys, time
from pathlib import Path
from pipeline.store.lease_places import LeaseFolder
from pipeline.store.leases import LeaseLock
for line in sys.stdin:
    lock = LeaseLock(LeaseFolder(Path(line.strip())))
    print(int(lock.try_acquire()), flush=True)
"""


def lease(folder: Path, **hooks) -> LeaseLock:
    return LeaseLock(LeaseFolder(folder), **hooks)


@contextmanager
def holder(folder: Path, how: str = "here") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_second_holder_is_refused_until_release_and_is_told_who_it_is(tmp_path: Path) -> None:
    first, second = lease(tmp_path / "a"), lease(tmp_path / "a")
    assert first.try_acquire()
    assert not second.try_acquire()
    assert f"process {os.getpid()} on " in second.holder()
    first.check_held()
    first.release()
    first.release()
    assert second.try_acquire()
    second.release()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["2"], "the newest generation stays, older ones go"


def test_release_is_seen_at_once(tmp_path: Path) -> None:
    first = lease(tmp_path / "a")
    assert first.try_acquire()
    threading.Timer(0.5, first.release).start()
    started = time.monotonic()
    with lease(tmp_path / "a"):
        assert time.monotonic() - started < 3


def test_holder_killed_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    with holder(tmp_path / "a") as process:
        assert not lease(tmp_path / "a").try_acquire()
        process.kill()
        process.wait()
        lock = lease(tmp_path / "a")
        assert lock.try_acquire()
        lock.release()


@pytest.mark.slow
def test_silent_holder_on_another_machine_is_replaced_within_ten_seconds_and_no_sooner(tmp_path: Path) -> None:
    heard: list[str] = []
    with holder(tmp_path / "a", "elsewhere") as process:
        waiter = lease(tmp_path / "a", waiting=heard.append)
        threading.Timer(3.0, process.kill).start()
        started = time.monotonic()
        with waiter:
            waited = time.monotonic() - started
    assert 8 < waited < 13, "killed after 3 s"
    assert len(heard) == 1
    assert f"process {process.pid} on " in heard[0]


@pytest.mark.slow
def test_patience_tells_a_living_holder_from_a_silent_one(tmp_path: Path) -> None:
    with holder(tmp_path / "a", "elsewhere") as process:
        started = time.monotonic()
        assert not lease(tmp_path / "a").try_acquire(patience_s=20)
        assert time.monotonic() - started < 4, "one heartbeat is enough"
        process.kill()
        lock = lease(tmp_path / "a")
        assert lock.try_acquire(patience_s=20)
        lock.release()


def test_of_racing_acquirers_exactly_one_wins(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        for _ in range(3)
    ]
    try:
        for number in range(40):
            folder = tmp_path / str(number)
            if number % 2:  # over a lease that was released, too
                before = lease(folder)
                assert before.try_acquire()
                before.release()
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(f"{folder}\n")
                racer.stdin.flush()
            won = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
            assert sorted(won) == ["0", "0", "1"], number
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def take_over(folder: Path) -> None:
    """What a waiter does that saw nothing of the holder for long enough."""
    newest = max(LeaseFolder(folder).generations())
    assert LeaseFolder(folder).create(newest + 1, json.dumps({"pid": 1, "host": "other", "since": "now"}).encode())
    LeaseFolder(folder).remove(newest)


def test_holder_that_lost_the_lock_is_told_and_must_not_publish(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    told = threading.Event()
    heard: list[EnvironmentFailure] = []
    lock = lease(tmp_path / "a", lost=lambda error: (heard.append(error), told.set()))
    assert lock.try_acquire()
    lock.check_held()
    take_over(tmp_path / "a")
    assert told.wait(5)
    assert "another worker has taken over the lock" in heard[0].message
    with pytest.raises(EnvironmentFailure, match="another worker has taken over"):
        lock.check_held()
    lock.release()
    assert LeaseFolder(tmp_path / "a").generations() == [2], "what the other holds is left alone"
    assert b"released" not in (LeaseFolder(tmp_path / "a").read(2) or b"")


def test_check_finds_the_loss_without_waiting_for_a_heartbeat(tmp_path: Path) -> None:
    lock = lease(tmp_path / "a")
    assert lock.try_acquire()
    take_over(tmp_path / "a")
    with pytest.raises(EnvironmentFailure, match="another worker has taken over"):
        lock.check_held()
    lock.release()


def test_place_that_was_away_for_a_while_costs_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    is_away = threading.Event()
    replace = LeaseFolder.replace

    def flaky(self: LeaseFolder, generation: int, data: bytes) -> bool:
        if is_away.is_set():
            raise OSError(5, "Input/output error")
        return replace(self, generation, data)

    monkeypatch.setattr(LeaseFolder, "replace", flaky)
    lock = lease(tmp_path / "a")
    assert lock.try_acquire()
    is_away.set()
    time.sleep(0.3)
    with pytest.raises(EnvironmentFailure, match=r"cannot be used \(Input/output error\)"):
        lock.check_held()
    is_away.clear()
    lock.check_held()
    lock.release()


def test_number_that_was_won_and_cleared_away_is_not_won_again(tmp_path: Path, monkeypatch) -> None:
    """An acquirer that stood still between its look and its create."""
    place = LeaseFolder(tmp_path / "a")
    assert place.create(1, json.dumps({"released": True}).encode())
    slow = lease(tmp_path / "a")
    create = LeaseFolder.create

    def late(self: LeaseFolder, generation: int, data: bytes) -> bool:
        monkeypatch.setattr(LeaseFolder, "create", create)
        for number in (2, 3):
            assert create(self, number, b"{}")
            self.remove(number - 1)
        return create(self, generation, data)

    monkeypatch.setattr(LeaseFolder, "create", late)
    assert not slow.try_acquire()
    assert place.generations() == [3]


def test_forked_child_neither_holds_nor_releases(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "a"), "fork"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        try:
            assert process.stdout is not None
            assert {process.stdout.readline().strip() for _ in range(2)} == {"refused", str(process.pid)}
            assert not lease(tmp_path / "a").try_acquire()
        finally:
            process.kill()


def test_half_written_lease_is_held_until_it_is_stale(tmp_path: Path, monkeypatch) -> None:
    LeaseFolder(tmp_path / "a").create(1, b"")
    lock = lease(tmp_path / "a")
    assert not lock.try_acquire()
    monkeypatch.setattr(leases, "STALE_S", 0.1)
    time.sleep(0.2)
    assert lock.try_acquire()
    lock.release()


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure, match=r"file/a cannot be used \(Not a directory\); choose --artifacts DIR"):
        lease(tmp_path / "file" / "a").try_acquire()


# ---------------------------------------------------------------------------------------------------------------------
# In place of flock
# ---------------------------------------------------------------------------------------------------------------------


def test_file_system_without_flock_gets_leases_and_says_so_once(tmp_path: Path, monkeypatch, capsys) -> None:
    def no_flock(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", no_flock)
    first, second = KeyLock(tmp_path / "locks" / "a"), KeyLock(tmp_path / "locks" / "a")
    assert first.try_acquire()
    assert not second.try_acquire()
    assert f"process {os.getpid()} on " in second.holder()
    first.check_held()
    other = KeyLock(tmp_path / "locks" / "b")
    assert other.try_acquire()
    said = capsys.readouterr().err
    assert said.count("this file system has no flock (Operation not supported); using leases there") == 1
    monkeypatch.undo()
    assert not KeyLock(tmp_path / "locks" / "a").try_acquire(), "a machine where flock works sees the lease too"
    first.release()
    other.release()
    assert second.try_acquire()
    second.release()


def test_user_can_ask_for_leases(tmp_path: Path) -> None:
    (tmp_path / USE_LEASES).touch()
    lock = KeyLock(tmp_path / "a")
    assert lock.try_acquire()
    assert LeaseFolder(tmp_path / "a.lease").generations() == [1]
    lock.release()


def test_build_that_lost_its_lease_is_told_and_publishes_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    store, told = Store(tmp_path), threading.Event()
    store.on_lost = lambda error: told.set()
    (tmp_path / ".locks").mkdir()
    (tmp_path / ".locks" / USE_LEASES).touch()
    with store.lock(STAGE, KEY):
        build(store)
        take_over(tmp_path / ".locks" / f"{STAGE}-{KEY}.lease")
        assert told.wait(5)
        with pytest.raises(EnvironmentFailure, match="another worker has taken over the lock"):
            build(store, text="of a worker that stood still")
    artifact = store.require(STAGE, KEY)
    assert (artifact.path / "masks" / "a.png").read_text() == "mask"


def test_check_of_a_lock_that_was_never_taken_or_given_back(tmp_path: Path) -> None:
    lock = KeyLock(tmp_path / "a")
    with pytest.raises(EnvironmentFailure, match="does not hold the lock"):
        lock.check_held()
    assert lock.try_acquire()
    lock.check_held()
    lock.release()
    with pytest.raises(EnvironmentFailure, match="does not hold the lock"):
        lock.check_held()


def test_stopped_holder_learns_of_its_loss_when_it_goes_on(tmp_path: Path, monkeypatch) -> None:
    with holder(tmp_path / "a", "elsewhere") as process:
        process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(leases, "STALE_S", 0.3)
        lock = lease(tmp_path / "a")
        assert not lock.try_acquire()
        time.sleep(0.4)
        assert lock.try_acquire()
        process.send_signal(signal.SIGCONT)
        time.sleep(2.5)
        lock.check_held()
        lock.release()
        assert LeaseFolder(tmp_path / "a").generations() == [2], "the old holder wrote nothing over it"
