"""Attention mIoU of every method, trained from a common start: on the synthetic set, and on real images where given.

One plain CAM classifier a seed is the start.  Every method goes on from it with the same schedule, CAM too, as the
control.  Maps are scored on one half of the training images (train_report); pixel-labelled images come from the other.
Columns: mIoU at the method's configured threshold, at the best threshold for these images (oracle), label accuracy on
images that were not trained on, processor time of a step relative to CAM's.  Mean ± half the range over the seeds.

    python benchmarks/attention_methods.py                                    # synthetic, three seeds
    python benchmarks/attention_methods.py --animals VOC2012 --labels labels.csv --seeds 0
    python benchmarks/attention_methods.py --only cam,gain                    # some rows
    python benchmarks/attention_methods.py --show                             # the table of what is finished

Every cell is kept under --out and is not computed twice; what is not finished is printed as –.  Stop it at any time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cells import Bench, Setting, spread, table
from provenance import commit, hardware

from stages.contracts import Runtime
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.voc import VocConfig
from stages.data.transforms import AugmentConfig
from stages.errors import InputError
from stages.make_attention import MakeAttentionConfig
from stages.methods import METHODS, MethodConfig
from stages.nets.backbones.config import BackboneConfig
from stages.training.config import TrainingConfig


@dataclass(frozen=True)
class Row:
    """One method with its options, and the threshold that its config ships."""

    name: str
    method: Callable[[Bench], MethodConfig]
    threshold: float


def plain(name: str, **options: Any) -> Callable[[Bench], MethodConfig]:  # noqa: ANN401 - options of any method
    """A method that needs nothing of the data."""
    return lambda bench: METHODS[name](**options)


def with_pixels(count: int, **options: Any) -> Callable[[Bench], MethodConfig]:  # noqa: ANN401 - options of gain_ext
    """GAIN_ext with ``count`` pixel-labelled images of train_select."""
    return lambda bench: METHODS["gain_ext"](pixel_list=bench.pixel_list(count), **options)


SYNTHETIC = Setting(
    name="synthetic",
    data=SyntheticConfig(),
    backbone=BackboneConfig(name="small"),
    augment=AugmentConfig(crop_px=96, scale=(0.8, 1.25)),
    start=TrainingConfig(epochs=16, batch_size=16, learning_rate=0.1, head_lr_factor=10.0, warmup_steps=20),
    training=TrainingConfig(epochs=12, batch_size=16, learning_rate=0.1, head_lr_factor=10.0),
    attention=MakeAttentionConfig(scales=(0.5, 1.0, 1.5)),
    head_lr_factors={"acol": 1.0, "spg": 1.0},
)
"""configs/demo.yaml's classifier as the start."""

SYNTHETIC_ROWS = (
    Row("CAM", plain("cam"), 0.05),
    Row("Grad-CAM", plain("gradcam"), 0.05),
    Row("GAIN", plain("gain", am_warmup_epochs=0), 0.05),
    Row("GAIN, the paper's", plain("gain", preset="gain_paper", am_warmup_epochs=0), 0.05),
    Row("GAIN_ext, 30 masks", with_pixels(30, pixel_repeat=20), 0.15),
    Row("ADL", plain("adl"), 0.05),
    Row("HaS", plain("has", grid_px=24), 0.05),
    Row("ACoL", plain("acol", head_channels=64), 0.05),
    Row("SPG", plain("spg", head_channels=64, guide_channels=32), 0.05),
    Row("CutMix", plain("cutmix"), 0.05),
)

