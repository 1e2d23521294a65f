"""A key's lock ends with its holder, however the holder ends, and whatever it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.store.locks import KeyLock
from stages.errors import EnvironmentFailure

HOLD = """
import os, sys, time
from pathlib import Path
from pipeline.store.locks import KeyLock
with KeyLock(Path(sys.argv[1])):
    if sys.argv[2] != "fork" or os.fork() == 0:  # the fork itself reports: what it inherited is closed by then
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def hold(path: Path, how: str = "alone") -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), how], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_second_holder_is_refused_until_release(tmp_path: Path) -> None:
    first, second = KeyLock(tmp_path / "locks" / "a"), KeyLock(tmp_path / "locks" / "a")
    assert first.try_acquire()
    assert not second.try_acquire()
    assert f"process {os.getpid()} on " in second.holder()
    first.release()
    first.release()
    assert second.try_acquire()
    second.release()


def test_waiting_is_said_once_and_names_the_holder(tmp_path: Path) -> None:
    process, _ = hold(tmp_path / "a")
    heard: list[str] = []

    def waiting(holder: str) -> None:
        heard.append(holder)
        os.kill(process.pid, signal.SIGKILL)

    started = time.monotonic()
    with KeyLock(tmp_path / "a", waiting=waiting):
        assert time.monotonic() - started < 5
    assert len(heard) == 1
    assert f"process {process.pid} on " in heard[0]
    process.communicate()


def test_forked_worker_that_outlives_the_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    process, worker = hold(tmp_path / "a", "fork")
    try:
        assert not KeyLock(tmp_path / "a").try_acquire()
        process.kill()
        process.wait()
        os.kill(worker, 0)  # still there
        lock = KeyLock(tmp_path / "a")
        assert lock.try_acquire()
        lock.release()
    finally:
        os.kill(worker, signal.SIGKILL)
        process.communicate()


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure, match=r"file/locks/a cannot be opened .*--artifacts DIR"):
        KeyLock(tmp_path / "file" / "locks" / "a").try_acquire()
