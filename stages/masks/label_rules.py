"""From attention maps to labels of pixels: the threshold rule, its config, and conflicts between classes.

Pure functions without torch: ``make_masks`` makes pseudo-masks with them, ``evaluate`` scores these before refinement.
Thresholds by class and conflicts are settled in the maps before (``settle_classes``), and so every use of the maps (the
mask before refinement, the unary of a CRF, the sweep of thresholds) sees one rule.
Shapes: n labels of one image, H W image pixels, h w map cells.
Source: Kolesnikov and Lampert, ECCV 2016 (fractions of the maximum); Ahn and Kwak, CVPR 2018 (background by a power);
Ahn, Cho and Kwak, CVPR 2019, ``step/cam_to_ir_label.py`` (confident labels).  SEC: a cue of several classes goes to the
one of the smallest area (as public in yutaroyamanaka/torch-seed-expand-constrain).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, AttentionRecord, ClassList, StageConfig
from stages.data.subsets import SweepConfig

_TOP = 255
"""The byte that stands for a map's own maximum."""


class ConfidentThresholds(StageConfig):
    """Two thresholds with 255 between: only what is surely an object or surely background is labelled."""

    foreground_threshold: float = Field(default=0.30, ge=0, lt=1)
    """Above this fraction of its maximum a map says foreground."""
    background_threshold: float = Field(default=0.05, ge=0, lt=1)
    """A pixel where no map exceeds this is background."""

    @model_validator(mode="after")
    def _are_ordered(self) -> Self:
        if self.background_threshold > self.foreground_threshold:
            raise ValueError(
                f"background_threshold ({self.background_threshold}) must not exceed foreground_threshold "
                f"({self.foreground_threshold}); between the two a pixel is unsure"
            )
        return self


class SeedConfig(StageConfig):
    """The threshold rule: where an attention map is strong enough to be its class."""

    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Fraction of each class map's own maximum above which it says foreground (``background: constant``); not used
    where ``sweep`` chooses it."""
    thresholds: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(default_factory=dict)
    """Thresholds of single classes by name, instead of the one for all; classes then compete by how far each is above
    its own (``settle_classes``)."""
    conflict: Literal["strongest", "smallest_area", "unsure"] = "strongest"
    """What a pixel becomes where several classes exceed their thresholds: the strongest there, the one that exceeds its
    threshold on the fewest pixels of the image (SEC), or 255."""
    sweep: SweepConfig | None = None
    """Choose ``threshold`` by the mIoU of the masks before refinement on a few true masks ({} for 100 images)."""
    soft: bool = False
    """Write beside each mask how sure each pixel is, for ``train_segmenter.loss_weighting``."""
    background: Literal["constant", "power"] = "constant"
    """The background's score: ``threshold``, or (1 - m)^background_power where m is the strongest map of the pixel."""
    background_power: float = Field(default=4.0, gt=0, le=1000)
    """The exponent α of ``background: power``; PSA uses 4 and 16, SEAM 24.  Higher means less background."""
    confident: ConfidentThresholds | None = None
    """Label only the confident pixels, by two thresholds instead of the one above; the rest becomes 255."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.confident is not None and self.thresholds:
            raise ValueError("thresholds do not go with confident, whose two thresholds are for all classes: drop one")
        if self.sweep is not None and (self.confident is not None or self.background != "constant"):
            other = "confident" if self.confident is not None else f"background: {self.background}"
            raise ValueError(f"sweep chooses threshold, which {other} does not use: remove one of the two")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether the strongest map of a pixel alone decides, by one threshold for all classes."""
        return not self.thresholds and self.conflict == "strongest"

    def key_content(self) -> dict[str, Any]:
        """What of these options decides the masks, as JSON; ``sweep``, which chooses ``threshold``, is the caller's."""
        return self.model_dump(mode="json", exclude={"sweep"} if self.sweep is None else {"sweep", "threshold"})


def background_level(config: SeedConfig) -> float:
    """The map value at which foreground and background tie: a map above it is foreground.

    ``power`` is monotone in the map too, so it is a threshold as well: the root of t = (1 - t)^α.
    """
    if config.background == "constant":
        return config.threshold
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < (1 - middle) ** config.background_power else (low, middle)
    return low


def cut_byte(threshold: float) -> int:
    """The largest byte (0 … 255) that is still background: foreground means byte / 255 > ``threshold``."""
    return int(np.floor(threshold * _TOP + 1e-9))


