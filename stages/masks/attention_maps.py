"""The attention maps that masks are made of: find the stored ones, and count those that say nothing.

Reads attention shards, one at a time; writes nothing.  A map is broken where it was NaN or infinite, which its peak of
NaN tells, and empty where nothing in it speaks for its class; either way its class gets no pixel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from stages.contracts import AttentionRecord, ImageIndex, ImageRecord, Progress, iter_attention
from stages.errors import InputError

BROKEN_WEIGHTS = "the classifier's weights are broken: train it again with a lower learning_rate or in fp32"

_NAMED_IMAGES = 5
"""Ids that a warning names."""


def find_attention(index: ImageIndex, attention: Path, wanted: Collection[str]) -> Iterator[AttentionRecord]:
    """The stored attention of each wanted image, shard by shard.

    Args:
        index: The data set.
        attention: Output folder of ``make_attention``.
        wanted: Ids; those without attention are passed over.

    Raises:
        InputError: the maps of an image are not of the labels that it has.
        DamagedFileError: a shard does not read back.
    """
    for record in iter_attention(attention, wanted):
        _require_labels(record, index.record(record.id), attention)
        yield record


def _require_labels(record: AttentionRecord, image: ImageRecord, attention: Path) -> None:
    """Refuse maps of other data: labels are indices, so another class list would paint other classes."""
    if sorted(record.labels) != sorted(image.labels or ()):
        raise InputError(
            f"image '{image.id}': the maps in {attention} are of label indices {sorted(record.labels)}, the data has "
            f"{sorted(image.labels or ())}; they were made for other labels or another class list: make attention anew"
        )


@dataclass
class MapCensus:
    """How many maps there are, and which images have one that says nothing."""

    maps: int = 0
    finite: int = 0
    broken: list[str] = field(default_factory=list)
    """Ids of images with a map that was NaN or infinite and is all zero now."""
    empty: list[str] = field(default_factory=list)
    """Ids of images with a map without evidence."""

    def count(self, record: AttentionRecord) -> None:
        """Look at the maps of one image."""
        is_finite = np.isfinite(record.peaks)
        self.maps += len(is_finite)
        self.finite += int(is_finite.sum())
        if not is_finite.all():
            self.broken.append(record.id)
        if (record.peaks == 0).any():
            self.empty.append(record.id)

    def add(self, other: Self) -> None:
        """Count what another census counted."""
        self.maps += other.maps
        self.finite += other.finite
        self.broken += other.broken
        self.empty += other.empty

    def conclude(self, num_images: int, progress: Progress) -> None:
        """Warn of what was found among ``num_images``.

        Raises:
            InputError: no map at all is finite.
        """
        if self.maps and not self.finite:
            raise InputError(
                f"attention maps must be finite, found NaN or infinity in all {self.maps}; {BROKEN_WEIGHTS}"
            )
        if self.broken:
            progress.warn(
                f"{_count(self.broken, num_images)} an attention map that is NaN or infinite ({_name(self.broken)}): "
                f"its class gets no pixel there, only background; {BROKEN_WEIGHTS}"
            )
        if self.empty:
            progress.warn(
                f"{_count(self.empty, num_images)} an attention map without evidence ({_name(self.empty)}): its class "
                "gets no pixel there, only background; train the classifier longer if these are many"
            )

    def to_json(self) -> dict[str, Any]:
        """All of it, the same in whatever order it was counted."""
        return {
            "maps": self.maps,
            "finite": self.finite,
            "broken": sorted(self.broken),
            "empty": sorted(self.empty),
        }


def _count(ids: Sequence[str], num_images: int) -> str:
    return f"{len(ids):,} of {num_images:,} images {'has' if len(ids) == 1 else 'have'}"


def _name(ids: Sequence[str]) -> str:
    return ", ".join(sorted(ids)[:_NAMED_IMAGES]) + (", …" if len(ids) > _NAMED_IMAGES else "")
