"""The embedded benchmark "heads and bodies": pictures in which plain CAM finds the head and misses the body.

Writes a data set in VOC's layout; reads nothing.  Each object has a small, vivid head in its class's colour and a
large, muted body whose class shows only in a faint texture.  An option adds a context bias: a class that, in
training, always stands on a background of its own.  ``docs/synthetic.md`` describes the options and what they show.
Source: the disease is that of Li et al., "Tell Me Where to Look: Guided Attention Inference Network", CVPR 2018
(their boats that are never seen without water), and Choe & Shim, "Attention-based Dropout Layer", CVPR 2019.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, StageConfig
from stages.data.joining import Sources, join_sources
from stages.data.records import IdList, Problems, Scan

GENERATOR_VERSION = 1
"""Bumped when the same config gives other pictures: it is in the digest of the data."""

SYNTHETIC_CLASSES = ("auk", "bee", "cod", "doe", "elk", "fox", "gnu", "hen", "ibis", "jay", "koi", "lynx")
"""Names of the (up to 12) classes, in alphabetical order, as an adapter without a class list would sort them."""

BIASED_LABEL = 0
"""Label index of the one class that the context bias ties to a background."""

ValGroup = Literal["on", "off", "empty", "other"]
VAL_GROUPS: tuple[ValGroup, ...] = ("on", "off", "empty", "other")
"""Groups of val images under a context bias, in turn: the biased class on its background, the biased class on an
ordinary one, its background without any object, and other classes on ordinary backgrounds."""

Split = Literal["train", "val"]
LISTS = "ImageSets/Segmentation"


class SyntheticConfig(StageConfig):
    """Generated pictures; every one follows from the seed, its split and its number alone."""

    format: Literal["synthetic"] = "synthetic"
    classes: tuple[str, ...] | None = None
    """Names for the ``num_classes`` classes; empty (null) takes the built-in ones."""
    num_train: int = Field(default=600, ge=2, le=100_000)
    """Training images."""
    num_val: int = Field(default=150, ge=1, le=100_000)
    """Validation images."""
    size_px: int = Field(default=96, ge=64, le=256)
    """Height and width of the pictures in pixels."""
    num_classes: int = Field(default=6, ge=2, le=12)
    """Foreground classes."""
    max_objects: int = Field(default=2, ge=1, le=4)
    """Each picture has 1 … this many objects, of different classes; they may overlap."""
    head_ratio: float = Field(default=0.30, ge=0.15, le=0.60)
    """Radius of the head as a fraction of the body's half length; a larger head leaves less for CAM to miss."""
    body_contrast: float = Field(default=22.0, ge=4.0, le=80.0)
    """Amplitude of the body's class texture in grey levels (0-255); the noise on it has a deviation of 6."""
    context_bias: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the biased class's training images that stand on its own background; true means 1, false 0.
    Above 0, val comes in four groups, recorded in ImageSets/Segmentation/val_groups.csv."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Another seed gives another data set of the same kind; independent of the run's seed."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Has no effect on generated pictures; here so that every data set has it."""

    @model_validator(mode="after")
    def _check_classes(self) -> SyntheticConfig:
        names = self.class_names
        if len(names) != self.num_classes or len(set(names)) != len(names) or not all(names):
            raise ValueError(f"classes must be {self.num_classes} different names (num_classes), found {list(names)}")
        if not all(name.isidentifier() for name in names) or "background" in names:
            raise ValueError("class names must be plain words (letters, digits, _) other than 'background'")
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """The K foreground classes in order."""
        return SYNTHETIC_CLASSES[: self.num_classes] if self.classes is None else self.classes

    def num_images(self, split: Split) -> int:
        """Images of a split."""
        return self.num_train if split == "train" else self.num_val

    def scan(self) -> Scan:
        """List the data set and everything that is wrong with its lists and labels; never raises for a defect."""
        return _scan(self)


# ---------------------------------------------------------------------------------------------------------------------
# What is in each picture: cheap, and all that a listing needs
# ---------------------------------------------------------------------------------------------------------------------


def image_id(split: Split, index: int) -> str:
    """Id of the picture, e.g. ``train_00017``."""
    return f"{split}_{index:05d}"


def val_group(config: SyntheticConfig, index: int) -> ValGroup | None:
    """Group of a val image; None without a context bias."""
    return VAL_GROUPS[index % len(VAL_GROUPS)] if config.context_bias > 0 else None


def image_generator(config: SyntheticConfig, split: Split, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of one picture: the same whatever other pictures the set has.

    Args:
        config: Only its seed counts.
        split: train or val.
        index: Number of the picture in its split.
        purpose: 0 for what is in the picture, 1 for how it is drawn.
    """
    return np.random.default_rng([config.seed, 0 if split == "train" else 1, index, purpose])


def image_labels(config: SyntheticConfig, split: Split, index: int) -> tuple[tuple[int, ...], bool]:
    """What is in a picture.

    Returns:
        Label indices in drawing order (later ones in front), and whether it has the biased class's background.
    """
    rng = image_generator(config, split, index, purpose=0)
    count = int(rng.integers(1, min(config.max_objects, config.num_classes) + 1))
    labels = [int(label) for label in rng.permutation(config.num_classes)[:count]]
    is_tied = bool(rng.random() < config.context_bias)
    if split == "train":
        return tuple(labels), is_tied and BIASED_LABEL in labels
    group = val_group(config, index)
    if group == "empty":
        return (), True
    if group in {"on", "off"} and BIASED_LABEL not in labels:
        labels[0] = BIASED_LABEL
    if group == "other" and BIASED_LABEL in labels:
        free = [label for label in range(config.num_classes) if label not in labels]
        replacement = [free[int(rng.integers(len(free)))]] if free else []
        labels = [label for label in labels if label != BIASED_LABEL] + replacement
    return tuple(labels), group == "on"


def _scan(config: SyntheticConfig) -> Scan:
    """List the pictures that ``generate_synthetic`` draws, without drawing them; never finds a problem."""
    lists: dict[str, IdList] = {}
    labels: dict[str, tuple[int, ...]] = {}
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        ids = [image_id(split, index) for index in range(config.num_images(split))]
        lists[split] = IdList(f"{LISTS}/{split}.txt", tuple(enumerate(ids, start=1)))
        for index, name in enumerate(ids):
            labels[name] = tuple(sorted(image_labels(config, split, index)[0]))
    lists["train_score"] = lists["train"]
    values = range(BACKGROUND_INDEX, config.num_classes + 1)
    sources = Sources(
        root=None,
        class_names=config.class_names,
        mask_values={**{value: value for value in values}, IGNORE_INDEX: IGNORE_INDEX},
        lists=lists,
        labels=labels,
        images={name: f"JPEGImages/{name}.jpg" for name in labels},
        masks={name: f"SegmentationClass/{name}.png" for name in labels},
        full_masks={},
        image_folder="JPEGImages",
        mask_folder="SegmentationClass",
    )
    problems = Problems()
    return Scan(join_sources(sources, problems), problems)
