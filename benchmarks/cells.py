"""What the two method tables share: cells that train one method from a common start, cached and resumable.

A cell is a folder named by a hash of everything that decides it.  ``result.json`` says that it is finished; a cell that
was stopped goes on from its checkpoint.  Everything is computed by the product's own stages.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.contracts import (
    ImageIndex,
    ImageSet,
    Progress,
    Runtime,
    SilentProgress,
    StageResult,
    iter_attention,
    read_json,
    write_json,
)
from stages.data.config import DataConfig
from stages.data.subsets import hash_half
from stages.data.transforms import AugmentConfig
from stages.make_attention import MakeAttentionConfig, make_attention
from stages.masks.label_rules import cut_byte, strongest_map, to_class_indices, upsample_maps
from stages.methods import MethodConfig
from stages.methods.cam import CamConfig
from stages.methods.gradcam import GradCamConfig
from stages.nets.backbones.config import BackboneConfig
from stages.ops.metrics.confusion import ThresholdSweep, mean_iou
from stages.prepare_data import PrepareDataConfig, prepare_data
from stages.train_classifier import TrainClassifierConfig, train_classifier
from stages.training.config import TrainingConfig

TIMED_STEPS = 24
"""Training steps that a method's cost is measured over."""


@dataclass(frozen=True)
class Setting:
    """One data set with the network and the two schedules of all its cells."""

    name: str
    data: DataConfig
    backbone: BackboneConfig
    augment: AugmentConfig
    start: TrainingConfig
    """Plain CAM, from public weights or from scratch: the common start."""
    training: TrainingConfig
    """What every method, CAM too, goes on with."""
    attention: MakeAttentionConfig
    weights: Mapping[str, Path] = field(default_factory=dict)
    head_lr_factors: Mapping[str, float] = field(default_factory=dict)
    """By method name, where the common one makes its new layers diverge."""
    num_train: int | None = None
    """Train on the first so many images by hash; None for all."""
    num_scored: int | None = None
    """Score so many images of ``train_report``; None for all."""


