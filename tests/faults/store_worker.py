"""One of several processes on one store: runs, prunes and verifies at random, and says what went wrong.

``python store_worker.py STORE SEED SECONDS``; prints one JSON document.  Stages are the fake ones, in this process.
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipeline" / "engine")]

from fake_stages.table import TABLE, FakeRun  # noqa: E402 - found only now

from pipeline.engine import run as runs  # noqa: E402
from pipeline.engine.outcomes import RunOutcome  # noqa: E402
from pipeline.engine.records import prune, read_runs  # noqa: E402
from pipeline.store.artifacts import Store  # noqa: E402
from stages.contracts import read_json  # noqa: E402
from tests.pipeline.whole_runs.here import run_here  # noqa: E402


class Worker:
    """What one process does, and what it found wrong."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def work(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            (action,) = self.random.choices([self.run, self.prune, self.verify], weights=[6, 2, 2])
            self.done[action.__name__] += 1
            try:
                action()
            except Exception:
                self.wrong.append(f"{action.__name__}: {traceback.format_exc()}")

    def run(self) -> None:
        """A run of one of a few configs, which share artifacts; at its end all that it used must be right."""
        items, factor = self.random.choice([3, 4]), float(self.random.choice([1, 2, 3]))
        pause_s = self.random.choice([0.0, 0.02])
        config = FakeRun.model_validate(
            {
                "name": self.random.choice("ab"),
                "collect": {"items": items},
                "combine": {"factor": factor},
                "runtime": {"item_s": pause_s},
            }
        )
        store = Store(self.root)
        plan_of = runs.Run(config, store, table=TABLE)

        def check(outcome: RunOutcome) -> None:
            time.sleep(pause_s)
            paths = {
                stage.stage: Store(self.root).require(stage.stage, str(stage.key)).path for stage in outcome.stages
            }
            expected = {"texts": [f"item {number}\n" for number in range(items)], "factor": factor, "root": "None"}
            if read_json(paths["combine"] / "sub" / "combined.json") != expected:
                self.wrong.append(f"run: wrong content in {paths['combine']}")

        force = [self.random.choice(TABLE.names)] if self.random.random() < 0.1 else []
        plan_of.run_pipeline(force=force, then=check)

    def prune(self) -> None:
        prune(Store(self.root), keep=self.random.choice([0, 1, 2, None]), dry_run=self.random.random() < 0.2)

    def verify(self) -> None:
        store = Store(self.root)
        self.wrong += [f"verify: {problem}" for place in store.folders() for problem in store.verify(*place)]
        read_runs(store, damaged=self.wrong.append)


if __name__ == "__main__":
    runs.run_child = run_here
    worker = Worker(Path(sys.argv[1]), int(sys.argv[2]))
    worker.work(float(sys.argv[3]))
    print(json.dumps({"done": worker.done, "wrong": worker.wrong}))  # noqa: T201 - the answer
