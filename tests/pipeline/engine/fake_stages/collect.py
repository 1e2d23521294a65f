"""A stage that writes one file per item, and can fail in every way that a stage can fail."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from stages.contracts import Part, Progress, Runtime, StageConfig, StageResult, write_atomic
from stages.errors import DataError

VERSION = 3


class CollectConfig(StageConfig):
    items: int = 3
    supervised: tuple[str, ...] = ()


class Mischief(Runtime):
    """What goes wrong; like all of ``runtime`` it is in no key."""

    mischief: Literal["none", "input", "fault", "disk", "exit", "kill", "noise", "offspring"] = "none"
    at_item: int = 1
    notes: Path | None = None
    """Where the stage tells the test its process ids."""
    item_s: float = 0.0
    """How long an item takes."""
    diary: Path | None = None
    """Where every item that is made gets a line: process id and number."""


def collect(
    config: CollectConfig, *, out: Path, progress: Progress, runtime: Mischief, part: Part | None = None
) -> StageResult:
    wanted = range(config.items) if part is None else part.positions(config.items)
    done = [number for number in wanted if (out / f"{number}.txt").exists()]
    count = len(done)
    progress.step("collect", count, len(wanted), unit="items")
    for number in wanted:
        if number in done:
            continue
        if number == runtime.at_item:
            misbehave(runtime, out)
        make_item(number, out, runtime)
        count += 1
        progress.step("collect", count, len(wanted), unit="items", loss=1.0 / (number + 1))
    if part is not None:
        if runtime.mischief == "noise":
            progress.warn(f"part {part.index} was noisy")
            progress.warn("this was noisy")
        return StageResult()
    if runtime.mischief == "noise":
        progress.warn("this was noisy")
    return StageResult(
        metrics={"collect.items": config.items, "collect.nan": float("nan")}, mask_supervision=config.supervised
    )


def make_item(number: int, out: Path, runtime: Mischief) -> None:
    time.sleep(runtime.item_s)
    write_atomic(out / f"{number}.txt", f"item {number}\n".encode())
    if runtime.diary is not None:
        with runtime.diary.open("a") as diary:
            diary.write(f"{os.getpid()} {number}\n")


def misbehave(runtime: Mischief, out: Path) -> None:
    kind = runtime.mischief
    if kind == "input":
        raise DataError("two images are damaged", ["a.jpg: truncated", "b.jpg: empty"])
    if kind == "fault":
        raise KeyError("unforeseen")
    if kind == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", str(out / "x"))
    if kind == "exit":
        os._exit(7)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "noise":
        sys.stdout.write("stray print\n")
        sys.stdout.flush()
        os.system("echo from a subprocess")
    if kind == "offspring":
        wait_with_offspring(runtime)


def wait_with_offspring(runtime: Mischief) -> None:
    """Wait to be killed, beside a forked worker that ignores SIGTERM and a spawned one."""
    forked = os.fork()
    if forked == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        os._exit(0)
    spawned = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert runtime.notes is not None
    write_atomic(runtime.notes, f"{os.getpid()} {forked} {spawned.pid}".encode())
    time.sleep(60)
