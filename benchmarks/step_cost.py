"""What methods cost, from one run: training steps of GAIN and ADL against CAM's, Grad-CAM against the package grad-cam.

1. GAIN.  The whole step (forward, losses, backward, SGD) on the same random images with 1.5 labels on average; every
   pair is mined.  In units of a forward pass, CAM's step is 3; GAIN adds a pass over 1.5 times the images: 3 units each
   where the network judges itself (2.5 × CAM is the floor), 2 each by a frozen judge (2.0 ×); with one random class an
   image, which is the default, 1.67 ×.
2. ADL.  Time of the same step; operations of forward and backward; parameters added.  torch's FlopCounterMode counts
   matrix products and convolutions alone, so to its count every other operation that is no view is added, at one per
   element of its largest tensor, for both methods alike.  SGD is left out: it is the same.
3. Grad-CAM.  The same network and images, all classes of each image; both deliver normalised maps at the size of the
   input as a numpy array, which must agree before anything is timed.  Fair: the package's API takes one target a row,
   so it gets batches of (image, class) pairs as large as our batches of images.  Its documentation's way, one pair a
   call, stands beside it.  ``pip install -c constraints.txt -e '.[bench]'`` installs it; without it its rows are –.

Ways take turns, every second round in reverse; a ratio is the median of the rounds' ratios.

    python benchmarks/step_cost.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from provenance import commit, hardware
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from stages.methods.adl import AdlConfig
from stages.methods.base import Method
from stages.methods.cam import CamConfig
from stages.methods.gain import GainConfig
from stages.methods.gradcam import ChannelWeights, GradCamConfig, grad_cam
from stages.nets.backbones.config import BACKBONES, BackboneConfig, BackboneName, HeadName
from stages.nets.classifier import Classifier
from stages.nets.layers import find_layer
from stages.nets.weights import build_backbone
from stages.ops.devices import deterministic
from stages.ops.gradient_maps import label_pairs
from stages.ops.step import StepInfo

NUM_CLASSES = 20
GAINS: Mapping[str, dict[str, Any]] = {
    "its own judge": {"preset": "gain_paper", "am_warmup_epochs": 0},
    "a frozen judge": {"am_mode": "per_class", "am_warmup_epochs": 0},
    "the default": {"am_warmup_epochs": 0},
}
"""Ways to mine, each from the first step on."""
LAST_LAYER = {"resnet50": "layer4", "vgg16": "features.29"}
"""What the package is told to look at: the layer whose output our backbone returns."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    side_px: int = 224
    small_px: int = 96
    """Side of the images for the backbone ``small``."""
    batch: int = 4
    small_batch: int = 16
    rounds: int = 7
    fc_rounds: int = 7
    adl_rounds: int = 20


QUICK = Scale(side_px=64, batch=2, small_batch=4, rounds=3, fc_rounds=1, adl_rounds=3)

Times = Mapping[str, Sequence[float]]
Ways = Mapping[str, Callable[[], object]]


def make_classifier(name: BackboneName, head: HeadName = "gap") -> Classifier:
    """A classifier at a random start, as the training places it in memory; at the plain net's own output stride."""
    torch.manual_seed(0)
    config = BackboneConfig.model_validate(
        {"name": name, "output_stride": BACKBONES[name].output_strides[-1], "pretrained": False}
    )
    classifier = Classifier(build_backbone(config, {}), NUM_CLASSES, head)
    return classifier.to(device()).to(memory_format=torch.channels_last)


def make_batch(count: int, side_px: int) -> tuple[Tensor, Tensor]:
    """Random images (B, 3, H, W) and labels (B, K): by turns one class and two."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side_px, side_px, generator=generator)
    labels = torch.zeros(count, NUM_CLASSES)
    for row in range(count):
        labels[row, torch.randperm(NUM_CLASSES, generator=generator)[: 1 + row % 2]] = 1
    return images.to(device()).to(memory_format=torch.channels_last), labels.to(device())


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take_turns(ways: Ways, rounds: int) -> Times:
    """Seconds of each way in every round, after a first call of each that does not count."""
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            times[name].append(seconds(ways[name]))
    return times


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, to the end of what it queued on a GPU."""
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quotient(times: Times, above: str, below: str) -> float | None:
    """Median over the rounds of one way's time by another's; None where one was not measured."""
    if above not in times or below not in times:
        return None
    return statistics.median(one / two for one, two in zip(times[above], times[below], strict=True))


