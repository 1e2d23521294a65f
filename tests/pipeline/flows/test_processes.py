"""Processes that outlive their starter: recognised by pid and start, found by a mark, ended without doubt."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.flows import processes
from pipeline.flows.processes import ProcessId, end, find_marked, freeze, identify, is_running, parent_of, spawn

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def start(tmp_path: Path, *command: str, **variables: str) -> ProcessId:
    return spawn(command or SLEEP, {**os.environ, **variables}, tmp_path / "logs" / "process.log")


def test_a_process_is_its_pid_and_its_start(tmp_path: Path):
    process = start(tmp_path)
    assert is_running(process)
    assert identify(process.pid) == process
    recycled = ProcessId(process.pid, process.started + "1")
    assert not is_running(recycled)
    assert end([recycled], grace_s=0.0) == []
    assert is_running(process), "another process of the same pid was ended"
    assert end([process], grace_s=5.0) == []
    assert not is_running(process)


def test_start_and_state_are_the_same_by_ps_where_there_is_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "PROC", tmp_path / "none")
    process = start(tmp_path, WSSS_TEST_MARK="by-ps")
    assert is_running(process)
    time.sleep(0.2)  # until the program is the one that was asked for
    assert list(find_marked("WSSS_TEST_MARK", "by-ps")) == [process]
    assert parent_of(process.pid) == os.getpid()
    end([process], grace_s=5.0)
    assert identify(process.pid) is None


def test_nobody_is_no_process():
    assert identify(0) is None
    assert identify(-1) is None
    assert not is_running(None)


def test_a_zombie_does_not_run():
    child = subprocess.Popen([sys.executable, "-c", ""])
    end_s = time.monotonic() + 10
    while identify(child.pid) is not None and time.monotonic() < end_s:
        time.sleep(0.02)
    assert identify(child.pid) is None
    child.wait()


def test_a_process_that_will_not_end_is_killed(tmp_path: Path):
    process = start(tmp_path, sys.executable, "-c", STUBBORN)
    log = tmp_path / "logs" / "process.log"
    while "ready" not in log.read_text():
        time.sleep(0.02)
    assert end([process], grace_s=0.2) == [process]
    assert not is_running(process)


def test_a_frozen_process_is_killed_too(tmp_path: Path):
    process = start(tmp_path)
    assert freeze(process)
    assert is_running(process)
    end([process], grace_s=0.0)
    assert not is_running(process)


def test_what_a_marked_process_starts_in_another_session_is_found(tmp_path: Path):
    code = f"import subprocess, time; subprocess.Popen({SLEEP!r}, start_new_session=True); time.sleep(60)"
    parent = start(tmp_path, sys.executable, "-c", code, WSSS_TEST_MARK="tree")
    end_s = time.monotonic() + 10
    while len(find_marked("WSSS_TEST_MARK", "tree")) < 2 and time.monotonic() < end_s:
        time.sleep(0.05)
    end([parent], grace_s=5.0)
    (orphan, environment), *others = find_marked("WSSS_TEST_MARK", "tree").items()
    assert others == []
    assert environment["PATH"] == os.environ["PATH"]
    end([orphan], grace_s=5.0)
    assert find_marked("WSSS_TEST_MARK", "tree") == {}


def test_a_long_log_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 5)
    log = tmp_path / "logs" / "process.log"
    log.parent.mkdir()
    log.write_text("a long log")
    end([start(tmp_path)], grace_s=5.0)
    assert log.read_text() == ""
    assert log.with_name("process.log.1").read_text() == "a long log"
