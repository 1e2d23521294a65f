"""What Prefect costs, and what a second worker brings.

Starts a server and workers of its own by ``wsss up`` in a temporary folder, and measures, from submission to end:
a run whose six stages are cached, one cached stage, and the same by ``wsss run --engine local`` (medians of rounds);
then ``make_masks`` in eight parts, by one worker and by two, each with one process, and on the command line in eight
parts and in one.  All results are compared byte by byte.  The peers, in the same run, are one worker and the unsplit
stage.

    python benchmarks/orchestration.py [--quick] [--json] [--only cached|parts] [--iterations N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.flows.environment import set_private
from pipeline.store.provenance import describe_machine
from stages.contracts import read_json

CONFIG = """
name: orchestration
data: {{format: synthetic, num_train: {images}, num_val: 10, size_px: 96}}
train_classifier:
  backbone: {{name: small}}
  method: {{name: cam}}
  augment: {{crop_px: 96, scale: [1.0, 1.0]}}
  training: {{steps: 60, batch_size: 10, learning_rate: 0.05}}
make_attention: {{scales: [1.0], flip: false}}
make_masks: {{threshold: 0.3, refine: crf, crf: {{iterations: {iterations}}}}}
train_segmenter:
  net: {{name: largefov, backbone: {{name: small}}}}
  init: random
  augment: {{crop_px: 96}}
  training: {{steps: 5, batch_size: 4, learning_rate: 0.01}}
