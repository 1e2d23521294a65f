"""Attention of training images: ``make_attention`` against one image at a time, with the same network and scales.

The peer is how the field's codes make class activation maps (irn ``step/make_cam.py``): one image after the other, each
scale in a forward pass of its own, image and mirror together as a batch of two; the maps of all scales summed at a
quarter of the image's size, only those of its labels, divided by their maximum, and saved as float32 by ``np.save``.
It reads with PIL in the same process, and runs under ``torch.no_grad`` in the layout in which torch makes a network.
``one input a pass`` is the same with image and mirror one after the other.  Both leave out irn's second copy of the
maps at full resolution, which is five times the work after the network.  Ours is the stage itself, from files to
shards, its classifier loaded anew each time; ``ours, bf16`` is the same with ``precision: bf16``, which pays only where
the hardware has instructions for it (``cpu_has_bf16``), so that its ratio to fp32 is judged there alone.  All have the
same number of torch threads and take turns; ratios are of medians.  Their maps must agree, or nothing is said of speed.

Images of VOC's sizes are drawn; ``--images DIR`` takes photographs (.jpg).  The network is at a random start, which
costs the same; its maps are rougher than a trained one's, and so are the bytes on disk.

    python benchmarks/attention_throughput.py [--quick] [--json] [--images DIR] [--networks NAME…] [--count N]
        [--rounds N] [--threads N] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from provenance import commit, hardware, has_bf16
from torch import Tensor
from torch.nn import functional

from stages.contracts import (
    ClassList,
    ImageIndex,
    ImageRecord,
    Runtime,
    SilentProgress,
    iter_attention,
    write_json,
)
from stages.data.transforms import IMAGE_MEAN, IMAGE_STD
from stages.make_attention import MakeAttentionConfig, make_attention
from stages.make_masks import MakeMasksConfig, make_masks
from stages.methods.cam import CamConfig
from stages.methods.classifier_files import ClassifierDescription, build_classifier, load_classifier, save_classifier
from stages.nets.backbones.config import BackboneConfig
from stages.nets.classifier import Classifier
from stages.ops.devices import Precision

SIZES = ((375, 500), (500, 375), (333, 500), (375, 500), (500, 334), (375, 500), (281, 500), (375, 500))
"""(height, width) as VOC's images have them, the most common ones most often."""

CONFIG = MakeAttentionConfig()
"""irn's four scales, each mirrored too, stored at a quarter of the image's size."""

CLASSES = ClassList(names=tuple(f"class{number:02d}" for number in range(20)))
NETWORKS = {"resnet50": 16, "squeezenet1_1": 8, "vgg16": 16}
"""Backbones that are known here, with their output strides."""
CPU_TARGET = 1.5
MAP_LIMIT_BYTES = 60_000
MASK_LIMIT_BYTES = 10_000
LEAST_CORRELATION = 0.8
"""Of our maps with the peer's.  They are not equal: ours sees padding at the right and at the bottom, and a network at
its random start sees far; mirrored or displaced maps would stay far below this."""


@dataclass(frozen=True)
class Scene:
    """Images with labels, as ``prepare_data`` leaves them, and a trained classifier."""

    folder: Path
    data_root: Path
    index: ImageIndex
    device: torch.device
    networks: tuple[str, ...]

    def classifier(self, name: str) -> Path:
        """Where the classifier on this backbone lies."""
        return self.folder / name


# ---------------------------------------------------------------------------------------------------------------------
# What is looked at
# ---------------------------------------------------------------------------------------------------------------------