def ratio(name: str, value: float | None, kind: str, target: float) -> dict[str, Any]:
    """One entry of the document."""
    met = None if value is None else value >= target if kind == "speedup" else value <= target
    return {"name": name, "value": value and round(value, 5), "kind": kind, "target": target, "met": met}


# ---------------------------------------------------------------------------------------------------------------------
# Training steps
# ---------------------------------------------------------------------------------------------------------------------


def training_step(method: Method, classifier: Classifier, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """The training's step in fp32, at learning rate 0: the same work, and the network stays as it is."""
    groups = [{"params": group["params"]} for group in classifier.train().parameter_groups()]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=5e-4)
    info = StepInfo(step=0, num_steps=1, epoch=0, device=images.device)

    def step() -> None:
        torch.manual_seed(0)
        losses = method.objective(classifier, images, labels, info)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        optimizer.step()

    return step


def time_gain(name: BackboneName, head: HeadName, count: int, side_px: int, rounds: int) -> Times:
    """Seconds of a step of plain classification, and of GAIN's ways, on one network."""
    images, labels = make_batch(count, side_px)
    classifier = make_classifier(name, head)
    methods = {"plain": CamConfig().build() if head == "gap" else GradCamConfig().build()}
    methods |= {way: GainConfig(**options).build() for way, options in GAINS.items()}
    for method in methods.values():
        method.prepare(classifier)  # inserts nothing: they can share the network
    with deterministic(device()):
        return take_turns(
            {key: training_step(method, classifier, images, labels) for key, method in methods.items()}, rounds
        )


def gain_ratios(scale: Scale, times: dict[str, Times]) -> list[dict[str, Any]]:
    """GAIN's step by CAM's; a head without score maps trains plainly under Grad-CAM, which is then what to beat."""
    found = []
    cases: list[tuple[BackboneName, HeadName, int, int, int, float]] = [
        ("vgg16", "gap", scale.batch, scale.side_px, scale.rounds, 2.6),
        ("vgg16", "fc", scale.batch, scale.side_px, scale.fc_rounds, 3.2),
        ("small", "gap", scale.small_batch, scale.small_px, scale.rounds, 2.6),
    ]
    for name, head, count, side_px, rounds, target in cases:
        where = f"{name} {head} {side_px} px"
        plain = "CAM" if head == "gap" else "plain classification"
        measured = times[f"step, {where}"] = time_gain(name, head, count, side_px, rounds)
        found += [
            ratio(
                f"GAIN, {way} / {plain}, step, {where}",
                quotient(measured, way, "plain"),
                "cost",
                2.2 if way == "the default" else target,
            )
            for way in GAINS
        ]
    return found


