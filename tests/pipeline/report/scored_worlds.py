"""Finished evaluations without a run: artifacts of made-up counts in a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report.comparison import ScoredRun
from pipeline.store.artifacts import Artifact, Store
from stages.contracts import ClassList, ImageIndex, ImageRecord, write_json
from stages.ops.metrics.confusion import SparseConfusions, mean_iou, write_confusions

NAMES = ("cat", "dog")
IDS = tuple(f"v{number:02d}" for number in range(30))
PREPARED = "0" * 20


def counts(right: float, *, ids: Sequence[str] = IDS, size: int = 1000, seed: int = 0) -> SparseConfusions:
    """Counts of images with as many pixels of each class, of which about ``right`` are right."""
    rng = np.random.default_rng(seed)
    found = []
    for image_id in ids:
        hits = (size * np.clip(right + rng.normal(0, 0.1, 3), 0, 1)).astype(int)
        matrix = np.diag(hits)
        matrix[np.arange(3), [1, 2, 0]] = size - hits
        found.append((image_id, matrix.astype(np.int64)))
    return SparseConfusions.from_matrices(3, found)


def scored_run(word: str, things: Mapping[str, SparseConfusions], **metrics: float) -> ScoredRun:
    """An evaluation in memory."""
    names = {f"segmenter.{name}": value for name, value in metrics.items()}
    return ScoredRun(
        word=word, title=word, key=word, path=Path(word), classes=("background", *NAMES), counts=things, metrics=names
    )


def publish(store: Store, stage: str, key: str, upstream: Mapping[str, str], run: Mapping[str, Any]) -> Artifact:
    """Publish what lies in the work folder."""
    content = {"version": 1, "config": {}, "inputs": {}, "mask_supervision": []}
    with store.lock(stage, key):
        return store.publish(stage, key, content=content, run={**run, "upstream": dict(upstream)})


def publish_data(store: Store, key: str = PREPARED, names: tuple[str, ...] = NAMES, ids: Sequence[str] = IDS) -> None:
    """The index that knows the names of the classes and the images of val."""
    images = tuple(ImageRecord(id=i, image=f"{i}.jpg", size=(10, 10), labels=None, mask=f"{i}.png") for i in ids)
    index = ImageIndex(
        classes=ClassList(names=names), images=images, splits={"train": (), "val": tuple(ids)}, mask_values={0: 0}
    )
    folder, _ = store.work_dir("prepare_data", key)
    write_json(folder / "index.json", index.model_dump(mode="json"))
    publish(store, "prepare_data", key, {}, {})


def publish_scores(
    store: Store,
    key: str,
    things: Mapping[str, SparseConfusions],
    *,
    prepared: str = PREPARED,
    outlines: Mapping[str, SparseConfusions] | None = None,
    **metrics: Any,
) -> Artifact:
    """The artifact of an evaluation; without ``outlines`` they were not counted."""
    folder, _ = store.work_dir("evaluate", key)
    write_confusions(folder / "confusions.npz", things)
    if outlines is not None:
        write_confusions(folder / "boundaries.npz", outlines)
    found = {f"{thing}.miou": mean_iou(value.total()) for thing, value in things.items()} | metrics
    write_json(folder / "metrics.json", found)
    return publish(store, "evaluate", key, {"prepare_data": prepared}, {"metrics": found})


def write_record(store: Store, run_id: str, name: str, key: str) -> None:
    """The record of a run that ended in this evaluation."""
    fields = {"run": run_id, "name": name, "started": "2026-01-01T00:00:00.000+00:00", "state": "done", "config": {}}
    write_json(store.root / "runs" / f"{name}-{run_id}.json", {**fields, "keys": {"evaluate": key}})
