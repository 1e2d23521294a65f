"""Dense CRF of pseudo-masks: ``make_masks``' way in N processes against one process that builds each CRF anew.

The peer is how the field's codes call pydensecrf (irn ``step/cam_to_ir_label.py``, one image after the other): a new
DenseCRF2D for each of the two labellings of an image.  Ours builds an image's kernels once for both labellings, and
spreads the images over processes.  Both label the same images with the same numbers, in one run, in interleaved rounds;
the masks must be equal; the ratio is of medians.  ``--images DIR`` takes photographs; without it images are drawn.

    python benchmarks/crf.py [--quick] [--json] [--images DIR] [--processes N]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import AttentionRecord
from stages.make_masks import MakeMasksConfig, refine_mask
from stages.ops.crf import resolve_crf_backend
from stages.ops.pool import map_ordered, num_processes
from stages.ops.seeds import (
    ConfidentThresholds,
    combine_confident,
    initial_mask,
    threshold_maps,
    to_class_indices,
    upsample_maps,
)

CONFIG = MakeMasksConfig(confident=ConfidentThresholds())
"""irn's two labellings and its CRF: 10 / 50 / 5 and 3 / 3, ten iterations, confidence 0.7."""

Job = tuple[Path, AttentionRecord]


def draw_images(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Write textured images with soft, coloured blobs."""
    paths = []
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
        smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(noisy).save(paths[-1])
    return paths


def make_jobs(paths: Sequence[Path]) -> list[Job]:
    """Give each image one or two blob-shaped attention maps at a quarter of its size."""
    jobs = []
    for number, path in enumerate(paths):
        with Image.open(path) as image:
            width, height = image.size
        rows, columns = np.mgrid[0 : height // 4, 0 : width // 4]
        maps = []
        for label in range(1 + number % 2):
            centre = np.random.default_rng((number, label)).uniform(0.25, 0.75, 2) * rows.shape
            distance = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2
            blob = np.exp(-distance / (2 * (rows.shape[0] / 6) ** 2))
            maps.append((255 * blob / blob.max()).astype(np.uint8))
        labels = tuple(range(len(maps)))
        jobs.append((path, AttentionRecord(str(number), (height, width), labels, np.stack(maps), np.ones(len(maps)))))
    return jobs


def ours(_: None, job: Job) -> NDArray[np.uint8]:
    """One image by ``make_masks``' own function."""
    path, record = job
    return refine_mask(np.asarray(Image.open(path).convert("RGB")), record, CONFIG)


def peer(job: Job) -> NDArray[np.uint8]:
    """One image as irn's ``cam_to_ir_label`` does it: the same thresholds, a new CRF for each labelling."""
    path, record = job
    image = np.array(Image.open(path).convert("RGB"))
    maps = upsample_maps(record)
    thresholds = ConfidentThresholds()
    found = [
        to_class_indices(anew(image, threshold_maps(maps, threshold), len(maps) + 1), record.labels)
        for threshold in (thresholds.foreground_threshold, thresholds.background_threshold)
    ]
    return combine_confident(*found)


def anew(image: NDArray[np.uint8], labels: NDArray[np.uint8], num_labels: int) -> NDArray[np.intp]:
    """Irn's ``crf_inference_label``."""
    import pydensecrf.densecrf as native
    from pydensecrf.utils import unary_from_labels

    height, width = image.shape[:2]
    crf = native.DenseCRF2D(width, height, num_labels)
    crf.setUnaryEnergy(unary_from_labels(labels, num_labels, gt_prob=0.7, zero_unsure=False))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.ascontiguousarray(image), compat=10)
    return np.array(crf.inference(10)).reshape(num_labels, height, width).argmax(axis=0)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(jobs: Sequence[Job], processes: int, rounds: int) -> dict[str, float]:
    """Interleave the three ways; returns the median seconds of each."""
    times: dict[str, list[float]] = {"peer": [], "ours, 1 process": [], "ours": []}
    for _ in range(rounds):
        times["peer"].append(seconds(lambda: [peer(job) for job in jobs]))
        times["ours, 1 process"].append(seconds(lambda: list(map_ordered(ours, jobs, context=None, processes=1))))
        times["ours"].append(seconds(lambda: list(map_ordered(ours, jobs, context=None, processes=processes))))
    return {name: statistics.median(values) for name, values in times.items()}


def check_equal(jobs: Sequence[Job]) -> None:
    """Both ways must give the same masks, and the CRF must have had something to do."""
    changed = 0
    for job in jobs:
        mine, theirs = ours(None, job), peer(job)
        if not np.array_equal(mine, theirs):
            raise SystemExit(f"{job[0]}: our mask differs from the peer's in {(mine != theirs).sum()} pixels")
        changed += int((mine != initial_mask(job[1], CONFIG)).sum())
    if changed == 0:
        raise SystemExit("the CRF changed no pixel: nothing was measured")


def report(jobs: Sequence[Job], processes: int, rounds: int) -> dict[str, Any]:
    """The document of ``--json``."""
    median = measure(jobs, processes, rounds)
    # asked: a tenth from the shared kernels, times 0.7 of every core that has a process
    target = 1.1 * max(1.0, 0.7 * min(processes, os.cpu_count() or 1))
    speedups = {
        f"{processes} processes, kernels built once / 1 pydensecrf process": (median["peer"] / median["ours"], target),
        "1 process, kernels built once / 1 pydensecrf process": (median["peer"] / median["ours, 1 process"], 1.1),
    }
    return {
        "benchmark": "crf",
        "ratios": [
            {"name": name, "value": round(value, 3), "kind": "speedup", "target": goal, "met": value >= goal}
            for name, (value, goal) in speedups.items()
        ],
        "seconds_per_image": {name: round(value / len(jobs), 4) for name, value in median.items()},
        "images": len(jobs),
        "rounds": rounds,
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "commit": commit(),
    }


def commit() -> str:
    """The revision that is measured; empty outside a repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small images, three rounds: under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--images", type=Path, help="folder of photographs to use")
    parser.add_argument("--processes", type=int, default=0, help="0: one per core")
    arguments = parser.parse_args()
    if resolve_crf_backend("auto") != "pydensecrf":
        raise SystemExit("pydensecrf2 is not installed: there is no peer to measure against")
    with tempfile.TemporaryDirectory() as folder:
        count, size = (8, (160, 224)) if arguments.quick else (16, (375, 500))
        found = sorted(arguments.images.glob("*.jpg"))[:count] if arguments.images else None
        jobs = make_jobs(draw_images(Path(folder), count, size) if found is None else found)
        check_equal(jobs[:4])
        document = report(jobs, num_processes(arguments.processes), 3 if arguments.quick else 5)
    if arguments.json:
        print(json.dumps(document, indent=1))
        return
    for name, value in document["seconds_per_image"].items():
        print(f"{value:8.3f} s/image  {name}")
    for ratio in document["ratios"]:
        print(f"{ratio['value']:8.2f} ×        {ratio['name']} (target {ratio['target']:.2f})")


if __name__ == "__main__":
    main()
