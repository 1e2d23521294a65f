"""benchmarks/train_step.py prints its document; the times are not judged here, that both loops do the same is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_it_prints_its_document_and_both_loops_have_the_same_losses():
    command = [sys.executable, "benchmarks/train_step.py", "--quick", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["benchmark"] == "train_step"
    assert {"hardware", "commit", "milliseconds", "rounds"} <= document.keys()
    assert len(document["ratios"]) == 2
    for ratio in document["ratios"]:
        assert ratio.keys() == {"name", "value", "kind", "target", "met"}
        assert (ratio["kind"], ratio["target"], ratio["met"]) == ("cost", 1.05, ratio["value"] <= 1.05)
    assert all(0 <= difference < 5e-3 for difference in document["largest_difference_of_losses"].values())
