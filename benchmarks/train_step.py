"""What our training loop costs over a bare torch loop on the same tensors: DeepLabV3+ (ResNet-50), LargeFOV (VGG16).

Both train equal copies of the network from the same start, by the same SGD groups and poly schedule, with a
cross-entropy over the pixels of the crop.  The bare loop is what one writes by hand: forward, loss, backward, step; its
images lie on the device already, as floats, and it reads no loss.  Ours is ``stages.training.loop``'s loop with
everything that it does at a step: bytes to the device and normalised, seeds, schedule, the check and record of the
loss, deterministic kernels, progress; only the reading and cropping of images is left out, as a batch that is ready.
Before anything is timed both take the same steps and must agree in their losses.

The loops take turns, step by step, every second round in reverse; a ratio is the median of the rounds' ratios.

    python benchmarks/train_step.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import commit, hardware
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional

from stages.contracts import IGNORE_INDEX, SilentProgress
from stages.data.transforms import to_network_input
from stages.nets.segmenters.build import build_segmenter
from stages.nets.segmenters.config import SegmenterConfig
from stages.nets.segmenters.segmenter import Segmenter
from stages.ops.devices import deterministic
from stages.training.config import TrainingConfig
from stages.training.loop import _Loop, _place
from stages.training.segmenter_objective import LossConfig, SegmenterObjective

NUM_CLASSES = 21
TARGET = 1.05
NETS: Mapping[str, Mapping[str, Any]] = {
    "DeepLabV3+ resnet50": {"name": "deeplabv3plus", "encoder": "resnet50", "output_stride": 16},
    "LargeFOV vgg16": {"name": "largefov", "backbone": {"name": "vgg16", "output_stride": 8}},
}


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    crop_px: int = 321
    batch: int = 2
    rounds: int = 11


QUICK = Scale(crop_px=97, batch=2, rounds=5)
ON_GPU = Scale(batch=15, rounds=50)


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_net(fields: Mapping[str, Any]) -> Segmenter:
    """The network at its random start, placed as the training places it."""
    torch.manual_seed(0)
    config = TypeAdapter(SegmenterConfig).validate_python(fields)
    net = build_segmenter(config, NUM_CLASSES, init="random", weights={})
    _place(net, device())
    return net.train()


def make_batch(scale: Scale) -> dict[str, Any]:
    """Images and masks of one step as the data pipeline hands them over; a tenth of the pixels is void."""
    random = np.random.default_rng(1)
    size = (scale.batch, scale.crop_px, scale.crop_px)
    masks = random.integers(0, NUM_CLASSES, size, dtype=np.uint8)
    masks[random.random(size) < 0.1] = IGNORE_INDEX
    return {"images": random.integers(0, 256, (*size, 3), dtype=np.uint8), "masks": masks}


def training(scale: Scale, steps: int) -> TrainingConfig:
    """A short training; its rate moves the weights, and so little that no loss runs away."""
    return TrainingConfig(steps=steps, batch_size=scale.batch, learning_rate=1e-4)


def bare_steps(net: Segmenter, batch: Mapping[str, Any], config: TrainingConfig, steps: int) -> Iterator[Tensor]:
    """The loop that one writes by hand; yields each step's loss."""
    images = to_network_input(torch.from_numpy(batch["images"]), device())
    masks = torch.from_numpy(batch["masks"]).to(device(), torch.int64)
    groups = net.parameter_groups(config.head_lr_factor)
    factors = [group.pop("lr_factor") for group in groups]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay)
    for step in itertools.count():
        torch.manual_seed(step)
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = config.learning_rate * factor * (1 - step / steps) ** config.poly_power
        logits = functional.interpolate(net(images), size=masks.shape[1:], mode="bilinear", align_corners=False)
        loss = functional.cross_entropy(logits, masks, ignore_index=IGNORE_INDEX)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def our_steps(
    net: Segmenter, batch: Mapping[str, Any], config: TrainingConfig, steps: int, out: Path
) -> Iterator[list[dict[str, float]]]:
    """Our loop, which takes a step whenever it is asked for one; yields the history so far."""
    groups = net.parameter_groups(config.head_lr_factor)
    objective = SegmenterObjective(LossConfig())
    loop = _Loop(net, objective, config, groups, 0, steps * config.batch_size, device(), out, None)
    loop.record_every = 1

    def batches() -> Iterator[dict[str, Any]]:
        while True:
            yield dict(batch)

    # the loop runs until its batches end: one batch at a time, without the checkpoint that ends a run
    loop._save = loop._read_losses
    stream = batches()
    while True:
        loop.run(itertools.islice(stream, 1), SilentProgress(), "train", 1e9)
        yield loop.history


