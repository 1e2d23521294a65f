"""Kill a tiny run of all six stages at a step of publishing or at any moment, let it go on, and compare every byte.

    OMP_NUM_THREADS=1 python -m tests.faults.killed_runs FOLDER ROUNDS [SEED]

A round kills a run once or twice, with a store of its own, and then lets it end.  Odd rounds kill just before the n-th
thing that the run does to its store (a file opened to write, fsync, rename, removal, a lock), spread evenly over all of
them; even rounds kill at a random moment.  Prints a line of JSON for each round, ``problems`` empty where nothing was
lost and nothing is wrong.  Stages run in forks of this process, which has imported torch once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.pipeline.whole_runs.tiny_run import tiny_yaml

CONFIG = "tiny.yaml"
DEADLINE_S = 300.0
"""Most seconds of one run; more is a hang."""

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


class Steps:
    """Counts what this process does to a folder, and kills it just before a certain step."""

    def __init__(self, root: Path, kill_at: int | None) -> None:
        """Begin to count; there is no end but the process's."""
        self.count, self._root, self._kill_at = 0, str(root), kill_at
        sync = os.fsync

        def counted_sync(descriptor: int) -> None:
            self._step()
            sync(descriptor)

        os.fsync = counted_sync
        sys.addaudithook(self._hear)

    def _hear(self, event: str, words: tuple[Any, ...]) -> None:
        is_change = event in _CHANGES or (
            event == "open" and words[2] is not None and words[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if event == "fcntl.flock" or (is_change and str(words[0]).startswith(self._root)):
            self._step()

    def _step(self) -> None:
        self.count += 1
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def run_once(folder: Path, kill_at: int | None) -> None:
    """The whole run in this process; writes how many steps it took, and its metrics."""
    import pipeline.engine.run
    from pipeline.config.run_config import load_config
    from pipeline.store.artifacts import open_store
    from tests.pipeline.whole_runs.here import run_here

    pipeline.engine.run.run_child = run_here
    steps = Steps(folder / "artifacts", kill_at)
    run = pipeline.engine.run.Run(load_config(folder / CONFIG, []), open_store(folder / "artifacts"))
    outcome = run.run_pipeline()
    (folder / "end.json").write_text(json.dumps({"steps": steps.count, "metrics": outcome.metrics}))


def in_a_fork(body: Callable[[], None], *, kill_after_s: float | None = None) -> bool:
    """Whether ``body`` came to its end in a process of its own; False where that was killed.

    Raises:
        RuntimeError: it failed or hung.
    """
    if (child := os.fork()) == 0:
        try:
            body()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    timer = threading.Timer(DEADLINE_S if kill_after_s is None else kill_after_s, os.kill, (child, signal.SIGKILL))
    timer.start()
    started = time.monotonic()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    if os.WIFSIGNALED(status) and time.monotonic() - started < DEADLINE_S:
        return False
    if status:
        raise RuntimeError(f"a run ended with status {status}")
    return True


def read_store(folder: Path) -> dict[str, object]:
    """Every file of every artifact by its name; of a manifest what is identical for identical results."""
    found: dict[str, object] = {}
    for path in (folder / "artifacts").glob("*/*/**/*"):
        stage, key = path.relative_to(folder / "artifacts").parts[:2]
        if path.is_file() and not stage.startswith(".") and not key.startswith("."):
            name = path.relative_to(folder).as_posix()
            found[name] = (
                json.loads(path.read_bytes())["content"] if path.name == "manifest.json" else path.read_bytes()
            )
    return found


def compare(quiet: Path, folder: Path) -> list[str]:
    """What the killed run lost, and what is not as in the quiet one."""
    from pipeline.store.artifacts import open_store

    expected, found = read_store(quiet), read_store(folder)
    problems = [f"lost: {name}" for name in expected.keys() - found.keys()]
    problems += [f"more: {name}" for name in found.keys() - expected.keys()]
    problems += [f"wrong: {name}" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    ends = [json.loads((each / "end.json").read_text())["metrics"] for each in (quiet, folder)]
    if ends[0] != ends[1]:
        problems.append("wrong: the metrics")
    store = open_store(folder / "artifacts")
    for place in store.folders():
        problems += store.verify(*place)
    return sorted(problems)


def rounds(folder: Path, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Do ``count`` rounds in ``folder``; what was killed when, and what became of it."""
    import torch  # noqa: F401 - once, for all forks

    import stages.evaluate
    import stages.train_classifier
    import stages.train_segmenter  # noqa: F401

    draw, quiet = random.Random(seed), folder / "quiet"
    quiet.mkdir(parents=True)
    (quiet / CONFIG).write_text(tiny_yaml())
    started = time.monotonic()
    in_a_fork(lambda: run_once(quiet, None))
    seconds, steps = time.monotonic() - started, json.loads((quiet / "end.json").read_text())["steps"]
    for number in range(count):
        here = folder / f"round{number}"
        here.mkdir()
        shutil.copy(quiet / CONFIG, here)
        kills: list[str] = []
        for again in range(draw.choice((1, 1, 2))):
            if number % 2 and not again:
                at = 1 + int((number // 2 + draw.random()) * steps / max(1, count // 2))
                done = in_a_fork(lambda here=here, at=at: run_once(here, at))
                kills.append(f"step {at} of {steps}{' (not reached)' if done else ''}")
            else:
                after = draw.uniform(0.0, seconds)
                done = in_a_fork(lambda here=here: run_once(here, None), kill_after_s=after)
                kills.append(f"after {after:.2f} of {seconds:.2f} s{' (not reached)' if done else ''}")
        in_a_fork(lambda here=here: run_once(here, None))
        yield {"round": number, "kills": kills, "problems": compare(quiet, here)}
        shutil.rmtree(here)


if __name__ == "__main__":
    for found in rounds(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0):
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
