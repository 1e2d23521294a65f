"""Areas of pseudo-masks: of one image, of a window, and what all of a data set say together.

Writes ``stats.json``; warns where refinement eats the objects.
Shapes: H W image pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.contracts import IGNORE_INDEX, AttentionRecord, ClassList, Progress, write_json
from stages.masks.attention_maps import MapCensus
from stages.masks.refinements.config import RefinementConfig
from stages.masks.threshold_choice import ThresholdChoice

_VANISHED = 0.1
"""An object whose area falls below this ratio has nearly vanished."""
_SHRUNK = 0.5
"""Below this ratio of foreground after to before, the CRF is said to eat the objects."""
_VANISHED_IMAGES = 0.1
"""More than this ratio of images with a nearly vanished object is worth a warning."""


@dataclass(frozen=True)
class MaskStats:
    """Areas in pixels of one image's mask."""

    id: str
    pixels: int
    foreground_before: int
    foreground_after: int
    unsure: int
    vanished: tuple[int, ...]
    """Label indices whose area fell below a tenth by refinement."""


def measure_mask(record: AttentionRecord, before: NDArray[np.uint8], after: NDArray[np.uint8]) -> MaskStats:
    """The areas of one image's mask (H, W) before and after refinement."""
    counts_before = np.bincount(before.ravel(), minlength=256)
    counts_after = np.bincount(after.ravel(), minlength=256)
    classes = [ClassList.class_index(label) for label in record.labels]
    return MaskStats(
        id=record.id,
        pixels=before.size,
        foreground_before=int(counts_before[classes].sum()),
        foreground_after=int(counts_after[classes].sum()),
        unsure=int(counts_after[IGNORE_INDEX]),
        vanished=tuple(
            label
            for label, index in zip(record.labels, classes, strict=True)
            if counts_after[index] < _VANISHED * counts_before[index]
        ),
    )


@dataclass
class Measured:
    """What is known of the masks and the maps of some images."""

    stats: list[MaskStats] = field(default_factory=list)
    maps: MapCensus = field(default_factory=MapCensus)

    def to_json(self) -> dict[str, Any]:
        """All of it; equal content gives equal JSON, in whatever order the images came."""
        return {"images": _entries(self.stats), "maps": self.maps.to_json()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Measured:
        """What ``to_json`` gave."""
        stats = [
            MaskStats(**{"id": image_id, **entry, "vanished": tuple(entry["vanished"])})
            for image_id, entry in content["images"].items()
        ]
        return cls(stats, MapCensus(**content["maps"]))


def _entries(stats: Sequence[MaskStats]) -> dict[str, dict[str, Any]]:
    return {entry.id: {key: value for key, value in asdict(entry).items() if key != "id"} for entry in stats}


def write_stats(path: Path, stats: Sequence[MaskStats], choice: ThresholdChoice | None) -> None:
    """Write the areas of every image, and what ``sweep`` chose."""
    write_json(path, {"images": _entries(stats)} | ({} if choice is None else {"sweep": asdict(choice)}))


def mask_metrics(stats: Sequence[MaskStats]) -> dict[str, float]:
    """Coverage and foreground as fractions of all pixels."""
    pixels = max(sum(entry.pixels for entry in stats), 1)
    return {
        "masks.coverage": 1 - sum(entry.unsure for entry in stats) / pixels,
        "masks.foreground_ratio": sum(entry.foreground_after for entry in stats) / pixels,
        "masks.foreground_ratio_before_crf": sum(entry.foreground_before for entry in stats) / pixels,
    }


def warn_if_objects_vanish(stats: Sequence[MaskStats], config: RefinementConfig, progress: Progress) -> None:
    """Say so where refinement took most of the foreground, or nearly removed an object of many images."""
    before = sum(entry.foreground_before for entry in stats)
    after = sum(entry.foreground_after for entry in stats)
    has_crf = "crf" in config.chain
    what = "the CRF" if config.chain == ("crf",) else "the refinement"
    crf_remedy = "take unary: labels, or another crf.preset (wider srgb); or " if has_crf else "or "
    remedy = f"lower threshold, {crf_remedy}refine: none"
    if before == 0 and stats:
        progress.warn(
            "the pseudo-masks have no foreground at all: lower make_masks.threshold, or look at the attention"
        )
    elif after < _SHRUNK * before:
        progress.warn(f"{what} shrank the foreground to {after / before:.0%} of its area before: {remedy}")
    hit = sum(bool(entry.vanished) for entry in stats)
    if hit > _VANISHED_IMAGES * len(stats):
        progress.warn(f"{what} nearly removed an object in {hit} of {len(stats)} images: {remedy}")
