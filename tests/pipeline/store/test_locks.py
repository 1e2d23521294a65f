"""A key's lock has one holder at a time, of either kind, and ends with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest

from pipeline.store import locks
from pipeline.store.artifacts import Store
from pipeline.store.locks import USE_LEASES, ArtifactLock
from stages.errors import EnvironmentFailure
from tests.pipeline.store.test_store import KEY, STAGE, build

HOLD = """
import os, sys, time
from pathlib import Path
from pipeline.store import locks
from filelock import _identity, _marker
locks.LEASE_S, locks.HEARTBEAT_S = 2.0, 0.3
if sys.argv[2] == "elsewhere":
    _marker.host_name = lambda: "another-machine"
lock = locks.ArtifactLock(Path(sys.argv[1]))
with lock:
    if sys.argv[2] != "fork":
        print(os.getpid(), flush=True)
    elif os.fork() == 0:  # the fork reports: what it inherited is closed by then
        lock.release()  # not its to give
        print(os.getpid() if not lock.is_held else "held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["flock", "lease"])
def path(request, tmp_path: Path, monkeypatch) -> Path:
    """A lock file, for each kind of lock."""
    if request.param == "lease":
        use_leases(tmp_path, monkeypatch)
    return tmp_path / "a"


@pytest.fixture
def leased(tmp_path: Path, monkeypatch) -> Path:
    use_leases(tmp_path, monkeypatch)
    return tmp_path / "a"


def use_leases(folder: Path, monkeypatch) -> None:
    (folder / USE_LEASES).touch()
    monkeypatch.setattr(locks, "LEASE_S", 2.0)
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.3)