class OtherOperations(TorchDispatchMode):
    """Counts what FlopCounterMode does not: one for each element of the largest tensor of an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in flop_registry and not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.count += max((tensor.numel() for tensor in tensors), default=0)
        return out


def count_operations(method: Method, classifier: Classifier, side_px: int) -> int:
    """Operations of forward and backward for two images; on the meta device, where nothing is computed."""
    images, labels = (tensor.to("meta") for tensor in make_batch(2, side_px))
    classifier = classifier.to("meta").train()
    method.prepare(classifier)
    info = StepInfo(step=0, num_steps=1, epoch=0, device=images.device)
    with FlopCounterMode(display=False) as products, OtherOperations() as others:
        method.objective(classifier, images, labels, info)["loss"].backward()
    return products.get_total_flops() + others.count


def adl_ratios(scale: Scale, times: dict[str, Times]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """ADL's operations and time by CAM's, and how many numbers it adds to each network."""
    found, added = [], {}
    names: tuple[BackboneName, ...] = ("vgg16", "resnet50")
    for name in names:
        cam, adl = make_classifier(name), make_classifier(name)
        methods = {"CAM": CamConfig().build(), "ADL": AdlConfig().build()}
        operations = count_operations(methods["ADL"], adl, 224) / count_operations(methods["CAM"], cam, 224)
        found.append(ratio(f"ADL / CAM, operations, {name} gap 224 px", operations, "cost", 1.02))
        added[name] = sum(map(torch.numel, adl.state_dict().values())) - sum(
            map(torch.numel, cam.state_dict().values())
        )
    where = f"vgg16 gap {scale.side_px} px"
    images, labels = make_batch(scale.batch, scale.side_px)
    networks = {"CAM": make_classifier("vgg16"), "ADL": make_classifier("vgg16")}
    methods = {"CAM": CamConfig().build(), "ADL": AdlConfig().build()}
    for key, method in methods.items():
        method.prepare(networks[key])
    with deterministic(device()):
        times[f"ADL's step, {where}"] = measured = take_turns(
            {key: training_step(method, networks[key], images, labels) for key, method in methods.items()},
            scale.adl_rounds,
        )
    found.append(ratio(f"ADL / CAM, step, {where}", quotient(measured, "ADL", "CAM"), "cost", 1.05))
    return found, added


# ---------------------------------------------------------------------------------------------------------------------
# Grad-CAM
# ---------------------------------------------------------------------------------------------------------------------


def our_maps(
    classifier: Classifier, images: Tensor, labels: Tensor, channel_weights: ChannelWeights
) -> NDArray[np.float32]:
    """Grad-CAM of all pairs (P, H, W) in one pass, finished as the package finishes its maps."""
    with torch.inference_mode(channel_weights == "closed_form"):
        maps = grad_cam(classifier, images, labels, channel_weights=channel_weights)[label_pairs(labels)]
        maps = interpolate(stretch(maps)[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        return stretch(maps).cpu().numpy()


def stretch(maps: Tensor) -> Tensor:
    """Each map from 0 to 1, as ``scale_cam_image`` does it."""
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax(dim=(1, 2), keepdim=True))


class Logits(nn.Module):
    """What the package expects of a network: the class scores alone."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """(B, K)."""
        return self.classifier(images).logits


def peer(classifier: Classifier) -> Callable[[Tensor, Tensor, int], NDArray[np.float32]]:
    """The package's maps of all pairs (P, H, W), ``count`` rows a call; on a copy, since its hooks stay."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network = copy.deepcopy(classifier)
    explain = GradCAM(Logits(network), [find_layer(network.backbone, LAST_LAYER[network.backbone.name])])

    def maps(images: Tensor, labels: Tensor, count: int) -> NDArray[np.float32]:
        image, label = label_pairs(labels)
        targets: list[Any] = [ClassifierOutputTarget(one) for one in label.tolist()]
        return np.concatenate(
            [
                explain(images[image[start : start + count]], targets[start : start + count])
                for start in range(0, len(image), count)
            ]
        )

    return maps