def make_scene(
    folder: Path, images: Path | None, count: int, shrink: float, device: torch.device, networks: tuple[str, ...]
) -> Scene:
    """Write the index and the classifiers; draw the images where none are given."""
    root = images if images is not None else draw_images(folder / "images", count, shrink)
    paths = sorted(root.glob("*.jpg"))
    paths = paths[:: max(1, len(paths) // count)][:count]
    if not paths:
        raise SystemExit(f"{root} has no .jpg files")
    draws = np.random.default_rng(5)
    index = ImageIndex(
        classes=CLASSES,
        images=tuple(describe(path, draws) for path in paths),
        splits={"train": tuple(path.stem for path in paths), "train_score": ()},
        mask_values={},
    )
    write_json(folder / "prepared" / "index.json", index.model_dump(mode="json"))
    for name in networks:
        torch.manual_seed(0)
        backbone = BackboneConfig(name=name, output_stride=NETWORKS[name], pretrained=False)
        description = ClassifierDescription(backbone=backbone, method=CamConfig(), classes=CLASSES)
        classifier, _ = build_classifier(description, {})
        classifier.head.weight.data.mul_(100)  # a trained head's scale; the scores of a fresh one are next to nothing
        save_classifier(folder / name, description, classifier)
    return Scene(folder, root, index, device, networks)


def describe(path: Path, draws: np.random.Generator) -> ImageRecord:
    """A record with one to three labels, 1.5 in the mean as in VOC."""
    with Image.open(path) as image:
        size = (image.height, image.width)
    labels = draws.choice(len(CLASSES.names), draws.choice([1, 2, 3], p=[0.6, 0.3, 0.1]), replace=False)
    return ImageRecord(id=path.stem, image=path.name, size=size, labels=tuple(sorted(labels.tolist())))


def draw_images(folder: Path, count: int, shrink: float) -> Path:
    """Smooth colours with some noise, of VOC's sizes or smaller."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(3)
    for number in range(count):
        height, width = (max(64, round(side * shrink)) for side in SIZES[number % len(SIZES)])
        coarse = Image.fromarray(draws.integers(0, 255, (8, 10, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = np.clip(smooth + draws.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"drawn{number:04d}.jpg", quality=92)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The two ways
# ---------------------------------------------------------------------------------------------------------------------


def ours(scene: Scene, name: str, threads: int, precision: Precision = "fp32") -> Path:
    """``make_attention`` from files to shards."""
    out = scene.folder / "ours"
    shutil.rmtree(out, ignore_errors=True)
    make_attention(
        CONFIG.model_copy(update={"precision": precision}),
        images=scene.folder / "prepared",
        classifier=scene.classifier(name),
        data_root=scene.data_root,
        out=out,
        progress=SilentProgress(),
        runtime=Runtime(device=str(scene.device), threads=threads),
    )
    return out


def peer(scene: Scene, network: Classifier, *, is_pair: bool) -> Path:
    """What irn's ``make_cam.py`` does, image after image."""
    out = scene.folder / "peer"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with torch.no_grad():
        for record in scene.index.images:
            maps = peer_maps(scene, network, record, is_pair=is_pair).cpu().numpy()
            np.save(out / f"{record.id}.npy", maps)
    return out


def peer_maps(scene: Scene, network: Classifier, record: ImageRecord, *, is_pair: bool) -> Tensor:
    """Maps (n, h, w) of an image's labels, each divided by its maximum."""
    image = Image.open(scene.data_root / record.image).convert("RGB")
    height, width = record.size
    quarter = (-(-height // CONFIG.map_stride), -(-width // CONFIG.map_stride))
    total = torch.zeros(len(CLASSES.names), *quarter, device=scene.device)
    for scale in CONFIG.scales:
        size = (round(width * scale), round(height * scale))
        pixels = np.asarray(image if scale == 1 else image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        normal = (pixels / 255 - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
        plain = torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))
        both = torch.stack([plain, plain.flip(-1)]).to(scene.device)
        passes = [both] if is_pair else [both[:1], both[1:]]
        scores = torch.cat([network(inputs).scores for inputs in passes]).relu()
        merged = scores[0] + scores[1].flip(-1)
        total += functional.interpolate(merged[None], quarter, mode="bilinear", align_corners=False)[0]
    maps = total[list(record.labels or ())]
    return maps / (functional.adaptive_max_pool2d(maps, (1, 1)) + 1e-5)


def check_agreement(scene: Scene, name: str, network: Classifier, threads: int) -> float:
    """The mean correlation of our maps with the peer's, which a mistake in either would lower."""
    found = {record.id: record.maps for record in iter_attention(ours(scene, name, threads))}
    peers = peer(scene, network, is_pair=True)
    agreements = []
    for record in scene.index.images:
        for mine, theirs in zip(found[record.id], np.load(peers / f"{record.id}.npy"), strict=True):
            if mine.any() and theirs.any():
                agreements.append(float(np.corrcoef(mine.ravel(), theirs.ravel())[0, 1]))
    mean = statistics.mean(agreements)
    if mean < LEAST_CORRELATION:
        raise SystemExit(f"{name}: our maps correlate with the peer's by {mean:.3f} only: nothing was measured")
    return mean


# ---------------------------------------------------------------------------------------------------------------------
# Times and bytes
# ---------------------------------------------------------------------------------------------------------------------


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Let the ways take turns; the median wall and processor seconds of each."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            way()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: (statistics.median(wall for wall, _ in values), statistics.median(cpu for _, cpu in values))
        for name, values in times.items()
    }


def bytes_on_disk(scene: Scene, name: str, threads: int) -> dict[str, float]:
    """Of our maps and the peer's per image, and of the masks that follow from ours."""
    attention = ours(scene, name, threads)
    masks = scene.folder / "masks"
    shutil.rmtree(masks, ignore_errors=True)
    make_masks(
        MakeMasksConfig(refine="none", threshold=0.3),
        images=scene.folder / "prepared",
        attention=attention,
        data_root=scene.data_root,
        out=masks,
        progress=SilentProgress(),
        runtime=Runtime(processes=1),
    )
    folders = {"maps": attention / "shards", "peer's maps": scene.folder / "peer", "masks": masks / "masks"}
    count = len(scene.index.images)
    return {thing: sum(path.stat().st_size for path in folder.iterdir()) / count for thing, folder in folders.items()}


def report(scene: Scene, rounds: int, threads: int) -> dict[str, Any]:
    """The document of ``--json``."""
    is_cpu, count = scene.device.type == "cpu", len(scene.index.images)
    document: dict[str, Any] = {"benchmark": "attention_throughput", "ratios": [], "networks": {}}
    for name in scene.networks:
        network, _method = load_classifier(scene.classifier(name), scene.device)
        agreement = check_agreement(scene, name, network, threads)
        found = measure(
            {
                "peer": partial(peer, scene, network, is_pair=True),
                "peer, one input a pass": partial(peer, scene, network, is_pair=False),
                "ours": partial(ours, scene, name, threads),
                "ours, bf16": partial(ours, scene, name, threads, "bf16"),
            },
            rounds,
        )
        sizes = bytes_on_disk(scene, name, threads)
        document["networks"][name] = {
            "images_per_s": {way: round(count / wall, 4) for way, (wall, _) in found.items()},
            "processor_s_per_image": {way: round(cpu / count, 3) for way, (_, cpu) in found.items()},
            "bytes_per_image": {thing: round(size) for thing, size in sizes.items()},
            "correlation": round(agreement, 4),
        }
        document["ratios"] += _ratios(name, {way: wall for way, (wall, _) in found.items()}, sizes, is_cpu=is_cpu)
    labels = [len(image.labels or ()) for image in scene.index.images]
    return document | {
        "images": count,
        "labels_per_image": round(statistics.mean(labels), 2),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "cpu_has_bf16": has_bf16(),
        "load_average": round(os.getloadavg()[0], 1),
        "hardware": hardware(),
        "commit": commit(),
    }


def _ratios(name: str, wall: dict[str, float], sizes: dict[str, float], *, is_cpu: bool) -> list[dict[str, Any]]:
    """Faster than the peers, and within the limits on disk (a cost of 1 is the limit)."""
    target = CPU_TARGET if is_cpu else 1.0
    speed = [
        _ratio(f"{name}: ours / {way}", wall[way] / wall["ours"], "speedup", target)
        for way in wall
        if "ours" not in way
    ]
    if not is_cpu or has_bf16():
        speed.append(_ratio(f"{name}: bf16 / fp32", wall["ours"] / wall["ours, bf16"], "speedup", 1.0))
    limits = {"maps": MAP_LIMIT_BYTES, "masks": MASK_LIMIT_BYTES}
    return speed + [
        _ratio(f"{name}: bytes of {thing} an image / {limit:,}", sizes[thing] / limit, "cost", 1.0)
        for thing, limit in limits.items()
    ]


def _ratio(name: str, value: float, kind: str, target: float) -> dict[str, Any]:
    is_met = value >= target if kind == "speedup" else value <= target
    return {"name": name, "value": round(value, 3), "kind": kind, "target": target, "met": is_met}


def show(document: dict[str, Any]) -> None:
    """In words."""
    for name, found in document["networks"].items():
        for way, value in found["images_per_s"].items():
            cpu = found["processor_s_per_image"][way]
            print(f"{value:8.3f} images/s {cpu:8.2f} processor s/image  {name}, {way}")
        for thing, size in found["bytes_per_image"].items():
            print(f"{size:8,d} bytes an image  {name}, {thing}")
    print(f"the CPU has {'' if document['cpu_has_bf16'] else 'no known '}instructions for bf16")
    for ratio in document["ratios"]:
        mark = "" if ratio["met"] else "  MISSED"
        print(f"{ratio['value']:8.2f} ×  {ratio['name']} ({ratio['kind']}, target {ratio['target']:.2f}){mark}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small images, few of them: under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--images", type=Path, help="folder of photographs (.jpg) to use")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="default resnet50 squeezenet1_1")
    parser.add_argument("--count", type=int, help="images; default 8, with --quick 2")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 2")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 is torch's default")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    wanted = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    count, rounds = (2, 2) if arguments.quick else (8, 5)
    with tempfile.TemporaryDirectory() as folder:
        scene = make_scene(
            Path(folder),
            arguments.images,
            arguments.count or count,
            0.3 if arguments.quick else 1.0,
            torch.device(wanted),
            tuple(arguments.networks or ("resnet50", "squeezenet1_1")),
        )
        document = report(scene, arguments.rounds or rounds, arguments.threads)
    if arguments.json:
        print(json.dumps(document, indent=1))
    else:
        show(document)


if __name__ == "__main__":
    main()
