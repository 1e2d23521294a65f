"""Small trainings by name; run as a module with FOLDER it is one rank of two that does them all.

Every rank writes what came out of its trainings to FOLDER; the tests compare it with one process's.
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn

from stages.contracts import Runtime, SilentProgress, read_json
from stages.methods.adl import AdlConfig
from stages.methods.cam import CamConfig
from stages.methods.gain import GainConfig, GainExtConfig
from stages.methods.spg import SpgConfig
from stages.nets.backbones.config import BackboneConfig
from stages.nets.classifier import Classifier
from stages.nets.segmenters.config import DeepLabConfig
from stages.nets.segmenters.files import load_segmenter
from stages.ops.collectives import wait_for_all
from stages.train_classifier import _Objective as ClassifierObjective
from stages.training.config import TrainingConfig
from stages.training.distributed import is_main, main_first, num_ranks, this_rank
from stages.training.loop import train
from stages.training.segmenter_objective import LossConfig, SegmenterObjective
from tests.stages.tiny_segmenters import make_config, write_folders
from tests.stages.tiny_segmenters import run as run_stage

SIZE, CLASSES = 32, 3
RUNTIME = Runtime(checkpoint_every_s=0, device="cpu", workers=0, threads=1)
CONFIG = TrainingConfig(steps=5, batch_size=5, learning_rate=0.05, clip_norm=5.0)


class Samples:
    """Images with labels and masks.  Void pixels: sample 0 has no other, and each has another share of them."""

    def __len__(self):
        return 11

    def get(self, index, epoch):
        random = np.random.default_rng(index)
        image = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        labels = (random.random(CLASSES) < 0.5).astype(np.float32)
        mask = random.integers(0, CLASSES + 1, (SIZE, SIZE), dtype=np.uint8)
        mask[random.random((SIZE, SIZE)) < index / 11] = 0
        mask[: SIZE * (11 - index) // 11] = 255
        return {"images": image, "labels": labels, "masks": mask}


class LastMasks(Samples):
    """Only the last two samples have a mask that is not void: most slices have none."""

    def get(self, index, epoch):
        sample = super().get(index, epoch)
        return sample if index >= 9 else {**sample, "masks": np.full_like(sample["masks"], 255)}


class SureSamples(Samples):
    """With a confidence for each pixel; the first samples are less sure than the last."""

    def get(self, index, epoch):
        random = np.random.default_rng(100 + index)
        confidence = random.integers(0, 20 * (index + 1), (SIZE, SIZE)).astype(np.uint8)
        return {**super().get(index, epoch), "confidence": confidence}


def fit(model, objective, out, *, samples=None, config=CONFIG, groups=None):
    history = train(
        model,
        objective=objective,
        dataset=samples or Samples(),
        config=config,
        parameter_groups=groups or [{"params": model.parameters()}],
        seed=5,
        out=out,
        progress=SilentProgress(),
        runtime=RUNTIME,
    )
    return history, model


def classify(out, *, method=None, freeze_bn=True, samples=None):
    """A classifier on the small backbone."""
    torch.manual_seed(0)
    backbone = BackboneConfig(name="small", freeze_bn=freeze_bn).build()
    classifier = Classifier(backbone, CLASSES)
    prepared = (method or CamConfig()).build()
    prepared.prepare(classifier)
    return fit(classifier, ClassifierObjective(prepared), out, samples=samples)


def segment(out, *, loss="cross_entropy", resolution="pixels", model=None, config=CONFIG, samples=None):
    """A segmenter without BatchNorm and dropout, unless another is given."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, CLASSES + 1, 3, 2, 1))
    objective = SegmenterObjective(LossConfig(loss=loss, loss_resolution=resolution))
    return fit(plain if model is None else model(), objective, out, config=config, samples=samples)


def deeplab():
    """BatchNorm everywhere, one of them behind the image pooling: one value per image and channel."""
    config = DeepLabConfig(name="deeplabv3plus", encoder="resnet18", aspp_dropout=0.0, output_stride=16)
    return config.build(CLASSES + 1)


def uneven_parameters(out):
    """Parameters that get a gradient from every image, from images of sample 3 alone, and from none."""
    model = nn.Module()
    model.all, model.some, model.none = (nn.Parameter(torch.ones(2)) for _ in range(3))

    def objective(model, batch, step):
        values = batch["labels"].sum(1) * model.all.sum()
        chosen = batch["labels"].sum(1) == 3
        if chosen.any():
            values = values + chosen * model.some.prod()
        return {"loss": values.mean() * 0.01}

    return fit(model, objective, out)