@dataclass(frozen=True)
class Bench:
    """A setting prepared under a folder of its own."""

    setting: Setting
    folder: Path
    runtime: Runtime

    def prepare(self) -> None:
        """Index the data once, and write the index of the training images and that of the scored ones.

        The scored images are of ``train_report``; pixel-labelled subsets come from ``train_select``, so that no mask
        that was trained on is scored and all methods are scored on the same images.
        """
        whole = self.folder / "prepared"
        if not (self.folder / "score" / "index.json").exists():
            prepare_data(
                PrepareDataConfig(), data=self.setting.data, out=whole, progress=SilentProgress(), runtime=self.runtime
            )
            index = ImageIndex.model_validate(read_json(whole / "index.json"))
            train = first_by_hash(index.splits["train"], self.setting.num_train)
            report = [name for name in index.splits["train_score"] if hash_half(name) == "train_report"]
            labelled = [name for name in report if index.record(name).labels]
            self._write_index(index, "train", {"train": train, "holdout": index.splits.get("holdout", ())})
            self._write_index(index, "score", {"train": first_by_hash(labelled, self.setting.num_scored)})

    def _write_index(self, index: ImageIndex, name: str, splits: Mapping[str, Sequence[str]]) -> None:
        changed = {**index.splits, **{split: tuple(ids) for split, ids in splits.items()}}
        write_json(
            self.folder / name / "index.json", index.model_copy(update={"splits": changed}).model_dump(mode="json")
        )

    @property
    def data_root(self) -> Path:
        """Where images and masks lie."""
        root = getattr(self.setting.data, "root", None)
        return self.folder / "prepared" / "data" if root is None else Path(root)

    def images(self, name: str) -> ImageSet:
        """The image set ``train`` or ``score``."""
        return ImageSet(ImageIndex.model_validate(read_json(self.folder / name / "index.json")), self.data_root)

    def masked_ids(self) -> list[str]:
        """The labelled images with a mask that a method may be given: of the training set without its hold-out."""
        index = self.images("train").index
        kept_out = set(index.splits["holdout"])
        return [r.id for r in index.split("train") if r.mask and r.labels and r.id not in kept_out]

    def pixel_list(self, count: int, *, of: Sequence[str] | None = None) -> Path:
        """A list file of ``count`` of the ids in ``of``, else of ``train_select``'s; larger ones contain it."""
        chosen = [name for name in self.masked_ids() if hash_half(name) == "train_select"] if of is None else of
        if count > len(chosen):
            raise SystemExit(f"{count} pixel-labelled images were asked for; there are {len(chosen)} to choose from")
        path = self.folder / f"pixel-{count}.txt"
        path.write_text("".join(f"{name}\n" for name in first_by_hash(chosen, count)), encoding="utf-8")
        return path

    # -----------------------------------------------------------------------------------------------------------------

    def start_weights(self, seed: int) -> Path:
        """The classifier that every method of ``seed`` starts from."""
        folder = self._train(CamConfig(), self.setting.start, seed, self.setting.weights)
        return folder / "classifier.safetensors"

    def cell(self, method: MethodConfig, seed: int) -> dict[str, Any]:
        """Train one method from the common start; its figures, from the cell's file where it is finished.

        Grad-CAM trains as CAM does and only looks at the result in another way: it takes CAM's classifier.
        """
        if isinstance(method, GradCamConfig):
            folder = self._relabel(Path(self.cell(CamConfig(), seed)["folder"]), method, seed)
        else:
            start = {"classifier": self.start_weights(seed)}
            folder = self._train(method, self._training_of(method), seed, start)
        return {**read_json(folder / "training.json"), "folder": str(folder)}

    def _training_of(self, method: MethodConfig) -> TrainingConfig:
        factor = self.setting.head_lr_factors.get(method.key_content()["name"])
        training = self.setting.training
        return training if factor is None else training.model_copy(update={"head_lr_factor": factor})

    def _relabel(self, trained: Path, method: MethodConfig, seed: int) -> Path:
        """The same trained classifier as one of another method that adds no layers."""
        folder = self._folder(method, self._training_of(method), seed, started=True)
        if not (folder / "training.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(trained / "classifier.safetensors", folder / "classifier.safetensors")
            description = {**read_json(trained / "classifier.json"), "method": method.model_dump(mode="json")}
            write_json(folder / "classifier.json", description)
            write_json(folder / "training.json", read_json(trained / "training.json"))
        return folder

    def trained(self, method: MethodConfig, seed: int) -> dict[str, Any] | None:
        """What is known of a cell whose training is finished; None of others."""
        path = self._folder(method, self._training_of(method), seed, started=True) / "training.json"
        return read_json(path) if path.exists() else None

    def peek(self, method: MethodConfig, seed: int) -> dict[str, Any] | None:
        """What is known of a cell whose attention is scored; None of others."""
        folder = self._folder(method, self._training_of(method), seed, started=True)
        if not (folder / "attention.json").exists():
            return None
        timing = read_json(folder / "timing.json") if (folder / "timing.json").exists() else {}
        return {**(self.trained(method, seed) or {}), **timing}

    def score_attention(self, method: MethodConfig, seed: int, threshold: float) -> dict[str, Any]:
        """MIoU of the cell's attention on the scored images, at ``threshold`` and at the best one."""
        folder = Path(self.cell(method, seed)["folder"])
        if not (folder / "attention.json").exists():
            make_attention(
                self.setting.attention,
                images=self.folder / "score",
                classifier=folder,
                data_root=self.data_root,
                out=folder / "attention",
                progress=SilentProgress(),
                runtime=self.runtime,
            )
            write_json(folder / "attention.json", {"miou": self._sweep(folder / "attention")})
            shutil.rmtree(folder / "attention")
        miou = np.array(read_json(folder / "attention.json")["miou"])
        best = int(miou.argmax())
        return {"miou": float(miou[cut_byte(threshold)]), "oracle": float(miou[best]), "threshold_oracle": best / 255}

    def _sweep(self, attention: Path) -> list[float]:
        image_set = self.images("score")
        sweep = ThresholdSweep(image_set.index.classes.num_classes)
        for record in iter_attention(attention):
            winner, value = strongest_map(upsample_maps(record))
            truth = image_set.read_mask(image_set.index.record(record.id))
            sweep.add(truth, to_class_indices(winner + 1, record.labels), value)
        return [mean_iou(matrix) for matrix in sweep.matrices()]

    def _folder(self, method: MethodConfig, training: TrainingConfig, seed: int, *, started: bool) -> Path:
        content = {
            "method": method.key_content(),
            "training": training.model_dump(mode="json"),
            "seed": seed,
            "start": self.setting.start.model_dump(mode="json") if started else None,
            "backbone": self.setting.backbone.model_dump(mode="json"),
            "augment": self.setting.augment.model_dump(mode="json"),
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{content['method']['name']}-{seed}-{key}"

    def _train(self, method: MethodConfig, training: TrainingConfig, seed: int, weights: Mapping[str, Path]) -> Path:
        folder = self._folder(method, training, seed, started="classifier" in weights)
        if not (folder / "training.json").exists():
            result = self._call(method, training, seed, weights, folder, SilentProgress())
            last = read_json(folder / "history.json")[-1]
            write_json(folder / "training.json", {**result.metrics, **self._score_labels(folder), "losses": last})
        return folder

    def _score_labels(self, folder: Path) -> dict[str, float]:
        """Label metrics of the trained classifier on val, as evaluate measures them."""
        from stages.methods.classifier_files import load_classifier
        from stages.ops.devices import resolve_device
        from stages.scoring.label_scores import score_classifier

        classifier, _ = load_classifier(folder, resolve_device(self.runtime))
        short_side_px = self.setting.augment.short_side_px
        return score_classifier(classifier, self.images("train"), "val", short_side_px, SilentProgress(), self.runtime)

    def _call(
        self,
        method: MethodConfig,
        training: TrainingConfig,
        seed: int,
        weights: Mapping[str, Path],
        out: Path,
        progress: Progress,
    ) -> StageResult:
        config = TrainClassifierConfig(
            backbone=self.setting.backbone, method=method, augment=self.setting.augment, training=training
        )
        return train_classifier(
            config,
            images=self.folder / "train",
            data_root=self.data_root,
            weights=weights,
            seed=seed,
            out=out,
            progress=progress,
            runtime=self.runtime,
        )

    def seconds_per_step(self, method: MethodConfig, seed: int) -> float:
        """Processor seconds of one training step from the common start, which other work on the machine moves little.

        Measured once, over a few steps, in this process; reading the images ahead counts too.
        """
        path = self._folder(method, self._training_of(method), seed, started=True) / "timing.json"
        if not path.exists():
            training = self._training_of(method).model_copy(update={"epochs": None, "steps": TIMED_STEPS})
            clock = StepClock()
            with tempfile.TemporaryDirectory() as folder:
                weights = {"classifier": self.start_weights(seed)}
                self._call(method, training, seed, weights, Path(folder), clock)
            write_json(path, {"seconds_per_step": clock.seconds_per_step})
        return read_json(path)["seconds_per_step"]


class StepClock(SilentProgress):
    """Processor time of a training's steps, its first report left out."""

    def __init__(self) -> None:
        """Nothing has begun."""
        super().__init__()
        self._first, self._last = (0, 0.0), (0, 0.0)

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        """The training is what is counted in steps."""
        if unit == "steps" and done > self._last[0]:
            self._last = (done, time.process_time())
            if not self._first[0]:
                self._first = self._last

    @property
    def seconds_per_step(self) -> float:
        """Mean over all steps but those of the first report."""
        return (self._last[1] - self._first[1]) / max(self._last[0] - self._first[0], 1)


def first_by_hash(ids: Sequence[str], count: int | None) -> list[str]:
    """The first ``count`` ids by hash, in the order of ``ids``."""
    if count is None:
        return list(ids)
    chosen = set(sorted(ids, key=lambda name: hashlib.sha256(f"subset: {name}".encode()).digest())[:count])
    return [name for name in ids if name in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# What every benchmark of methods prints
# ---------------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], *, scale: float = 100.0, digits: int = 1) -> str:
    """``41.2 ± 0.8``: mean and half the range; ``–`` for nothing."""
    if not values:
        return "–"
    half = f" ± {(max(values) - min(values)) / 2 * scale:.{digits}f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values) * scale:.{digits}f}{half}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    yield "| " + " | ".join(text.ljust(width) for text, width in zip(header, widths, strict=True)) + " |"
    yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    for row in rows:
        yield "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
