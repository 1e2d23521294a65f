"""What is known before a run: whether the disk has room."""

from __future__ import annotations

import shutil

from pipeline.store.artifacts import Store
from stages.errors import EnvironmentFailure

MIN_FREE_BYTES = 200 * 2**20
"""A stage does not start on a disk with less."""


def check_space(store: Store) -> None:
    """Refuse to begin on a disk that is nearly full.

    Raises:
        EnvironmentFailure: it is.
    """
    root = next(folder for folder in (store.root, *store.root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(root).free
    if free < MIN_FREE_BYTES:
        raise EnvironmentFailure(
            f"{store.root}: {free / 2**20:.0f} MB free, at least {MIN_FREE_BYTES / 2**20:.0f} MB are needed; "
            "free some space (wsss artifacts prune) or choose another disk with --artifacts DIR"
        )
