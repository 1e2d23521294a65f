"""Attention maps on disk: shards of some images each, npz without pickle."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.contracts.files import write_atomic
from stages.errors import DamagedFileError


@dataclass(frozen=True)
class AttentionRecord:
    """The attention maps of one image, only for the labels it has."""

    id: str
    size: tuple[int, int]
    """(height, width) of the image in pixels; the maps are smaller."""
    labels: tuple[int, ...]
    """The n label indices, sorted."""
    maps: NDArray[np.uint8]
    """(n, h, w); each map is divided by its own maximum, 255 = the maximum; all zero where there was no evidence."""
    peaks: NDArray[np.float32]
    """(n,) the maxima that the maps were divided by; NaN where a map was not finite, which is all zero then."""


def write_attention_shard(path: Path, records: Sequence[AttentionRecord]) -> None:
    """Write ``records`` as one compressed npz without pickles, atomically; equal records give equal bytes."""
    arrays: dict[str, NDArray[Any]] = {}
    for number, record in enumerate(records):
        arrays[f"{number:05d}.maps"] = record.maps
        arrays[f"{number:05d}.peaks"] = record.peaks.astype(np.float32)
    entries = [{"id": r.id, "size": list(r.size), "labels": list(r.labels)} for r in records]
    arrays["entries"] = np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType] - takes them for allow_pickle too
    write_atomic(path, buffer.getvalue())


def read_attention_shard(path: Path) -> list[AttentionRecord]:
    """Read a shard in writing order.

    Raises:
        DamagedFileError: the file does not read back.
    """
    try:
        # opened here: numpy leaves its own file open when the archive is damaged
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            entries = json.loads(archive["entries"].tobytes())
            return [
                AttentionRecord(
                    id=entry["id"],
                    size=(entry["size"][0], entry["size"][1]),
                    labels=tuple(entry["labels"]),
                    maps=archive[f"{number:05d}.maps"],
                    peaks=archive[f"{number:05d}.peaks"],
                )
                for number, entry in enumerate(entries)
            ]
    except Exception as error:  # damaged bytes make zipfile and numpy trip over anything, RuntimeError to MemoryError
        raise DamagedFileError(f"{path} is not a readable attention shard ({error}); rebuild make_attention") from error


def attention_shards(folder: Path) -> list[Path]:
    """The shard files under the output folder of ``make_attention``, in order."""
    return sorted((folder / "shards").glob("attention-*.npz"))


def iter_attention(folder: Path, ids: Collection[str] | None = None) -> Iterator[AttentionRecord]:
    """The records under the output folder of ``make_attention``, shard by shard: memory stays flat.

    With ``ids`` only theirs, and no shard is read beyond the last one needed; those without attention are passed over.
    """
    left = None if ids is None else set(ids)
    for path in attention_shards(folder) if left is None or left else ():
        for record in read_attention_shard(path):
            if left is None:
                yield record
            elif record.id in left:
                yield record
                left.remove(record.id)
                if not left:
                    return
