"""Attention and masks of 1,000, 2,000 and 4,000 images: seconds and disk grow linearly, memory does not grow.

The images are those of ``wsss data synthetic``, made once; the smaller sets are the first ones of the largest.  Each
measurement is a process of its own that runs ``make_attention`` and ``make_masks`` as the pipeline does (a small
network at its random start, two scales, mirrored; a CRF of three iterations in worker processes), once over stored maps
(``two stages``) and once with ``keep_maps: false`` (``fused``).  Measured are its seconds; the bytes under its output
folders; and the peak of the proportional set size (memory shared between processes counts once) summed over the process
and its workers, looked at ten times a second.

Of the ratios the first compares an image's seconds in the largest set with the smallest; a start-up that is spread over
more images makes that smaller than 1, so the second compares the seconds of each *further* image (from the middle set
to the largest, against from the smallest to the middle); it has no value where the start-up hides the images.

    python benchmarks/masks_scale.py [--quick] [--json] [--processes N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from provenance import commit, hardware

from stages.contracts import ImageIndex, Runtime, SilentProgress, read_json, write_json
from stages.data.adapters.synthetic import SyntheticConfig
from stages.make_attention import MakeAttentionConfig, make_attention
from stages.make_masks import MakeMasksConfig, make_masks
from stages.methods.cam import CamConfig
from stages.methods.classifier_files import ClassifierDescription, build_classifier, save_classifier
from stages.nets.backbones.config import BackboneConfig
from stages.ops.crf.dense_crf import CrfConfig
from stages.prepare_data import PrepareDataConfig, prepare_data

COUNTS, QUICK_COUNTS = (1000, 2000, 4000), (40, 80, 160)
SIZE_PX, QUICK_SIZE_PX = 96, 64
PATHS = {"two stages": True, "fused": False}
"""Whether maps are stored."""

MASKS = MakeMasksConfig(threshold=0.3, crf=CrfConfig(preset="irn", iterations=3))
POLL_S = 0.1
SECONDS_TARGET, FURTHER_TARGET, DISK_TARGET, MEMORY_TARGET = 1.15, 1.25, 1.05, 1.10
"""The most that counts as linear, or as flat: clocks and memory of a shared machine are not exact."""


def attention_config(*, is_stored: bool) -> MakeAttentionConfig:
    """Two scales, mirrored too."""
    return MakeAttentionConfig(scales=(0.5, 1.0), keep_maps=is_stored)


# ---------------------------------------------------------------------------------------------------------------------
# What is worked on
# ---------------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, counts: Sequence[int], size_px: int) -> None:
    """Make the images of the largest set, an index of every set, and a classifier at its random start."""
    data = SyntheticConfig(num_train=max(counts), num_val=2, size_px=size_px)
    prepare_data(PrepareDataConfig(), data=data, out=folder / "images", progress=SilentProgress())
    index = ImageIndex.model_validate(read_json(folder / "images" / "index.json"))
    for count in counts:
        splits = {**index.splits, "train": index.splits["train"][:count], "train_score": ()}
        records = tuple(index.record(name) for name in splits["train"])
        small = index.model_copy(update={"splits": {"train": splits["train"], "train_score": ()}, "images": records})
        write_json(folder / f"images-{count}" / "index.json", small.model_dump(mode="json"))
    torch.manual_seed(0)
    description = ClassifierDescription(
        backbone=BackboneConfig(name="small", output_stride=4, pretrained=False),
        method=CamConfig(),
        classes=index.classes,
    )
    save_classifier(folder / "classifier", description, build_classifier(description, {})[0])


def work(folder: Path, count: int, *, is_stored: bool, processes: int) -> None:
    """What a child process does: both stages."""
    inputs: dict[str, Any] = {"images": folder / f"images-{count}", "data_root": folder / "images" / "data"}
    shared: dict[str, Any] = {"progress": SilentProgress(), "runtime": Runtime(device="cpu", processes=processes)}
    classifier, out = folder / "classifier", folder / "out"
    make_attention(
        attention_config(is_stored=is_stored), classifier=classifier, out=out / "attention", **inputs, **shared
    )
    make_masks(MASKS, attention=out / "attention", classifier=classifier, out=out / "masks", **inputs, **shared)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def measure(folder: Path, count: int, path: str, processes: int) -> dict[str, Any]:
    """Seconds, bytes and peak memory of one child."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, __file__, "--work", str(folder), str(count), path, "--processes", str(processes)]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command) as child:
        while child.poll() is None:
            peak = max(peak, sum(map(resident_bytes, family(child.pid))))
            time.sleep(POLL_S)
    seconds = time.perf_counter() - started
    if child.returncode:
        raise SystemExit(f"{path} of {count} images failed")
    files = [file for file in (folder / "out").rglob("*") if file.is_file()]
    masks = sum(file.suffix == ".png" and "steps" not in file.parts for file in files)
    if masks != count:
        raise SystemExit(f"{path}: expected {count} masks, found {masks}")
    return {
        "path": path,
        "images": count,
        "seconds": round(seconds, 2),
        "ms_per_image": round(1000 * seconds / count, 2),
        "bytes_per_image": round(sum(file.stat().st_size for file in files) / count),
        "peak_mb": round(peak / 1e6, 1),
    }