def seconds(step: Callable[[], object]) -> float:
    """Wall time of one step, to the end of what it queued on a GPU."""
    synchronise()
    started = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_agreement(name: str, ours: list[float], bare: list[float]) -> float:
    """The largest difference of the two loops' losses; they train the same network."""
    difference = max(abs(one - two) for one, two in zip(ours, bare, strict=True))
    if difference > 5e-3 * max(bare):
        raise SystemExit(f"{name}: the loops' losses differ by {difference:.2g}: {ours} and {bare}")
    return difference


def measure(name: str, fields: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    """Seconds of each loop's steps in turns, and how far their losses are apart."""
    quiet: dict[str, Any] = {"aspp_dropout": 0.0} if "encoder" in fields else {"dropout": 0.0}
    steps = scale.rounds + 2
    config, batch = training(scale, steps), make_batch(scale)
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        bare = bare_steps(make_net({**fields, **quiet}), batch, config, steps)
        ours = our_steps(make_net({**fields, **quiet}), batch, config, steps, Path(folder))
        with our_kernels():
            history = [next(ours) for _ in range(2)][-1]
        losses = [float(next(bare)) for _ in range(2)]
        difference = check_agreement(name, [record["loss"] for record in history[:2]], losses)
        for number in range(scale.rounds):
            for way in ("ours", "bare")[:: -1 if number % 2 else 1]:
                with our_kernels() if way == "ours" else contextlib.nullcontext():
                    source: Iterator[Any] = ours if way == "ours" else bare
                    times[way].append(seconds(lambda source=source: next(source)))
    return {"times": times, "difference": difference}


def our_kernels() -> contextlib.AbstractContextManager[None]:
    """The deterministic kernels that our training runs with."""
    return deterministic(device())


def report(scale: Scale) -> dict[str, Any]:
    """The document of ``--json``."""
    found = {name: measure(name, fields, scale) for name, fields in NETS.items()}
    ratios = []
    for name, one in found.items():
        times = one["times"]
        value = statistics.median(ours / bare for ours, bare in zip(times["ours"], times["bare"], strict=True))
        where = f"{name}, {scale.batch} crops of {scale.crop_px} px"
        ratios.append(
            {
                "name": f"our training step / bare torch loop, {where}",
                "value": round(value, 4),
                "kind": "cost",
                "target": TARGET,
                "met": value <= TARGET,
            }
        )
    return {
        "benchmark": "train_step",
        "ratios": ratios,
        "milliseconds": {
            name: {way: round(1000 * statistics.median(values), 1) for way, values in one["times"].items()}
            for name, one in found.items()
        },
        "largest_difference_of_losses": {name: one["difference"] for name, one in found.items()},
        "rounds": scale.rounds,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "commit": commit(),
    }


def show(document: Mapping[str, Any]) -> None:
    """Print the document for people."""
    for name, measured in document["milliseconds"].items():
        print(f"{name}: " + ", ".join(f"{way} {value:.1f} ms" for way, value in measured.items()))
    for entry in document["ratios"]:
        verdict = "met" if entry["met"] else "missed"
        print(f"{entry['value']:8.3f} ×  {entry['name']} (target ≤ {entry['target']}: {verdict})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small crops, few rounds: says nothing about full size")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else ON_GPU if torch.cuda.is_available() else Scale()
    document = report(scale)
    print(json.dumps(document, indent=1)) if arguments.json else show(document)


if __name__ == "__main__":
    main()