class Killed(BaseException):
    """The process would be gone."""


def dropout_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 1))


def resumed(out, *, kill_at=None):
    """A training with dropout and BatchNorm that is killed before a step and called again."""
    objective = SegmenterObjective(LossConfig(loss_resolution="cells"))

    def killing(model, batch, step):
        if step.step == kill_at:
            raise Killed
        return objective(model, batch, step)

    try:
        return fit(dropout_net(), killing, out)
    except Killed:
        return fit(dropout_net(), objective, out)


def left_behind(out):
    """A training that nobody has continued yet."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, CLASSES + 1, 3, 2, 1))
    objective = SegmenterObjective(LossConfig())

    def killing(model, batch, step):
        if step.step == 3:
            raise Killed
        return objective(model, batch, step)

    with contextlib.suppress(Killed):
        fit(plain, killing, out)
    return [], plain


def dropout_draws(out):
    """What the ranks draw in the first step, as if it were a loss."""
    return fit(nn.Conv2d(3, 1, 1), lambda m, b, s: {"loss": m(b["images"]).mean(), "draw": torch.rand(())}, out)


GAIN = {"am_mode": "per_class", "am_warmup_epochs": 0}


def rounds(out):
    """A segmenter that labels its own images and learns from that; one rank makes the data for all."""
    with main_first():
        if is_main():
            write_folders(out)
    training = TrainingConfig(steps=10, batch_size=4, learning_rate=0.05)
    again = {"rounds": 1, "retraining": {"scales": [1.0]}}
    config = make_config(loss="balanced_cross_entropy", training=training, **again)
    run_stage((out / "images", out / "masks"), out / "result", config)
    wait_for_all()  # the main rank writes after the others are done
    return read_json(out / "result" / "history.json"), load_segmenter(out / "result", "cpu")


EQUAL = {
    "cam": classify,
    "cam, BatchNorm": partial(classify, freeze_bn=False),
    "gain, its own judge": partial(classify, method=GainConfig(judge="self", **GAIN)),
    "gain, a frozen judge": partial(classify, method=GainConfig(**GAIN), freeze_bn=False),
    "gain, an earlier layer": partial(
        classify,
        method=GainConfig(layer="features.8", channel_weights="gradient", second_order=True, **GAIN),
        freeze_bn=False,
    ),
    "gain_ext": partial(classify, method=GainExtConfig(**{**GAIN, "alpha": 0.3}), samples=LastMasks()),
    "spg": partial(classify, method=SpgConfig(layers=("features.8", "features.14"), head_channels=8, guide_channels=8)),
    "cross_entropy": segment,
    "cross_entropy, cells": partial(segment, resolution="cells"),
    "cross_entropy, two passes": partial(
        segment, config=CONFIG.model_copy(update={"accumulate_steps": 2, "ema_decay": 0.5})
    ),
    "balanced_cross_entropy": partial(segment, loss="balanced_cross_entropy"),
    "bootstrapped_cross_entropy, two passes": partial(
        segment, loss="bootstrapped_cross_entropy", config=CONFIG.model_copy(update={"accumulate_steps": 2})
    ),
    "smoothed_cross_entropy": partial(segment, loss="smoothed_cross_entropy", resolution="cells"),
    "sec": partial(segment, loss="sec"),
    "confidence": partial(segment, samples=SureSamples()),
    "confidence, balanced": partial(segment, loss="balanced_cross_entropy", resolution="cells", samples=SureSamples()),
    # the statistics of five values behind the image pooling make much of rounding: slowly
    "deeplab": partial(segment, model=deeplab, config=CONFIG.model_copy(update={"learning_rate": 0.001})),
    "uneven parameters": uneven_parameters,
}
"""Trainings that n devices do as one: nothing random in the net."""

OTHERS = {
    "adl": partial(classify, method=AdlConfig(layers=("features.8",), gamma=0.8)),
    "whole": resumed,
    "killed": partial(resumed, kill_at=3),
    "draws": dropout_draws,
    "left": left_behind,
    "rounds": rounds,
}
"""Trainings in which every device draws its own random numbers."""


def run_scenarios(folder: Path, names) -> dict:
    """History and tensors by name."""
    found = {}
    for name in names:
        torch.manual_seed(0)
        history, model = {**EQUAL, **OTHERS}[name](folder / name)
        found[name] = {"history": history, "tensors": dict(model.state_dict())}
    return found


def main(folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=this_rank(), world_size=num_ranks())
    found = run_scenarios(folder, [*EQUAL, *OTHERS])
    torch.save(found, folder / f"rank-{this_rank()}.pt")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