def family(pid: int) -> Iterable[int]:
    """A process and all that descend from it (Linux)."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            names = children.read_text().split()
        except OSError:  # it has ended meanwhile
            continue
        for name in names:
            yield from family(int(name))


def resident_bytes(pid: int) -> int:
    """Proportional set size; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How costs grow from the smallest to the largest set, for each path."""
    found = []
    for path in PATHS:
        small, middle, large = (row for row in rows if row["path"] == path)
        span = f"{large['images']:,} / {small['images']:,} images"
        first, then = _further(small, middle), _further(middle, large)
        further = then / first if min(first, then) > 0 else None  # the start-up hides a few images
        found += [
            _ratio(f"{path}: seconds of an image, {span}", _quotient("ms_per_image", large, small), SECONDS_TARGET),
            _ratio(f"{path}: seconds of each further image, {span}", further, FURTHER_TARGET),
            _ratio(f"{path}: bytes of an image, {span}", _quotient("bytes_per_image", large, small), DISK_TARGET),
            _ratio(f"{path}: peak memory, {span}", _quotient("peak_mb", large, small), MEMORY_TARGET),
        ]
    return found


def _further(less: dict[str, Any], more: dict[str, Any]) -> float:
    """Seconds of an image that the larger set has beside the smaller."""
    return (more["seconds"] - less["seconds"]) / (more["images"] - less["images"])


def _quotient(name: str, large: dict[str, Any], small: dict[str, Any]) -> float:
    return large[name] / max(small[name], 1e-9)


def _ratio(name: str, value: float | None, target: float) -> dict[str, Any]:
    is_met = None if value is None else value <= target
    return {
        "name": name,
        "value": None if value is None else round(value, 3),
        "kind": "cost",
        "target": target,
        "met": is_met,
    }


def show(document: dict[str, Any]) -> None:
    """As a table."""
    print("path        images   seconds  ms/image  bytes/image  peak MB")
    for row in document["rows"]:
        print(
            f"{row['path']:10}{row['images']:8,d}{row['seconds']:10.1f}{row['ms_per_image']:10.1f}"
            f"{row['bytes_per_image']:13,d}{row['peak_mb']:9.0f}"
        )
    for ratio in document["ratios"]:
        value = "       –" if ratio["value"] is None else f"{ratio['value']:8.3f}"
        mark = "  MISSED" if ratio["met"] is False else ""
        print(f"{value} ×  {ratio['name']} (at most {ratio['target']:.2f}){mark}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="40, 80 and 160 images: under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--processes", type=int, default=0, help="0: one per core")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        folder, count, path = arguments.work
        work(Path(folder), int(count), is_stored=PATHS[path], processes=arguments.processes)
        return
    if not Path("/proc/self/smaps_rollup").exists():
        raise SystemExit("memory is read from /proc, which only Linux has")
    counts, size_px = (QUICK_COUNTS, QUICK_SIZE_PX) if arguments.quick else (COUNTS, SIZE_PX)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), counts, size_px)
        for path in PATHS:  # a first run also fills the system's cache of files, and compiles
            measure(Path(name), counts[0], path, arguments.processes)
        rows = [measure(Path(name), count, path, arguments.processes) for path in PATHS for count in counts]
    document = {
        "benchmark": "masks_scale",
        "ratios": ratios(rows),
        "rows": rows,
        "size_px": size_px,
        "load_average": round(os.getloadavg()[0], 1),
        "hardware": hardware(),
        "commit": commit(),
    }
    if arguments.json:
        print(json.dumps(document, indent=1))
    else:
        show(document)


if __name__ == "__main__":
    main()
