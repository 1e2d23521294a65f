"""Look at the machine before a run does: interpreter, packages, device, CRF, disk, store, memory.

Reads package metadata and the system; writes nothing but a lock in the store.  Each check says what it found and, where
it failed, what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.errors import WsssError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from stages.ops.crf.dense_crf import CrfBackend

DISTRIBUTION = "wsss-pipeline"
LEAST_PYTHON = (3, 11)
LOW_DISK_BYTES = 2e9
NO_DISK_BYTES = 0.2e9
LOW_MEMORY_BYTES = 3e9

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def examine(artifacts: str | Path) -> list[Check]:
    """Run every check; a check that raises is a failed check, not the end.

    Args:
        artifacts: Where the store is, a folder or a URL; a folder need not exist.
    """
    checks: Sequence[tuple[str, Callable[[], Check]]] = (
        ("python", check_python),
        ("packages", check_packages),
        ("torch", check_torch),
        ("device", check_device),
        ("crf", check_crf),
        ("disk", lambda: check_disk(_root(artifacts))),
        ("store", lambda: check_store(artifacts)),
        ("cores", check_cores),
        ("memory", check_memory),
    )
    return [run_check(name, check) for name, check in checks]


def run_check(name: str, check: Callable[[], Check]) -> Check:
    """One check; what it raises becomes what it found."""
    try:
        return check()
    except WsssError as error:
        return Check(name, "failed", str(error))
    except Exception as error:  # whatever an import of a broken package raises
        return Check(name, "failed", f"{type(error).__name__}: {error}", "install again from constraints.txt")


def check_python(version: tuple[int, int, int] | None = None) -> Check:
    """The interpreter is new enough."""
    found = version or sys.version_info[:3]
    text = ".".join(map(str, found))
    if found[:2] < LEAST_PYTHON:
        return Check("python", "failed", text, "use Python 3.11 or newer")
    return Check("python", "ok", text)


def check_packages(requirements: Sequence[str] | None = None) -> Check:
    """Every package that this distribution asks for is there in a version that works, the Prefect pins among them.

    Args:
        requirements: PEP 508 lines; by default those of the installed distribution, extras left out.
    """
    from packaging.requirements import Requirement

    if requirements is None:
        try:
            requirements = importlib.metadata.requires(DISTRIBUTION) or ()
        except importlib.metadata.PackageNotFoundError:
            return Check("packages", "warning", f"{DISTRIBUTION} is not installed", "pip install -e .")
    needed = [found for found in map(Requirement, requirements) if _applies(found)]
    wrong, shown = [], []
    for requirement in needed:
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement} (found {found or 'none'})")
        elif requirement.name in ("prefect", "fastapi"):
            shown.append(f"{requirement.name} {found}")
    if wrong:
        remedy = f"pip install {' '.join(repr(line.split(' (')[0]) for line in wrong)}"
        return Check("packages", "failed", "; ".join(wrong), remedy)
    return Check("packages", "ok", ", ".join([f"{len(needed)} requirements met", *shown]))


def _applies(requirement: Requirement) -> bool:
    """Whether it holds on this machine without any extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_torch() -> Check:
    """Torch and torchvision are a matching pair: torchvision's own operators load and run."""
    import torch
    import torchvision
    from torchvision.ops import nms

    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    return Check("torch", "ok", f"torch {torch.__version__}, torchvision {torchvision.__version__}")


def check_device() -> Check:
    """The device that ``runtime.device: auto`` takes."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = f"cuda: {torch.cuda.device_count()} × {properties.name}, {properties.total_memory / 1e9:.0f} GB"
        hint = "runtime.devices=auto trains on all of them" if torch.cuda.device_count() > 1 else ""
        return Check("device", "ok", found, hint)
    if torch.backends.mps.is_available():
        return Check("device", "ok", "mps")
    return Check("device", "ok", f"cpu, {torch.get_num_threads()} threads (no GPU found)")


def check_crf() -> Check:
    """The CRF backends that ``auto`` means on the CPU and on the device refine a tiny image."""
    from stages.ops.crf.dense_crf import INSTALL_NUMBA, resolve_crf_backend

    on_cpu, on_device = resolve_crf_backend("auto"), resolve_crf_backend("auto", "auto")
    places: dict[CrfBackend, str] = {on_device: "cuda", on_cpu: "cpu"}  # one entry where they are the same
    for backend, device in places.items():
        if not _refines(backend, device):
            return Check("crf", "failed", f"{backend} gives no probabilities on the {device}", _CRF_REMEDIES[backend])
    found = on_cpu if on_device == on_cpu else f"{on_device} on the CUDA device, {on_cpu} with runtime.device=cpu"
    hint = (
        "" if on_cpu == "numba" else f"numba is missing or does not import; with it a CPU is quicker: {INSTALL_NUMBA}"
    )
    return Check("crf", "ok", found, hint)


_CRF_REMEDIES = {
    "pydensecrf": "pip install --force-reinstall --no-cache-dir --no-deps pydensecrf2==1.1",
    "numba": "pip install --upgrade numba, or set crf.backend to torch",
    "torch": "install torch again from constraints.txt",
}


def _refines(backend: CrfBackend, device: str) -> bool:
    """Whether a pixel of another label in a flat image is smoothed away."""
    import numpy as np

    from stages.ops.crf.dense_crf import CrfConfig, dense_crf

    start = np.full((2, 8, 8), 0.3, np.float32)
    start[0] = 0.7
    start[:, 4, 4] = 0.4, 0.6
    refined = dense_crf(np.zeros((8, 8, 3), np.uint8), start, CrfConfig(backend=backend), device=device)
    return bool((refined[0] > refined[1]).all() and np.allclose(refined.sum(axis=0), 1, atol=1e-3))


def _root(artifacts: str | Path) -> Path:
    """The folder in which the files are on this machine."""
    from pipeline.store.artifacts import open_store

    return open_store(artifacts).root


def check_store(artifacts: str | Path) -> Check:
    """The store can be reached, written, and locked against other workers.

    Args:
        artifacts: Its folder or URL; a folder that is not there yet is left so.
    """
    from pipeline.store.artifacts import open_store
    from pipeline.store.locks import USE_LEASES

    store = open_store(artifacts)
    if store.is_mirrored:
        store.check_visible()
    elif not store.root.exists():
        return Check("store", "ok", f"{store.location} is made with the first artifact")
    lock = store.lock("doctor", "check")
    if lock.try_acquire():
        lock.check_held()
        lock.release()
    kind = "leases" if (store.root / ".locks" / USE_LEASES).exists() else "flock"
    cache = f" under {store.root}, mirrored" if store.is_mirrored else ""
    return Check("store", "ok", f"{store.location}: locked by {kind}{cache}")


def check_disk(artifacts: Path) -> Check:
    """There is room for artifacts, and their folder can be written."""
    folder = artifacts.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free under {folder}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "failed", f"{folder} cannot be written", "choose another folder with --artifacts DIR")
    if free < NO_DISK_BYTES:
        return Check("disk", "failed", found, "make room, or choose another folder with --artifacts DIR")
    if free < LOW_DISK_BYTES:
        return Check("disk", "warning", found, "a run on VOC needs about 2 GB; `wsss artifacts prune` makes room")
    return Check("disk", "ok", found)


def check_cores() -> Check:
    """Cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("cores", "ok", f"{usable} of {os.cpu_count()}")


def check_memory() -> Check:
    """Memory of the machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{total / 1e9:.1f} GB"
    if total < LOW_MEMORY_BYTES:
        return Check("memory", "warning", found, "lower batch_size and runtime.workers")
    return Check("memory", "ok", found)