ANIMALS_ROWS = (
    Row("CAM", plain("cam"), 0.10),
    Row("Grad-CAM", plain("gradcam"), 0.10),
    Row("GAIN", plain("gain", am_warmup_epochs=0), 0.10),
    Row("GAIN, the paper's", plain("gain", preset="gain_paper", am_warmup_epochs=0), 0.10),
    Row("The paper's, judge: frozen", plain("gain", preset="gain_paper", am_warmup_epochs=0, judge="frozen"), 0.10),
    Row("GAIN, target: erased", plain("gain", am_warmup_epochs=0, target="erased"), 0.10),
    Row("GAIN, sigmoid mask", plain("gain", am_warmup_epochs=0, mask="sigmoid"), 0.10),
    Row("GAIN, its own judge", plain("gain", am_warmup_epochs=0, judge="self"), 0.10),
    Row("GAIN_ext, 50 masks", with_pixels(50, pixel_repeat=20), 0.20),
    Row("GAIN_ext, 100 masks", with_pixels(100, pixel_repeat=10), 0.20),
    Row("CAM, these as often", with_pixels(100, pixel_repeat=10, ext_weight=0), 0.10),
    Row("GAIN and GAIN_ext, 100 masks", with_pixels(100, pixel_repeat=10, alpha=1, am_warmup_epochs=0), 0.20),
    Row("ADL", plain("adl"), 0.10),
    Row("ReCAM", plain("recam"), 0.30),
)


def animals(arguments: argparse.Namespace) -> Setting:
    """configs/voc_animals_cam.yaml's classifier as the start, on a fixed subset."""
    precision, is_lite = arguments.precision, arguments.backbone != "squeezenet1_1"
    start = TrainingConfig(
        epochs=5 if is_lite else 16, batch_size=16, learning_rate=0.005, head_lr_factor=10.0, precision=precision
    )
    goes_on = (
        {"epochs": 2, "learning_rate": 0.004} if is_lite else {"epochs": 3, "learning_rate": 0.01, "clip_norm": 1.0}
    )
    return Setting(
        name=f"voc_animals-{arguments.backbone}",
        data=VocConfig(
            root=arguments.animals,
            labels=arguments.labels,
            classes=("cat", "cow", "dog", "horse", "sheep"),
            other_classes="background",
            train_list="trainaug",
            score_list="train",
            val_list="val",
        ),
        backbone=BackboneConfig(name=arguments.backbone, output_stride=16 if is_lite else 8, pretrained=True),
        augment=AugmentConfig(crop_px=224, scale=(0.75, 1.5), short_side_px=256),
        start=start,
        training=start.model_copy(update=goes_on),
        attention=MakeAttentionConfig(scales=(0.5, 1.0, 1.5), short_side_px=256),
        weights={"squeezenet1_1": arguments.weights} if arguments.weights else {},
        num_train=arguments.images,
        num_scored=arguments.scored,
    )


def quick(setting: Setting) -> Setting:
    """A minute's worth: does it run, not what does it give."""
    return replace(
        setting,
        start=setting.start.model_copy(update={"epochs": None, "steps": 20}),
        training=setting.training.model_copy(update={"epochs": None, "steps": 4}),
        attention=setting.attention.model_copy(update={"scales": (1.0,), "flip": False}),
        num_train=64,
        num_scored=8,
    )


def fill(bench: Bench, rows: tuple[Row, ...], seeds: list[int]) -> None:
    """Compute the missing cells, a row at a time, and print the table to stderr after each."""
    bench.prepare()
    for row in rows:
        for seed in seeds:
            try:
                bench.score_attention(row.method(bench), seed, row.threshold)
                bench.seconds_per_step(row.method(bench), seeds[0])
            except InputError as error:  # a training that diverges leaves its cell empty
                print(f"{row.name}, seed {seed}: {error}", file=sys.stderr, flush=True)
        print("\n".join(render(bench, rows, seeds)), file=sys.stderr, flush=True)