@contextmanager
def holder(path: Path, how: str = "alone") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the lock, and the process id that reports."""
    command = [sys.executable, "-c", HOLD, str(path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_second_holder_is_refused_until_release_and_is_told_who_it_is(path: Path) -> None:
    first, second = ArtifactLock(path), ArtifactLock(path)
    assert first.try_acquire()
    assert first.is_held
    first.check_held()
    assert not second.try_acquire()
    assert not second.is_held
    assert f"process {os.getpid()} on " in second.holder()
    assert " since 2" in second.holder()
    first.release()
    first.release()
    assert second.try_acquire()
    second.release()


def test_waiter_takes_over_at_once_when_the_holder_is_killed_and_is_told_of_it_once(path: Path) -> None:
    heard: list[str] = []
    with holder(path) as (process, _):

        def waiting(words: str) -> None:
            heard.append(words)
            process.kill()
            process.wait()

        started = time.monotonic()
        with ArtifactLock(path, waiting=waiting):
            assert time.monotonic() - started < 1.5
    assert len(heard) == 1
    assert f"process {process.pid} on " in heard[0]


def test_forked_worker_that_outlives_the_holder_neither_holds_nor_releases(path: Path) -> None:
    with holder(path, "fork") as (process, worker):
        try:
            assert not ArtifactLock(path).try_acquire()
            process.kill()
            process.wait()
            os.kill(worker, 0)  # still there
            lock = ArtifactLock(path)
            assert lock.try_acquire()
            lock.release()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_check_of_a_lock_that_was_never_taken_or_given_back(path: Path) -> None:
    lock = ArtifactLock(path)
    with pytest.raises(EnvironmentFailure, match="does not hold the lock"):
        lock.check_held()
    assert lock.try_acquire()
    lock.release()
    with pytest.raises(EnvironmentFailure, match="does not hold the lock"):
        lock.check_held()


def test_parts_of_one_artifact_are_locked_apart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lock(STAGE, KEY) as whole, store.lock(STAGE, KEY, part="1of2"), store.lock(STAGE, KEY, part="2of2"):
        assert whole.is_held
        assert not Store(tmp_path).lock(STAGE, KEY, part="2of2").try_acquire()
        assert not Store(tmp_path).lock(STAGE, KEY).try_acquire()
    assert (tmp_path / ".locks" / f"{STAGE}-{KEY}.1of2").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Leases
# ---------------------------------------------------------------------------------------------------------------------


def test_silent_holder_on_another_machine_is_replaced_after_the_lease_and_no_sooner(leased: Path) -> None:
    with holder(leased, "elsewhere") as (process, _):
        assert not ArtifactLock(leased).try_acquire(patience_s=10), "a heartbeat within the patience: it is alive"
        process.kill()
        started = time.monotonic()
        with ArtifactLock(leased):
            assert 1.5 < time.monotonic() - started < 5
        lock = ArtifactLock(leased)
        assert lock.try_acquire(patience_s=10)
        lock.release()


def test_holder_that_stood_still_learns_of_its_loss_and_leaves_the_lock_to_the_other(leased: Path) -> None:
    with holder(leased, "elsewhere") as (process, _):
        process.send_signal(signal.SIGSTOP)
        with ArtifactLock(leased) as lock:
            process.send_signal(signal.SIGCONT)
            time.sleep(1.0)
            lock.check_held()
            assert not ArtifactLock(leased).try_acquire()


def take_over(path: Path) -> None:
    """What a waiter does that saw nothing of the holder for long enough."""
    lease = Path(f"{path}.lease")
    text = lease.read_text()
    lease.unlink()
    lease.write_text(text.replace("token=", "token=0"))


def test_build_that_lost_its_lease_is_told_and_publishes_nothing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / ".locks").mkdir()
    use_leases(tmp_path / ".locks", monkeypatch)
    store, told = Store(tmp_path), threading.Event()
    heard: list[EnvironmentFailure] = []
    store.on_lost = lambda error: (heard.append(error), told.set())
    with store.lock(STAGE, KEY):
        build(store)
        take_over(tmp_path / ".locks" / f"{STAGE}-{KEY}")
        with pytest.raises(EnvironmentFailure, match="may have taken over the lock; nothing was published"):
            build(store, text="of a worker that stood still")
        assert told.wait(5)
    assert "the lease was lost" in heard[0].message
    assert (store.require(STAGE, KEY).path / "masks" / "a.png").read_text() == "mask"
    assert Path(tmp_path / ".locks" / f"{STAGE}-{KEY}.lease").exists(), "what the other holds is left alone"


# ---------------------------------------------------------------------------------------------------------------------
# Places where something is wrong
# ---------------------------------------------------------------------------------------------------------------------


def test_file_system_without_flock_gets_leases_and_says_so_once(tmp_path: Path, monkeypatch, capsys) -> None:
    def no_flock(descriptor: int) -> bool:
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(filelock._unix, "lock_fd_nonblocking", no_flock)
        first, second = ArtifactLock(tmp_path / "locks" / "a"), ArtifactLock(tmp_path / "locks" / "a")
        assert first.try_acquire()
        assert not second.try_acquire()
        first.check_held()
        with ArtifactLock(tmp_path / "locks" / "b"):
            pass
    assert capsys.readouterr().err.count("no flock here (Operation not supported); using leases from now on") == 1
    assert not ArtifactLock(tmp_path / "locks" / "a").try_acquire(), "a machine where flock works sees the lease too"
    first.release()


def occupy(path: Path) -> None:
    path.parent.write_text("")


def forbid(path: Path) -> None:
    path.mkdir(parents=True)


@pytest.mark.parametrize("spoil", [occupy, forbid])
@pytest.mark.parametrize("has_flock", [True, False])
def test_place_that_cannot_be_written_is_named(
    tmp_path: Path, spoil: Callable[[Path], None], has_flock: bool, monkeypatch
) -> None:
    spoil(tmp_path / "locks" / ("a" if has_flock else "a.lease"))
    if not has_flock:
        monkeypatch.setattr(ArtifactLock, "_uses_leases", True)
    with pytest.raises(EnvironmentFailure, match=r"locks/a cannot be opened and locked \(.*\).*--artifacts DIR"):
        ArtifactLock(tmp_path / "locks" / "a").try_acquire()


def test_two_kinds_of_locks_on_one_store_are_refused(tmp_path: Path) -> None:
    lock = ArtifactLock(tmp_path / "a")
    assert lock.try_acquire()
    (tmp_path / USE_LEASES).touch()
    with pytest.raises(EnvironmentFailure, match="held by flock, but use-leases was made beside it meanwhile"):
        lock.check_held()
    lock.release()
    with lock:
        lock.check_held()
        (tmp_path / USE_LEASES).unlink()
        with pytest.raises(EnvironmentFailure, match=r"a\.lease: expected no lease, .* make that file again"):
            ArtifactLock(tmp_path / "a").try_acquire()


def test_lease_that_names_no_holder_is_waited_for_and_then_refused(leased: Path, monkeypatch) -> None:
    monkeypatch.setattr(locks, "LEASE_S", 0.4)
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.1)
    Path(f"{leased}.lease").write_text("")
    started = time.monotonic()
    with pytest.raises(EnvironmentFailure, match="found a file that names no holder"), ArtifactLock(leased):
        pass
    assert time.monotonic() - started > 0.4


def test_lease_with_other_settings_is_refused(leased: Path, monkeypatch) -> None:
    with ArtifactLock(leased):
        monkeypatch.setattr(locks, "LEASE_S", 30.0)
        with pytest.raises(EnvironmentFailure, match=r"cannot be opened and locked \(.*must agree on lease_duration"):
            ArtifactLock(leased).try_acquire()
