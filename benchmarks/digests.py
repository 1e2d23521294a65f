"""What it costs to read every byte of an artifact again: ``wsss artifacts verify`` against ``sha256sum``.

Three artifacts are drawn: few large files (weights), files of a photograph's size, and many of a mask's.  Ours compares
every file with its manifest, looks for files that do not belong, and reads with as many threads as a look-up does; the
peer is coreutils' ``sha256sum``, called once for all the files and with one process per core.  They take turns in one
run, on a warm page cache: what is measured is the hashing, not the disk.

    python benchmarks/digests.py [--quick] [--json] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from provenance import commit, processor
from turns import measure

from pipeline.store.artifacts import Store

SHAPES = {"weights": (12, 80 << 20), "photographs": (4000, 100 << 10), "masks": (20_000, 4 << 10)}
"""Name → number of files and bytes of each."""
TARGET_MB_S = 500


def draw(store: Store, key: str, count: int, size: int) -> tuple[Path, int]:
    """Publish an artifact of ``count`` files; its folder and its bytes."""
    generator = np.random.default_rng(0)
    work, _ = store.work_dir("make_masks", key)
    for number in range(count):
        (work / f"{number:06d}.bin").write_bytes(generator.bytes(size))
    content = {"version": 1, "config": {}, "inputs": {}, "mask_supervision": []}
    artifact = store.publish("make_masks", key, content=content, run={})
    return artifact.path, count * size


def peer(folder: Path, processes: int) -> None:
    """``sha256sum`` of every file, in ``processes`` processes."""
    names = "\0".join(str(path) for path in sorted(folder.glob("*.bin"))).encode()
    words = ["xargs", "-0", "-P", str(processes), "-n", "500" if processes == 1 else "100", "sha256sum"]
    subprocess.run(words, input=names, stdout=subprocess.DEVNULL, check=True)


def verify(store: Store, key: str) -> None:
    """Ours; an artifact that is not whole would make the figure worthless."""
    if problems := store.verify("make_masks", key):
        raise SystemExit("\n".join(problems))


def report(store: Store, rounds: int, shrink: int) -> dict[str, Any]:
    """The document: MB/s of each way and the ratio to the peer with as many processes as cores."""
    rows, ratios, cores = dict[str, dict[str, float]](), list[dict[str, Any]](), os.cpu_count() or 1
    for number, (name, (count, size)) in enumerate(SHAPES.items()):
        key = f"{number:020x}"
        folder, total = draw(store, key, max(count // shrink, 1), size)
        ways: dict[str, Callable[[], object]] = {
            "verify": partial(verify, store, key),
            "sha256sum": partial(peer, folder, 1),
            f"{cores} sha256sum": partial(peer, folder, cores),
        }
        seconds = measure(ways, rounds)
        rows[name] = {way: round(total / value / 1e6) for way, value in seconds.items()}
        value = seconds[f"{cores} sha256sum"] / seconds["verify"]
        ratio = {"name": f"verify / {cores} sha256sum, {name}", "value": round(value, 3), "kind": "speedup"}
        ratios.append({**ratio, "target": 1.0, "met": value >= 1})
    return {
        "benchmark": "digests",
        "ratios": ratios,
        "mb_per_s": rows,
        "target_mb_per_s": TARGET_MB_S,
        "rounds": rounds,
        "hardware": processor(),
        "commit": commit(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a fortieth of the files, three rounds: seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--out", type=Path, help="folder of the drawn files (1.5 GB); removed at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        document = report(Store(Path(folder)), 3 if arguments.quick else 5, 40 if arguments.quick else 1)
    if arguments.json:
        print(json.dumps(document, indent=1))
        return
    for name, row in document["mb_per_s"].items():
        print(f"{name:12s} " + ", ".join(f"{way} {value:,.0f} MB/s" for way, value in row.items()))
    for ratio in document["ratios"]:
        print(f"{ratio['value']:6.2f} ×  {ratio['name']}")


if __name__ == "__main__":
    main()
