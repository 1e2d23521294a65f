"""Counting a segmentation's confusions: ours against torchmetrics' update, on the CPU, VOC-size masks, 21 classes.

The peer is ``MulticlassJaccardIndex(num_classes=21, ignore_index=255)``, once as it comes and once without its checks
of the arguments; it is given int64 tensors that are made before the clock starts.  Ours takes the uint8 masks as they
are decoded, and its time includes what the peer does not do: the counts of each image are kept apart and written to
disk.  Both work in one thread, and processor time is taken, which other work on the machine moves little.  All count
the same images in one run, in interleaved rounds; the IoU of every class must be equal; ratios are of medians.

``prediction`` has the images/s of DeepLabV3+ on EfficientNet-Lite0 at a random start, one scale, in fp32 and in bf16 by
turns, one thread; ``cpu_has_bf16`` says whether the processor has instructions for the latter.

The document also has the time per image of the boundary scores, that of the 95 % interval of one mIoU over 1,449 images
(2,000 resamples), and the stored bytes per image.

    python benchmarks/evaluate.py [--quick] [--json] [--truths DIR]

``--truths DIR`` takes palette PNGs (VOC's SegmentationClass) instead of drawn masks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from provenance import commit, has_bf16, processor
from turns import measure

from stages.contracts import read_index_mask
from stages.ops.devices import Precision
from stages.ops.metrics.bootstrap import NUM_RESAMPLES, interval, mean_over_classes, resample_iou
from stages.ops.metrics.boundaries import count_boundaries
from stages.ops.metrics.confusion import SparseConfusions, confusion_matrix, iou, write_confusions

NUM_CLASSES = 21
SIZE = (375, 500)
SEEN = (192, 256)
"""Of the image that the segmenter sees: bf16 without instructions for it takes seconds."""
VOC_VAL = 1449
TARGET = 5.0

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Truth and prediction of one image (H, W)."""


