"""A stage that is called on several ranks, needs no torch, and fails on one of them in every way that a rank can."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Literal

from stages.contracts import Progress, Runtime, StageConfig, StageResult, write_atomic
from stages.errors import ConfigError
from stages.training.distributed import is_main, num_ranks, this_rank

VERSION = 1


class LearnConfig(StageConfig):
    max_devices: int = 3


class Mischief(Runtime):
    device: str = "cpu"
    devices: int | Literal["auto"] = 2
    mischief: Literal["none", "input", "fault", "memory", "exit", "kill", "wait"] = "none"
    at_rank: int = 1
    notes: Path | None = None
    """Folder where each rank tells the test its process id and its parent's."""


def learn(config: LearnConfig, *, out: Path, progress: Progress, runtime: Mischief) -> StageResult:
    if is_main():
        write_atomic(out / "begun.txt", b"")
    if runtime.notes is not None:
        write_atomic(runtime.notes / str(this_rank()), f"{os.getpid()} {os.getppid()}".encode())
    if runtime.mischief != "none":
        misbehave(runtime)
    progress.step("learn", 1, 3, unit="steps")
    progress.step("learn", 3, 3, unit="steps", loss=0.5)
    progress.warn(f"a warning of rank {this_rank()}")
    sys.stdout.write(f"a print of rank {this_rank()}\n")
    sys.stdout.flush()
    if not is_main():
        return StageResult()
    write_atomic(out / "learnt.txt", f"{num_ranks()} ranks".encode())
    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    return StageResult(metrics={"ranks": num_ranks(), "threads": threads, "nan": float("nan")}, mask_supervision=("a",))


def misbehave(runtime: Mischief) -> None:
    """Fail on one rank; the others wait for it for longer than the test does."""
    kind = runtime.mischief
    if this_rank() != runtime.at_rank:
        time.sleep(300)
    if kind == "input":
        raise ConfigError("a choice of rank 1 is wrong", ["one", "two"])
    if kind == "fault":
        raise KeyError("unforeseen")
    if kind == "memory":
        raise MemoryError
    if kind == "exit":
        os._exit(7)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)
