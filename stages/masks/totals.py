"""What all pseudo-masks of a data set say together: ``stats.json``, metrics, and whether refinement eats the objects.

Writes ``stats.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from stages.contracts import Progress, write_json
from stages.masks.building import MaskStats
from stages.masks.refinements.config import RefinementConfig
from stages.masks.threshold_choice import ThresholdChoice

_SHRUNK = 0.5
"""Below this ratio of foreground after to before, the CRF is said to eat the objects."""
_VANISHED_IMAGES = 0.1
"""More than this ratio of images with a nearly vanished object is worth a warning."""


def write_stats(path: Path, stats: Sequence[MaskStats], choice: ThresholdChoice | None) -> None:
    """Write the areas of every image, and what ``sweep`` chose."""
    entries = {entry.id: {key: value for key, value in asdict(entry).items() if key != "id"} for entry in stats}
    write_json(path, {"images": entries} | ({} if choice is None else {"sweep": asdict(choice)}))


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
