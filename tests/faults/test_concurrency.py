"""Eight processes on one store, each with runs, prunes and verifies at random: nothing is lost, no alarm is false."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline.store.artifacts import Store

NUM_PROCESSES = 8
SECONDS = float(os.environ.get("WSSS_FAULTS_SECONDS", "20"))
"""Of work; the long trial takes 300."""


@pytest.mark.slow
def test_runs_prunes_and_verifies_side_by_side(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("store_worker.py"))
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(tmp_path / "artifacts"), str(seed), str(SECONDS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for seed in range(NUM_PROCESSES)
    ]
    done: Counter[str] = Counter()
    wrong: list[str] = []
    for worker in workers:
        out, error = worker.communicate(timeout=SECONDS + 200)
        assert worker.returncode == 0, error
        found = json.loads(out)
        done.update(found["done"])
        wrong += found["wrong"]
    print(f"{SECONDS} s:", dict(done), "wrong:", len(wrong))  # noqa: T201 - shown by pytest -s
    assert not wrong, f"{len(wrong)} of {done}:\n" + "\n".join(wrong[:5])
    assert min(done[name] for name in ("run", "prune", "verify")) >= NUM_PROCESSES, done
    store = Store(tmp_path / "artifacts")
    assert [problem for place in store.folders() for problem in store.verify(*place)] == []
