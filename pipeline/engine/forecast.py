"""What is known of a run before it starts: how long a stage took last time, and whether the disk has room.

Reads the store's manifests and the free space of its disk; writes nothing; torch-free.
"""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from pipeline.store.artifacts import Store
from stages.errors import EnvironmentFailure

MIN_FREE_BYTES = 200 * 2**20
"""No run and no stage starts on a disk with less."""


def check_space(store: Store) -> tuple[Path, int]:
    """Refuse to start on a disk that is nearly full; else a folder of the store's disk, and the bytes that are free.

    A store behind a URL builds in its folder on this machine.

    Raises:
        EnvironmentFailure: less than ``MIN_FREE_BYTES`` are free.
    """
    folder = store.root.absolute()
    while not folder.exists():  # a store is made with its first artifact
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise EnvironmentFailure(
            f"{folder}: {free / 2**20:.0f} MB free, at least {MIN_FREE_BYTES / 2**20:.0f} MB are needed; "
            "free some space (wsss artifacts prune) or choose another disk with --artifacts DIR"
        )
    return folder, free


def last_time(store: Store, stage: str, device: str | None = None, *, host: str = "") -> float | None:
    """Seconds that ``stage`` took when this machine last built it in one go; None where it never did.

    ``device`` counts builds with this ``runtime.device`` only, None all; ``host`` is by default this machine's name.
    """
    host = host or socket.gethostname()
    for manifest in store.newest_manifests(stage):
        run = manifest["run"]
        is_here = run.get("host") == host and device in (None, (run.get("runtime") or {}).get("device"))
        # a resumed build tells only the seconds of its last part
        if is_here and not run.get("resumed") and isinstance(run.get("seconds"), int | float):
            return float(run["seconds"])
    return None