def check_agreement(mine: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest difference of two sets of maps in [0, 1], most of which must show something."""
    shown = (theirs.max(axis=(1, 2)) > 0.5).mean()
    difference = float(np.abs(mine - theirs).max())
    if shown < 0.5:
        raise SystemExit(f"{1 - shown:.0%} of the package's maps are empty: there is nothing to compare")
    if difference >= 1e-3:
        raise SystemExit(f"our Grad-CAM differs from the package's by {difference:.2g} of a map's peak")
    return difference


def grad_cam_ratios(scale: Scale, times: dict[str, Times]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Grad-CAM in images/s, ours by the package's, and how far the maps are apart."""
    found, differences = [], {}
    names: tuple[BackboneName, ...] = ("resnet50", "vgg16")
    for name in names:
        where = f"{name} gap {scale.side_px} px"
        batch = make_batch(scale.batch, scale.side_px)
        classifier = make_classifier(name).eval()
        with torch.no_grad():
            for weight in classifier.head.parameters():
                weight.abs_()  # evidence for every class: no map of this random network is empty
        ways = our_ways(classifier, *batch)
        if importlib.util.find_spec("pytorch_grad_cam"):
            theirs = peer(classifier)
            differences[where] = max(check_agreement(way(), theirs(*batch, scale.batch)) for way in ways.values())
            ways["grad-cam in batches"] = lambda batch=batch, theirs=theirs: theirs(*batch, scale.batch)
            ways["grad-cam pair by pair"] = lambda batch=batch, theirs=theirs: theirs(*batch, 1)
        measured = times[f"Grad-CAM, {where}"] = take_turns(ways, scale.rounds)
        found += [
            ratio(f"{ours} / {other}, images/s, {where}", quotient(measured, other, ours), "speedup", 3.0)
            for other in ("grad-cam in batches", "grad-cam pair by pair")
            for ours in ("ours by gradient", "ours in closed form")
        ]
    return found, differences


def our_ways(classifier: Classifier, images: Tensor, labels: Tensor) -> dict[str, Callable[[], NDArray[np.float32]]]:
    """Both ways of ours to the channel weights."""
    return {
        "ours by gradient": lambda: our_maps(classifier, images, labels, "gradient"),
        "ours in closed form": lambda: our_maps(classifier, images, labels, "closed_form"),
    }


# ---------------------------------------------------------------------------------------------------------------------


def report(scale: Scale) -> dict[str, Any]:
    """The document of ``--json``."""
    times: dict[str, Times] = {}
    gain = gain_ratios(scale, times)
    adl, added = adl_ratios(scale, times)
    maps, differences = grad_cam_ratios(scale, times)
    return {
        "benchmark": "step_cost",
        "ratios": [*gain, *adl, *maps],
        "adl_parameters_added": added,
        "largest_difference_to_grad_cam": differences,
        "milliseconds": {
            where: {name: round(1000 * statistics.median(values), 1) for name, values in measured.items()}
            for where, measured in times.items()
        },
        "images": {"batch": scale.batch, "small_batch": scale.small_batch, "labels_per_image": 1.5},
        "rounds": {"head fc": scale.fc_rounds, "ADL": scale.adl_rounds, "others": scale.rounds},
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "commit": commit(),
    }


def show(document: Mapping[str, Any]) -> None:
    """Print the document for people."""
    for where, measured in document["milliseconds"].items():
        print(f"{where}: " + ", ".join(f"{name} {value:.1f} ms" for name, value in measured.items()))
    for name, added in document["adl_parameters_added"].items():
        print(f"parameters that ADL adds to {name}: {added}")
    for where, difference in document["largest_difference_to_grad_cam"].items():
        print(f"largest difference to grad-cam's maps, {where}: {difference:.1e} of a map's peak")
    for entry in document["ratios"]:
        value = "–".rjust(8) if entry["value"] is None else f"{entry['value']:8.3f}"
        sign = "≥" if entry["kind"] == "speedup" else "≤"
        verdict = {True: "met", False: "missed", None: "not measured"}[entry["met"]]
        print(f"{value} ×  {entry['name']} (target {sign} {entry['target']}: {verdict})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="small images, few rounds: a minute, says nothing about full size"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    if not importlib.util.find_spec("pytorch_grad_cam"):
        print("the package grad-cam is not installed (extra bench): its rows are left out", file=sys.stderr)
    scale = QUICK if arguments.quick else Scale()
    if torch.cuda.is_available() and not arguments.quick:
        scale = replace(scale, batch=16, small_batch=64, rounds=20, fc_rounds=20)
    document = report(scale)
    if arguments.json:
        print(json.dumps(document, indent=1))
    else:
        show(document)


if __name__ == "__main__":
    main()
