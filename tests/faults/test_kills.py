"""Runs that are killed lose nothing: see ``killed_runs``.  WSSS_KILL_ROUNDS=200 tries more than the usual sample."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.killed_runs import compare, in_a_fork
from tests.pipeline.flows.clusters import ROOT, environment

ROUNDS = int(os.environ.get("WSSS_KILL_ROUNDS", "20"))


@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * ROUNDS)
@pytest.mark.skipif(sys.platform != "linux", reason="fork after torch was imported")
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(tmp_path: Path):
    words = [sys.executable, "-m", "tests.faults.killed_runs", str(tmp_path), str(ROUNDS)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == ROUNDS
    assert [each for each in found if each["problems"]] == []
    kills = [kill for each in found for kill in each["kills"]]
    assert sum("not reached" not in kill for kill in kills) > len(kills) / 2, "most of the kills met a living run"


def make_store(folder: Path, files: dict[str, bytes], metrics: dict[str, float]) -> Path:
    artifact = folder / "artifacts" / "make_masks" / ("0" * 20)
    artifact.mkdir(parents=True)
    for name, data in files.items():
        (artifact / name).write_bytes(data)
    (folder / "end.json").write_text(json.dumps({"metrics": metrics}))
    return folder


def test_the_comparison_sees_what_is_lost_wrong_and_too_much(tmp_path: Path):
    quiet = make_store(tmp_path / "quiet", {"a": b"1", "b": b"2"}, {"miou": 0.5})
    killed = make_store(tmp_path / "killed", {"b": b"3", "c": b"4"}, {"miou": 0.6})
    place = f"artifacts/make_masks/{'0' * 20}"
    expected = {f"lost: {place}/a", f"more: {place}/c", f"wrong: {place}/b", "wrong: the metrics"}
    assert expected < set(compare(quiet, killed)), "and verify misses the manifest"


def test_a_fork_says_whether_it_was_killed(tmp_path: Path):
    def killed_at_the_second_file() -> None:
        from tests.faults.killed_runs import Steps

        Steps(tmp_path, 2)
        (tmp_path / "one").touch()
        (tmp_path / "two").write_bytes(b"")
        (tmp_path / "three").write_bytes(b"")

    assert not in_a_fork(killed_at_the_second_file)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one", "two"] or not (tmp_path / "three").exists()
    assert in_a_fork(lambda: None)