def figures(bench: Bench, row: Row, seeds: list[int]) -> dict[str, list[float]]:
    """The finished figures of one row by column."""
    found: dict[str, list[float]] = {"miou": [], "oracle": [], "threshold": [], "accuracy": [], "seconds": []}
    for seed in seeds:
        method = row.method(bench)
        cell = bench.peek(method, seed)
        if cell is None:
            continue
        scores = bench.score_attention(method, seed, row.threshold)
        found["miou"].append(scores["miou"])
        found["oracle"].append(scores["oracle"])
        found["threshold"].append(scores["threshold_oracle"])
        found["accuracy"].append(cell["classifier.label_accuracy"])
        if "seconds_per_step" in cell and not found["seconds"]:
            found["seconds"].append(cell["seconds_per_step"])
    return found


def render(bench: Bench, rows: tuple[Row, ...], seeds: list[int]) -> list[str]:
    """The table as Markdown."""
    found = {row.name: figures(bench, row, seeds) for row in rows}
    base = found["CAM"]["seconds"] if "CAM" in found else []
    lines = []
    for row in rows:
        values = found[row.name]
        relative = [value / (sum(base) / len(base)) for value in values["seconds"]] if base else []
        lines.append(
            [
                row.name,
                f"{spread(values['miou'])} at {row.threshold:.2f}" if values["miou"] else "–",
                f"{spread(values['oracle'])} at {spread(values['threshold'], scale=1, digits=2)}"
                if values["oracle"]
                else "–",
                spread(values["accuracy"]),
                spread(relative, scale=1, digits=2),
            ]
        )
    count = len(bench.images("score").index.splits["train"])
    which = f"{count} images scored, seeds {', '.join(map(str, seeds))}"
    title = f"{bench.setting.name}: {which}; {hardware()}; commit {commit()}"
    return [title, *table(["method", "mIoU, configured", "mIoU, oracle", "label accuracy", "time / CAM"], lines), ""]


def document(bench: Bench, rows: tuple[Row, ...], seeds: list[int]) -> Mapping[str, Any]:
    """The document of ``--json``."""
    found = {row.name: figures(bench, row, seeds) for row in rows}
    cells = {name: {key: values for key, values in columns.items()} for name, columns in found.items()}
    return {
        "benchmark": "attention_methods",
        "setting": bench.setting.name,
        "cells": cells,
        "ratios": [],
        "hardware": hardware(),
        "commit": commit(),
    }


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--animals", type=Path, help="VOC root with the five animal classes; without it the synthetic set"
    )
    parser.add_argument("--labels", type=Path, help="labels.csv of --animals")
    parser.add_argument(
        "--backbone",
        choices=["tf_efficientnet_lite0", "tf_efficientnet_lite2", "squeezenet1_1"],
        default="tf_efficientnet_lite0",
        help="of --animals; Lite's weights come with the extra 'weights'",
    )
    parser.add_argument("--weights", type=Path, help="ImageNet weights of SqueezeNet 1.1, for --backbone squeezenet1_1")
    parser.add_argument("--images", type=int, help="train on so many images of --animals")
    parser.add_argument("--scored", type=int, help="score so many images of --animals")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of --animals")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="comma-separated beginnings of row names")
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="compute nothing, print what is finished")
    parser.add_argument("--quick", action="store_true", help="a few steps of each method: under two minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    setting, rows = (animals(arguments), ANIMALS_ROWS) if arguments.animals else (SYNTHETIC, SYNTHETIC_ROWS)
    setting = quick(setting) if arguments.quick else setting
    if arguments.only:
        wanted = tuple(name.strip().lower() for name in arguments.only.split(","))
        rows = tuple(row for row in rows if row.name.lower().startswith(wanted))
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    folder = arguments.out / "attention_methods" / (setting.name + ("_quick" if arguments.quick else ""))
    bench = Bench(setting, folder, Runtime(workers=1, threads=arguments.threads))
    if not arguments.show:
        fill(bench, rows, seeds)
    print(
        json.dumps(document(bench, rows, seeds), indent=1) if arguments.json else "\n".join(render(bench, rows, seeds))
    )


if __name__ == "__main__":
    main()
