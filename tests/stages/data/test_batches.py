"""Reading ahead: the order, the bound, errors, and worker processes that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from stages.data.batches import iterate_batches
from stages.errors import DataError, EnvironmentFailure

KEYS = [[(epoch, index) for index in range(first, first + 3)] for epoch in range(4) for first in (0, 3, 6)]


@dataclass
class Numbers:
    """Sample (epoch, index) is its own content; odd batches take longer, so that workers overtake each other."""

    slow: bool = False
    read: list = field(default_factory=list)

    def __len__(self):
        return 9

    def get(self, index, epoch):
        if self.slow and index < 3:
            time.sleep(0.02)
        self.read.append((epoch, index))
        return {"key": np.array([epoch, index]), "label": np.float32(index / 2)}


class Unreadable(Numbers):
    def get(self, index, epoch):
        if (epoch, index) == (1, 4):
            raise DataError("cannot read two files", ["a.jpg", "b.jpg"])
        return super().get(index, epoch)


class Deadly(Numbers):
    def get(self, index, epoch):
        os._exit(9)


def keys_of(batches):
    return [[tuple(key) for key in batch["key"].tolist()] for batch in batches]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_come_in_order(workers):
    batches = list(iterate_batches(Numbers(slow=True), KEYS, workers=workers))
    assert keys_of(batches) == KEYS
    assert batches[1]["label"].tolist() == [1.5, 2.0, 2.5]
    assert batches[1]["label"].dtype == np.float32


def test_reading_ahead_is_bounded_and_ends_with_the_reader():
    dataset = Numbers()
    before = threading.active_count()
    batches = iterate_batches(dataset, iter(KEYS), workers=2)
    next(batches)
    time.sleep(0.1)
    assert len(dataset.read) <= 3 * 5  # the one that was taken and 2 x 2 ahead
    batches.close()
    assert threading.active_count() == before


def test_no_worker_reads_nothing_ahead():
    dataset = Numbers()
    batches = iterate_batches(dataset, iter(KEYS), workers=0)
    next(batches)
    assert dataset.read == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(("workers", "processes"), [(0, False), (2, False), (1, True)])
def test_an_error_arrives_at_its_batch_with_all_problems(workers, processes):
    batches = iterate_batches(Unreadable(), KEYS, workers=workers, processes=processes)
    assert keys_of(next(batches) for _ in range(4)) == KEYS[:4]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert caught.value.problems == ("a.jpg", "b.jpg")


def test_processes_give_the_same_batches():
    assert keys_of(iterate_batches(Numbers(), KEYS, workers=2, processes=True)) == KEYS


def test_a_dead_process_is_an_environment_failure():
    with pytest.raises(EnvironmentFailure, match=r"died .killed for memory.*lower runtime.workers"):
        list(iterate_batches(Deadly(), KEYS, workers=1, processes=True))


PARENT = """
import os, sys, time
import numpy as np
from stages.data.batches import iterate_batches

class Pids:
    def __len__(self): return 1
    def get(self, index, epoch): return {"pid": np.array(os.getpid())}

if __name__ == "__main__":
    batches = iterate_batches(Pids(), [[(e, 0)] for e in range(100)], workers=2, processes=True)
    print(int(next(batches)["pid"][0]), flush=True)
    time.sleep(60)
"""


def test_worker_processes_end_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(os.getcwd())}  # noqa: PTH109 - the checkout
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 10
        while _is_running(worker):
            assert time.monotonic() < deadline, f"worker {worker} outlives its killed parent"
            time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        from pathlib import Path

        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