evaluate: {{multi_scale: false}}
runtime: {{device: cpu, workers: 0, processes: 1, threads: 1}}
"""
PARTS = 8
LIMITS_S = {"cached run": 15.0, "cached stage": 12.0, "cached run, local engine": 5.0}
PARTS_TARGET, COST_TARGET = 1.7, 1.03


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="wsss-orchestration-") as name:
        folder = Path(name)
        os.environ["PREFECT_HOME"] = str(folder / "home")
        set_private()
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{_free_port()}/api"  # Prefect reads it once
        iterations = 10 if options.quick else options.iterations
        (folder / "run.yaml").write_text(CONFIG.format(images=120 if options.quick else 600, iterations=iterations))
        _wsss(folder, "run", "run.yaml", "--until", "make_attention", "--engine", "local")
        found: dict[str, Any] = {}
        if options.only != "parts":
            found |= measure_cached(folder, rounds=2 if options.quick else 5)
        if options.only != "cached":
            found |= measure_parts(folder)
    _print(found, as_json=options.json)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about two minutes; the ratio then says little")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--only", choices=("cached", "parts"))
    parser.add_argument("--iterations", type=int, default=330, help="of the CRF: more of them are more work per part")
    return parser.parse_args(arguments)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def measure_cached(folder: Path, *, rounds: int) -> dict[str, Any]:
    """Median seconds of runs that find everything in the store."""
    light = ["--set", "make_masks.crf.iterations=1"]
    overrides = {"overrides": ["make_masks.crf.iterations=1"]}
    _wsss(folder, "run", "run.yaml", *light, "--engine", "local")
    ways: dict[str, Callable[[], None]] = {
        "cached run": lambda: _submit("wsss/run", {"config": "run.yaml", **overrides}),
        "cached stage": lambda: _submit("wsss-stage/make_masks", {"config": "run.yaml", **overrides}),
        "cached run, local engine": lambda: _wsss(folder, "run", "run.yaml", *light, "--engine", "local"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with _cluster(folder, workers=1):
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name].append(_time(way))
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure_parts(folder: Path) -> dict[str, Any]:
    """Seconds of make_masks in eight parts by one worker and by two, and whether all results are equal."""
    seconds, contents = {}, []
    parts = f"runtime.parts={PARTS}"
    for workers in (2, 1):
        with _cluster(folder, workers=workers) as seconds_up:
            parameters = {"config": "run.yaml", "overrides": [parts]}
            seconds[workers] = _time(lambda given=parameters: _submit("wsss-stage/make_masks", given))
        contents.append(_take_masks(folder))
    whole = _time(lambda: _wsss(folder, "stage", "make_masks", "run.yaml"))
    contents.append(_take_masks(folder))
    split = _time(lambda: _wsss(folder, "stage", "make_masks", "run.yaml", "--set", parts))
    contents.append(_take_masks(folder))
    return {
        "wsss up": seconds_up,
        "unsplit, one process": whole,
        "8 parts, one process": split,
        "cost of parts": split / whole,
        "8 parts, 1 worker": seconds[1],
        "8 parts, 2 workers": seconds[2],
        "speedup of the second worker": seconds[1] / seconds[2],
        "equal bytes": all(content == contents[0] for content in contents),
    }


def _take_masks(folder: Path) -> Any:  # noqa: ANN401 - JSON
    """What the manifest says of the masks, sizes and digests of all files included; they are removed."""
    found = (folder / "artifacts" / "make_masks").glob("[0-9a-f]*/manifest.json")
    manifest = max(found, key=lambda file: file.stat().st_mtime_ns)  # the cached runs have left another one
    content = read_json(manifest)["content"]
    manifest.parent.rename(folder / f"masks-{time.monotonic_ns()}")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# How
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _cluster(folder: Path, *, workers: int) -> Iterator[float]:
    """A server and workers of our own, by the command that users have; yields the seconds until they were up."""
    where = ["--home", os.environ["PREFECT_HOME"]]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    port = os.environ["PREFECT_API_URL"].rsplit(":", 1)[1].removesuffix("/api")
    words = ("up", *where, "--port", port, "--workers", str(workers))
    try:
        yield _time(lambda: _wsss(folder, *words, environment=environment))
    finally:
        _wsss(folder, "down", *where, environment=environment)


def _submit(deployment: str, parameters: dict[str, Any]) -> None:
    """Run a deployment and wait for its end."""
    from prefect.deployments import run_deployment

    run = run_deployment(deployment, parameters=parameters, poll_interval=0.2, as_subflow=False)
    if run.state is None or not run.state.is_completed():
        raise RuntimeError(f"{deployment} ended as {run.state}")


def _wsss(folder: Path, *words: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-P", "-m", "pipeline.cli.main", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment or dict(os.environ), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"wsss {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _time(action: Callable[[], None]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


def _print(found: dict[str, Any], *, as_json: bool) -> None:
    ratios: list[dict[str, Any]] = []
    if "speedup of the second worker" in found:
        speedup, cost = found["speedup of the second worker"], found["cost of parts"]
        ratios = [
            {
                "name": "8 parts: two workers over one",
                "value": round(speedup, 3),
                "kind": "speedup",
                "target": PARTS_TARGET,
                "met": speedup >= PARTS_TARGET,
            },
            {
                "name": "8 parts over the unsplit stage",
                "value": round(cost, 3),
                "kind": "cost",
                "target": COST_TARGET,
                "met": cost <= COST_TARGET,
            },
        ]
    machine = describe_machine()
    if as_json:
        document = {
            "benchmark": "orchestration",
            "ratios": ratios,
            "seconds": {name: round(value, 2) for name, value in found.items() if isinstance(value, float)},
            "equal_bytes": found.get("equal bytes"),
            "limits_s": LIMITS_S,
            "hardware": f"{machine['cpu']}, {machine['cores']}, {platform.system()}",
            "commit": machine["revision"],
        }
        print(json.dumps(document))
        return
    print(f"{machine['cpu']}, {machine['cores']}; commit {machine['revision']}")
    for name, value in found.items():
        limit = f"  (limit {LIMITS_S[name]:.0f} s)" if name in LIMITS_S else ""
        print(f"{name:32} {value:8.2f}{limit}" if isinstance(value, float) else f"{name:32} {value}")


if __name__ == "__main__":
    sys.exit(main())
