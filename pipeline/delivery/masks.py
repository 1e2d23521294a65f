"""The masks of a run for a person's eyes and hands: which there are, which are worth a correction."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config.run_config import RunConfig
from pipeline.delivery.trained_segmenter import prediction_config, require_built
from pipeline.engine.invocation import write_invocation
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.records import load_named
from pipeline.store.artifacts import Artifact, Store, open_store
from stages.contracts import ImageSet, Progress, open_image_set, read_index_mask
from stages.data.adapters.custom import CustomConfig
from stages.data.adapters.voc import VocConfig
from stages.errors import ConfigError
from stages.masks.mask_files import THRESHOLD, read_steps
from stages.methods.gain import GainExtConfig
from stages.scoring.agreement import Agreement, least_agreed, measure_agreement


@dataclass(frozen=True)
class PixelLabelsUse:
    """How a run takes corrected masks as pixel labels of its classifier."""

    first: str
    """What is to be done before, as the end of a sentence; empty for nothing."""
    overrides: tuple[str, ...]
    """What the config needs."""


@dataclass(frozen=True)
class RunMasks:
    """A config with what the store holds of it."""

    run: RunConfig
    plan: Plan
    store: Store
    invocation: str
    """Config and options behind ``wsss run``."""
    doing: str
    """The command, for messages."""

    @cached_property
    def images(self) -> ImageSet:
        """The data set.

        Raises:
            MissingArtifactError: ``prepare_data`` is not in the store.
        """
        return open_image_set(self._require("prepare_data").path, self.plan.data.root)

    def pseudo_masks(self) -> dict[str, Path]:
        """Image id to pseudo-mask, in the order of the training images.

        Raises:
            ConfigError: the run makes none.
            MissingArtifactError: they are not in the store.
        """
        return _by_id(self._made_masks().path / "masks", self.images.index.splits["train"])

    def predictions(self) -> dict[str, Path]:
        """Image id to the segmenter's mask of the splits that ``evaluate`` predicts.

        Raises:
            ConfigError: the run trains no segmenter.
            MissingArtifactError: they are not in the store.
        """
        if not self.run.evaluate.segmentation:
            raise ConfigError(f"{self.doing}: this run trains no segmenter (evaluate.segmentation: false)")
        folder = self._require("evaluate").path / "predictions"
        return _by_id(folder, [record.id for record in self.images.index.images])

    def pixel_labels_use(self, folder: Path, ids: Path) -> PixelLabelsUse | None:
        """What makes ``gain_ext`` learn the masks in ``folder``, of the images in the list ``ids``.

        They are true masks of the data set then, which has one folder of them.  None where its format has no such
        folder.
        """
        data = self.run.data
        if not isinstance(data, CustomConfig | VocConfig):
            return None
        is_ext = isinstance(self.run.train_classifier.method, GainExtConfig)
        listed = as_value(ids)
        method = f".pixel_list={listed}" if is_ext else f"={{name: gain_ext, pixel_list: {listed}}}"
        overrides = [f"train_classifier.method{method}"]
        todo: list[str] = []
        if any(record.mask is not None for record in self.images.index.images):
            todo.append(f"copy them into {data.root / str(data.masks)}")
        else:
            place = Path(os.path.relpath(folder.resolve(), data.root.resolve()))
            overrides.insert(0, f"data.masks={as_value(place)}")
        if isinstance(data, CustomConfig) and data.train_list is None:
            todo.append("give data.train_list and data.val_list, since without lists val is drawn from masked images")
        return PixelLabelsUse(f" ({'; '.join(todo)})" if todo else "", tuple(overrides))

    def least_agreed(self, count: int, predictions: Path | None, progress: Progress) -> list[Agreement]:
        """The training images whose attention, pseudo-mask and prediction agree least, the least first.

        Images whose true masks were used in training are left out: somebody has corrected them already.

        Args:
            count: How many.
            predictions: Folder of ``<id>.png`` of the training images; None predicts them now, at one scale.
            progress: Hears of every image.

        Raises:
            ConfigError: the run makes no pseudo-masks.
            MissingArtifactError: what is needed is not in the store.
            DataError: a prediction does not read.
        """
        made, segmenter = self._made_masks(), self._require("train_segmenter")
        stages = [self._require(stage) for stage in (*self.plan.upstream("train_segmenter"), "train_segmenter")]
        corrected = frozenset().union(*(artifact.mask_supervision for artifact in stages))
        records = [record for record in self.images.index.split("train") if record.id not in corrected]
        with tempfile.TemporaryDirectory() as temporary:
            if predictions is None:
                from stages.scoring.prediction import predict_images

                config = prediction_config(self.run).model_copy(update={"multi_scale": False, "crf": False})
                predict_images(
                    config,
                    self.images,
                    records,
                    segmenter=segmenter.path,
                    scored=frozenset(),
                    out=Path(temporary),
                    progress=progress,
                    runtime=self.run.runtime,
                )
            folder = Path(temporary) / "predictions" if predictions is None else predictions
            found: list[Agreement] = []
            for done, record in enumerate(records, start=1):
                views = _read_views(made.path, folder, record.id)
                found.append(measure_agreement(record.id, views, record.labels or (), self.images.index.classes))
                progress.step("compare", done, len(records))
        return least_agreed(found, count)

    def _made_masks(self) -> Artifact:
        if "make_masks" not in self.plan.keys:
            raise ConfigError(
                f"{self.doing}: this run makes no pseudo-masks (train_segmenter.supervision: full, or "
                "evaluate.segmentation: false); name another run, or a folder of masks"
            )
        return self._require("make_masks")

    def _require(self, stage: str) -> Artifact:
        return require_built(self.plan, self.store, stage, doing=self.doing, invocation=self.invocation)


def _read_views(made: Path, predictions: Path, image_id: str) -> dict[str, NDArray[np.uint8]]:
    """Attention under the threshold, where a refinement came after it; pseudo-mask; prediction."""
    attention = read_steps(made, image_id).get(THRESHOLD)
    views = {} if attention is None else {"attention": attention}
    views["pseudo-mask"] = read_index_mask(made / "masks" / f"{image_id}.png")
    return views | {"prediction": read_index_mask(predictions / f"{image_id}.png")}


def _by_id(folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    paths = {image_id: folder / f"{image_id}.png" for image_id in ids}
    return {image_id: path for image_id, path in paths.items() if path.is_file()}


def as_value(path: Path) -> str:
    """A path as a value of YAML."""
    return str(path) if re.fullmatch(r"[\w./-]*[A-Za-z/_][\w./-]*", str(path)) else json.dumps(str(path))


def open_masks(config: str, overrides: Sequence[str] | None, artifacts: str, *, doing: str) -> RunMasks:
    """What the store holds of ``config``; the words are those of the command line.

    Raises:
        InputError: the config or its data set is wrong.
    """
    run, store = load_named(config, overrides or [], artifacts), open_store(artifacts)
    plan = plan_run(run, store.digest_cache)
    return RunMasks(run, plan, store, write_invocation(config, overrides, artifacts), doing)
