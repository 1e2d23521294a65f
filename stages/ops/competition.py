"""Thresholds by class and conflicts between classes, settled in an image's maps before the one threshold is applied.

Pure functions without torch.  What is settled are the maps, and so every use of them (the mask before refinement, the
unary of a CRF, the sweep of thresholds) sees one rule.
Shapes: n labels of one image, H W image pixels, h w map cells.
Source: Kolesnikov and Lampert, ECCV 2016: a cue of several classes goes to the one of the smallest area (as public in
yutaroyamanaka/torch-seed-expand-constrain).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stages.contracts import AttentionRecord, ClassList
from stages.ops.seeds import SeedConfig, background_level, cut_byte, foreground_level, upsample_maps

_TOP = 255


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
