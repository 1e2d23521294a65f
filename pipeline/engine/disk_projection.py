"""Refuse a run that the disk cannot hold, before its first stage.

Reads the store, file sizes and the free space of its file system; writes nothing; torch-free.
The bytes come from ``pipeline.engine.disk_sizes``, for the stages that are still to be built.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.engine.making import MIN_FREE_BYTES
from pipeline.engine.plan import Plan
from pipeline.engine.shards import existing_shards
from pipeline.engine.workload import DataFacts, count_work, facts_of_index, facts_of_listing
from pipeline.store.artifacts import Store
from stages.errors import EnvironmentFailure

THINGS: Mapping[str, str] = {
    "prepare_data": "pictures and index",
    "train_classifier": "the classifier and its checkpoints",
    "make_attention": "attention maps",
    "make_masks": "masks",
    "train_segmenter": "the segmenter and its checkpoints",
    "evaluate": "predictions",
}
"""What the stages write, for a sentence."""

_COARSEST_STRIDE = 8
_SMALL_BYTES = 1e6
"""Less than this is not worth a word."""


@dataclass(frozen=True)
class DiskProjection:
    """How much a run is about to write."""

    bytes_by_stage: Mapping[str, float] = field(default_factory=dict)
    """About the most that is still to come, for the stages that are to be built and can be told of."""
    unknown: tuple[str, ...] = ()
    """Stages that write something nobody can tell the size of before."""

    @property
    def total_bytes(self) -> float:
        """Of all stages."""
        return sum(self.bytes_by_stage.values())

    def describe(self) -> str:
        """``at most about 1.9 GB (182.0 MB attention maps, …)``; empty where nothing is known."""
        return describe_bytes(self.bytes_by_stage, self.unknown)


def describe_bytes(bytes_by_stage: Mapping[str, float], unknown: Sequence[str] = ()) -> str:
    """The whole and, from the largest down, what it is made of; the stages that are not counted."""
    if not bytes_by_stage:
        return ""
    ordered = sorted(bytes_by_stage.items(), key=lambda item: -item[1])
    parts = [f"{human_bytes(size)} {THINGS.get(name, name)}" for name, size in ordered if size >= _SMALL_BYTES]
    shown = f" ({', '.join(parts)})" if parts else ""
    without = f", without {' and '.join(unknown)}, whose size is unknown" if unknown else ""
    return f"at most about {human_bytes(sum(bytes_by_stage.values()))}{shown}{without}"


def human_bytes(count: float) -> str:
    """``0.1 MB``, ``182 MB``, ``1.9 GB``: no finer than it is known."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{max(count / 1e6, 0.1):.1f} MB"


def facts_of_run(plan: Plan, store: Store) -> DataFacts | None:
    """The run's images: as prepare_data found them where it ran already, else as they are listed."""
    key = plan.keys.get("prepare_data")
    if key is None:
        return None
    if store.lookup("prepare_data", key) is not None:
        return facts_of_index(store.require("prepare_data", key).path)
    digests = plan.data.digests
    return None if digests is None else facts_of_listing(digests.listing, plan.contents["prepare_data"])


def project_disk(plan: Plan, store: Store, stages: Collection[str]) -> DiskProjection:
    """How much the building of some stages will write.

    Args:
        plan: The run.
        store: Where its artifacts lie; unfinished work and finished shards there count as written.
        stages: Those that will be built.
    """
    data = facts_of_run(plan, store) if stages else None
    if data is None:
        return DiskProjection()
    found: dict[str, float] = {}
    unknown: list[str] = []
    for name in stages:
        work = count_work(plan.contents[name], plan.contents, data)
        if work is None or work.disk_bytes is None:
            unknown.append(name)
        else:
            found[name] = max(0.0, work.disk_bytes - _written_bytes(_begun(store, name, plan.keys[name])))
    return DiskProjection(found, tuple(unknown))


def require_space(plan: Plan, store: Store, stages: Collection[str]) -> DiskProjection:
    """Make sure that the disk holds what the building of some stages will write.

    A store behind a URL builds in its cache on this machine, whose disk is the one that counts.

    Args:
        plan: The run.
        store: Where its artifacts go.
        stages: Those that will be built.

    Raises:
        EnvironmentFailure: less is free than that and ``MIN_FREE_BYTES`` to spare.
    """
    projection = project_disk(plan, store, stages)
    folder = _existing(store.root)
    free = shutil.disk_usage(folder).free
    if projection.bytes_by_stage and free < projection.total_bytes + MIN_FREE_BYTES:
        raise EnvironmentFailure(
            f"{folder}: {human_bytes(free)} free, and this run writes {projection.describe()}, beside which "
            f"{human_bytes(MIN_FREE_BYTES)} are to stay free; {_remedies(plan, projection)}"
        )
    return projection


def _remedies(plan: Plan, projection: DiskProjection) -> str:
    """What makes room, or needs less of it, in this run."""
    ways = ["free some space (wsss artifacts prune)", "choose another disk with --artifacts DIR"]
    attention = getattr(plan.run, "make_attention", None)
    is_large = projection.bytes_by_stage.get("make_attention", 0.0) >= _SMALL_BYTES
    if attention is not None and is_large:
        if attention.map_stride < _COARSEST_STRIDE:
            ways.append(f"store coarser maps (make_attention.map_stride={_COARSEST_STRIDE})")
        if getattr(attention, "keep_maps", False):
            ways.append("store none (make_attention.keep_maps=false)")
    return f"{', '.join(ways[:-1])} or {ways[-1]}"


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there: a store is made with its first artifact."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _begun(store: Store, stage: str, key: str) -> list[Path]:
    """The folders of this machine in which work on an artifact lies: its own, and those of its shards."""
    places = [shard.place for shard in existing_shards(store, stage, key)]
    return [store.work_path(stage, key), *(find(*place) for place in places for find in (store.path, store.work_path))]


def _written_bytes(folders: Iterable[Path]) -> int:
    """Of all files under ``folders``, linked ones once; one that vanishes meanwhile (a replaced checkpoint) is none."""
    sizes: dict[tuple[int, int], int] = {}
    for path in itertools.chain.from_iterable(folder.rglob("*") for folder in folders):
        try:
            if path.is_file():
                found = path.stat()
                sizes[found.st_dev, found.st_ino] = found.st_size
        except OSError:
            continue
    return sum(sizes.values())