def foreground_level(config: SeedConfig) -> float:
    """The map value above which a class claims a pixel; with ``confident`` the stricter of the two."""
    return background_level(config) if config.confident is None else config.confident.foreground_threshold


def upsample_maps(record: AttentionRecord) -> NDArray[np.uint8]:
    """Bring the maps of one image to its size by bilinear interpolation, rounded to bytes: (n, H, W)."""
    height, width = record.size
    full = np.empty((len(record.labels), height, width), dtype=np.uint8)
    for target, small in zip(full, record.maps, strict=True):
        target[...] = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))
    return full


def strongest_map(maps: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Where several classes compete the strongest wins, the first among equals.

    Args:
        maps: uint8 (n, H, W), n may be 0.

    Returns:
        The position (H, W) of the strongest map in ``maps`` and its value (H, W); zeros where n is 0.
    """
    if len(maps) == 0:
        nothing = np.zeros(maps.shape[1:], dtype=np.uint8)
        return nothing, nothing
    return maps.argmax(axis=0).astype(np.uint8), maps.max(axis=0)


def threshold_maps(maps: NDArray[np.uint8], threshold: float) -> NDArray[np.uint8]:
    """Labels of the CRF (H, W): 0 where no map exceeds ``threshold``, else 1 + the position of the strongest map."""
    winner, value = strongest_map(maps)
    return np.where(value > cut_byte(threshold), winner + np.uint8(1), np.uint8(0)).astype(np.uint8)


def to_class_indices(positions: NDArray[np.integer], labels: tuple[int, ...]) -> NDArray[np.uint8]:
    """Turn labels of one image's CRF (0 = background, i + 1 = i-th label of the image) into class indices, uint8."""
    lookup = np.array([BACKGROUND_INDEX, *map(ClassList.class_index, labels)], dtype=np.uint8)
    return lookup[positions]


def combine_confident(foreground: NDArray[np.uint8], background: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Merge two labellings: background where both say so, unsure where only the strict one does, else its class.

    Args:
        foreground: Class indices (H, W) at the foreground threshold.
        background: Class indices (H, W) at the background threshold.

    Returns:
        Class indices with 255 for unsure.

    Source:
        irn ``step/cam_to_ir_label.py``.
    """
    combined = foreground.copy()
    combined[foreground == BACKGROUND_INDEX] = IGNORE_INDEX
    combined[(foreground == BACKGROUND_INDEX) & (background == BACKGROUND_INDEX)] = BACKGROUND_INDEX
    return combined


def contested_pixels(maps: NDArray[np.uint8], config: SeedConfig) -> NDArray[np.bool_]:
    """Where two or more of the maps (n, H, W) exceed the threshold: bool (H, W).

    Args:
        maps: Upsampled, with thresholds by class settled (``settle_classes``).
        config: The threshold rule.
    """
    return (maps > cut_byte(foreground_level(config))).sum(axis=0) > 1


def initial_mask(
    record: AttentionRecord, config: SeedConfig, *, maps: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The pseudo-mask before any refinement.

    Args:
        record: The image's attention, settled where the rule is not plain (``settle_classes``).
        config: The threshold rule.
        maps: ``upsample_maps(record)`` where the caller has it already.

    Returns:
        Class indices (H, W): 0 background, 1 … K, and 255 for unsure with ``confident`` or ``conflict: unsure``.
    """
    full = upsample_maps(record) if maps is None else maps
    mask = _label_pixels(full, record.labels, config)
    if config.conflict == "unsure":
        mask[contested_pixels(full, config)] = IGNORE_INDEX
    return mask


def _label_pixels(full: NDArray[np.uint8], labels: tuple[int, ...], config: SeedConfig) -> NDArray[np.uint8]:
    if config.confident is None:
        return to_class_indices(threshold_maps(full, background_level(config)), labels)
    strict = threshold_maps(full, config.confident.foreground_threshold)
    loose = threshold_maps(full, config.confident.background_threshold)
    return combine_confident(to_class_indices(strict, labels), to_class_indices(loose, labels))


def map_probabilities(maps: NDArray[np.uint8], config: SeedConfig) -> NDArray[np.float32]:
    """Probabilities of background and the n classes from the maps themselves, to be a CRF's unary.

    ``constant`` rescales each map piecewise linearly so that the threshold becomes 1/2, and takes 1 - the strongest as
    background: a raw peaked map against a low constant leaves most of an object near a tie, and the CRF shrinks it.
    ``power`` takes PSA's scores as they are.  Both are divided by their sum.

    Args:
        maps: uint8 (n, H, W).
        config: The threshold rule.

    Returns:
        float32 (n + 1, H, W) summing to 1; its argmax is that of the threshold rule.
    """
    scores = (maps / _TOP).astype(np.float32)
    if config.background == "constant":
        scores = _rescale(scores, background_level(config))
    strongest = scores.max(axis=0, initial=0.0)
    background = 1 - strongest if config.background == "constant" else (1 - strongest) ** config.background_power
    stacked = np.concatenate([background[None], scores]).astype(np.float32)
    return stacked / stacked.sum(axis=0, keepdims=True)


def _rescale(scores: NDArray[np.float32], level: float) -> NDArray[np.float32]:
    """Map [0, level] to [0, 1/2] and [level, 1] to [1/2, 1]."""
    above = 0.5 + 0.5 * (scores - level) / (1 - level)
    if level < 1 / _TOP:  # below the smallest stored value: nothing to stretch
        return np.where(scores > 0, above, 0).astype(np.float32)
    return np.where(scores > level, above, 0.5 * scores / level).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds by class and conflicts between classes
# ---------------------------------------------------------------------------------------------------------------------


def settle_classes(record: AttentionRecord, config: SeedConfig, classes: ClassList) -> AttentionRecord:
    """Apply ``thresholds`` and ``conflict: smallest_area`` to the maps of one image.

    The map of a class with a threshold of its own is stretched so that this falls on the threshold for all.  The
    classes of a pixel then compete by the stretched values: the one furthest above its own threshold, as a share of the
    way to its maximum, wins, and the pixel is foreground if it exceeds that class's threshold.  So a class that does
    not exceed its threshold never takes a pixel from one that does.  Stretched values are bytes again: what exceeds a
    threshold is exact, two classes nearly equally far above theirs may tie, and then the first in the list wins.

    Args:
        record: The image's attention.
        config: The threshold rule; names in ``thresholds`` that are no classes do nothing (preflight refuses them).
        classes: The data set's classes.

    Returns:
        ``record`` itself where the rule is plain, or leaves the maps alone; else a record with maps of the image's
        size, for which the rule without ``thresholds`` and ``smallest_area`` gives the labels.
    """
    levels = _own_thresholds(record.labels, config.thresholds, classes)
    if not levels and config.conflict != "smallest_area":
        return record
    maps = upsample_maps(record)
    common = cut_byte(background_level(config))
    for position, level in levels.items():
        maps[position] = stretch_table(cut_byte(level), common)[maps[position]]
    if config.conflict == "smallest_area":
        maps = favour_small_areas(maps, cut_byte(foreground_level(config)))
    return replace(record, maps=maps)


def _own_thresholds(labels: tuple[int, ...], thresholds: Mapping[str, float], classes: ClassList) -> dict[int, float]:
    """Position in the image's labels to the threshold of that class, of those that have one."""
    names = [classes.names[label] for label in labels]
    return {position: thresholds[name] for position, name in enumerate(names) if name in thresholds}


def stretch_table(own: int, common: int) -> NDArray[np.uint8]:
    """A table of 256 bytes that takes [0, ``own``] to [0, ``common``] and what is above to what is above, rising.

    Args:
        own: The largest byte that is background for a class, 0 … 254.
        common: The same for all classes, 0 … 254.
    """
    below = np.linspace(0, common, own + 1)
    above = np.linspace(_TOP, common + 1, _TOP - own)[::-1]  # from the top: one byte alone is the maximum
    return np.rint(np.concatenate([below, above])).astype(np.uint8)


def favour_small_areas(maps: NDArray[np.uint8], cut: int) -> NDArray[np.uint8]:
    """Where several maps exceed ``cut``, press all down to it but that with the smallest area, the first among equals.

    Args:
        maps: uint8 (n, H, W).
        cut: The largest byte that is background; a map's area is the number of its pixels above.

    Returns:
        New maps of which at most one exceeds ``cut`` at any pixel.
    """
    claims = maps > cut
    settled = maps.copy()
    taken = np.zeros(maps.shape[1:], dtype=bool)
    for position in np.argsort(claims.sum(axis=(1, 2)), kind="stable"):
        settled[position][claims[position] & taken] = cut
        taken |= claims[position]
    return settled