def draw_truth(seed: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """One to three star-shaped objects, void lines around them as VOC has."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    truth = np.zeros(size, np.uint8)
    for _ in range(rng.integers(1, 4)):
        y, x = rows - rng.uniform(0.2, 0.8) * size[0], columns - rng.uniform(0.2, 0.8) * size[1]
        radius = (1 + 0.25 * np.sin(5 * np.arctan2(y, x) + rng.uniform(0, 6))) * rng.uniform(0.1, 0.35) * size[0]
        distance = np.hypot(y, x)
        truth[distance < radius + 2.5] = 255
        truth[distance < radius - 2.5] = rng.integers(1, NUM_CLASSES)
    return truth


def predict(truth: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """A plausible prediction: the truth a few pixels aside, with blocks of 8 pixels of another class here and there."""
    rng = np.random.default_rng((seed, 1))
    moved = np.roll(truth, tuple(int(step) for step in rng.integers(-6, 7, 2)), (0, 1))
    moved[moved == 255] = 0
    height, width = truth.shape
    blocks = rng.random((height // 8 + 1, width // 8 + 1)) < 0.03
    wrong = np.kron(blocks, np.ones((8, 8), bool))[:height, :width]
    return np.where(wrong, rng.integers(0, NUM_CLASSES), moved).astype(np.uint8)


def find_pairs(truths: Path | None, count: int) -> list[Pair]:
    """Drawn masks, or those of a folder, with predictions."""
    if truths is None:
        masks = [draw_truth(seed) for seed in range(count)]
    else:
        found = sorted(truths.glob("*.png"))
        if not found:
            raise SystemExit(f"{truths} holds no .png masks")
        masks = [read_index_mask(path) for path in found[:: max(1, len(found) // count)][:count]]
    return [(truth, predict(truth, seed)) for seed, truth in enumerate(masks)]


def ours(pairs: Sequence[Pair], path: Path) -> NDArray[np.float64]:
    """Count every image, keep each one's counts, write them; IoU of each class."""
    counted = [(str(n), confusion_matrix(truth, mask, NUM_CLASSES)) for n, (truth, mask) in enumerate(pairs)]
    counts = SparseConfusions.from_matrices(NUM_CLASSES, counted)
    write_confusions(path, {"segmenter": counts})
    return iou(counts.total())


def peer(pairs: Sequence[Pair], *, validate_args: bool) -> Callable[[], NDArray[np.float64]]:
    """The same by torchmetrics, one update an image."""
    import torch
    from torchmetrics.classification import MulticlassJaccardIndex

    torch.set_num_threads(1)
    tensors = [(torch.from_numpy(mask).long(), torch.from_numpy(truth).long()) for truth, mask in pairs]

    def count() -> NDArray[np.float64]:
        metric = MulticlassJaccardIndex(NUM_CLASSES, average="none", ignore_index=255, validate_args=validate_args)
        for mask, truth in tensors:
            metric.update(mask, truth)
        return metric.compute().numpy()

    return count


def check_equal(mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> None:
    """Both must find the same IoU; a class that does not occur is NaN here and 0 there."""
    if not np.allclose(np.nan_to_num(mine), theirs, atol=1e-6):
        raise SystemExit(f"the IoU differs: {mine} and {theirs}")


def bootstrap_ways(pairs: Sequence[Pair]) -> dict[str, Callable[[], object]]:
    """The interval of one mIoU over as many images as VOC's val."""
    matrices = [confusion_matrix(truth, mask, NUM_CLASSES) for truth, mask in pairs]
    named = ((str(number), matrices[number % len(matrices)]) for number in range(VOC_VAL))
    counts = SparseConfusions.from_matrices(NUM_CLASSES, named)
    return {"interval": lambda: interval(mean_over_classes(resample_iou([counts]))[0])}


def predict_ways() -> dict[str, Callable[[], object]]:
    """A segmenter's scores of one image in each precision."""
    import torch

    from stages.nets.segmenters.config import DeepLabConfig
    from stages.ops.multi_scale import predict_logits

    torch.manual_seed(0)
    net = DeepLabConfig(name="deeplabv3plus", encoder="tf_efficientnet_lite0").build(NUM_CLASSES).eval()
    images = torch.randn(1, 3, *SEEN)

    def look(precision: Precision) -> torch.Tensor:
        with torch.inference_mode():
            return predict_logits(net, images, precision=precision).argmax(dim=1)

    return {precision: partial(look, precision) for precision in ("fp32", "bf16")}


def report(pairs: Sequence[Pair], rounds: int, folder: Path) -> dict[str, Any]:
    """The document of ``--json``."""
    path = folder / "confusions.npz"
    checked, unchecked = peer(pairs, validate_args=True), peer(pairs, validate_args=False)
    check_equal(ours(pairs, path), checked())
    median = measure(
        {
            "ours": lambda: ours(pairs, path),
            "torchmetrics": checked,
            "torchmetrics, unchecked": unchecked,
            "boundary scores": lambda: [count_boundaries(truth, mask, NUM_CLASSES) for truth, mask in pairs],
        },
        rounds,
        clock=time.process_time,  # of one thread, which other work on the machine moves little
    )
    ratios = [
        _ratio(f"update: {name} / ours", median[name] / median["ours"])
        for name in ("torchmetrics", "torchmetrics, unchecked")
    ]
    return {
        "benchmark": "evaluate",
        "ratios": ratios,
        "milliseconds_per_image": {name: round(1000 * value / len(pairs), 4) for name, value in median.items()},
        "seconds_per_interval": round(measure(bootstrap_ways(pairs), 3, clock=time.process_time)["interval"], 3),
        "prediction": {name: round(1 / value, 3) for name, value in measure(predict_ways(), 3).items()},
        "cpu_has_bf16": has_bf16(),
        "resamples": NUM_RESAMPLES,
        "bytes_per_image": round(path.stat().st_size / len(pairs), 1),
        "images": len(pairs),
        "rounds": rounds,
        "hardware": processor(),
        "commit": commit(),
    }


def _ratio(name: str, value: float) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(value, 2),
        "kind": "speedup",
        "target": TARGET,
        "met": round(value, 2) >= TARGET,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="8 images, three rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--truths", type=Path, help="folder of true masks (.png) to use")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torchmetrics") is None:
        raise SystemExit("torchmetrics is not installed: there is no peer to measure against")
    pairs = find_pairs(arguments.truths, 8 if arguments.quick else 40)
    with tempfile.TemporaryDirectory() as folder:
        document = report(pairs, 3 if arguments.quick else 9, Path(folder))
    if arguments.json:
        print(json.dumps(document, indent=1))
        return
    for name, value in document["milliseconds_per_image"].items():
        print(f"{value:9.3f} ms/image  {name}")
    print(f"{document['seconds_per_interval']:9.3f} s         95 % interval of one mIoU, {VOC_VAL} images")
    for name, value in document["prediction"].items():
        print(f"{value:9.3f} images/s  DeepLabV3+ in {name}")
    print(f"the CPU has {'' if document['cpu_has_bf16'] else 'no known '}instructions for bf16")
    for ratio in document["ratios"]:
        print(f"{ratio['value']:9.2f} ×         {ratio['name']} (target {ratio['target']:.1f})")


if __name__ == "__main__":
    main()
