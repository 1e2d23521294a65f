"""Read the stored attention of chosen images, and refuse maps of other data.

Reads attention shards, one at a time; writes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from stages.contracts import AttentionRecord, ImageIndex, ImageRecord, iter_attention
from stages.errors import InputError


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
    left = set(wanted)
    for record in iter_attention(attention) if left else ():
        if record.id in left:
            _require_labels(record, index.record(record.id), attention)
            yield record
            left.remove(record.id)
            if not left:
                return


def _require_labels(record: AttentionRecord, image: ImageRecord, attention: Path) -> None:
    """Refuse maps of other data: labels are indices, so another class list would paint other classes."""
    if sorted(record.labels) != sorted(image.labels or ()):
        raise InputError(
            f"image '{image.id}': the maps in {attention} are of label indices {sorted(record.labels)}, the data has "
            f"{sorted(image.labels or ())}; they were made for other labels or another class list: make attention anew"
        )
