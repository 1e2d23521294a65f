"""``wsss doctor``: is this machine fit for a run?  Writes only a lock in the store, and what it removes again."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.options import ArtifactsOption, JsonOption
from pipeline.cli.output import get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS
from stages.errors import EnvironmentFailure, WsssError

if TYPE_CHECKING:
    from stages.ops.crf.dense_crf import CrfBackend

DISTRIBUTION = "wsss-pipeline"
LOW_DISK_BYTES = 2e9
_MARKS = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}
_CRF_REMEDIES = {
    "pydensecrf": "pip install --force-reinstall --no-cache-dir --no-deps pydensecrf2==1.1",
    "numba": "pip install --upgrade numba, or set crf.backend to torch",
    "torch": "install torch again from constraints.txt",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    status: Literal["ok", "warning", "failed"]
    found: str
    remedy: str = ""


def doctor(
    context: typer.Context,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Also try a tiny run, a kill, damage and locks beside the artifacts.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check packages, device, CRF, store and Prefect; exit 4 when one of them will not do."""
    output = get_output(context)
    checks: list[Check] = []
    for check in itertools.chain(examine(artifacts), try_out(artifacts) if self_test else ()):
        checks.append(check)
        output.document = {"checks": [dataclasses.asdict(check) for check in checks]}
        remedy = f"  → {check.remedy}" if check.remedy else ""
        output.say(f"{_MARKS[check.status]}  {check.name:9} {check.found}{remedy}")
    failed = [f"{c.name}: {c.found}{c.remedy and '; '}{c.remedy}" for c in checks if c.status == "failed"]
    if failed:
        raise EnvironmentFailure("this machine is not fit for a run yet", failed)


def examine(artifacts: str | Path) -> Iterator[Check]:
    """Run every check; one that raises has failed, and the others still run."""
    checks: dict[str, Callable[[], Check]] = {
        "packages": check_packages,
        "device": check_device,
        "crf": check_crf,
        "store": lambda: check_store(artifacts),
        "prefect": check_prefect,
    }
    for name, check in checks.items():
        yield run_check(name, check)


def try_out(artifacts: str | Path) -> Iterator[Check]:
    """Run the self-tests in a folder that is on the disk of the artifacts and removed at the end."""
    from pipeline.cli.self_test import make_self_tests
    from pipeline.engine.forecast import check_space
    from pipeline.store.artifacts import open_store

    with contextlib.ExitStack() as stack:
        try:
            place, _ = check_space(open_store(artifacts))
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".self-test-", dir=place))
            tests = make_self_tests(Path(folder))
        except (OSError, WsssError) as error:
            yield Check("self-test", "failed", str(error), "choose another folder with --artifacts DIR")
            return
        for name, test in tests.items():
            check = run_check(name, lambda name=name, test=test: Check(name, "ok", test()))
            yield check
            if check.status == "failed":
                return


def run_check(name: str, check: Callable[[], Check]) -> Check:
    """One check; what it raises becomes what it found."""
    try:
        return check()
    except WsssError as error:
        return Check(name, "failed", str(error))
    except Exception as error:  # whatever an import of a broken package raises
        from pipeline.engine.failures import hide_secrets

        words = hide_secrets(f"{type(error).__name__}: {error}")
        return Check(name, "failed", words, "install again from constraints.txt")


def check_packages(requirements: Sequence[str] | None = None) -> Check:
    """Every package is there in a version that works, the Prefect pins among them.

    ``requirements`` are PEP 508 lines; by default those of the installed distribution, extras left out.
    """
    from packaging.requirements import Requirement

    if requirements is None:
        try:
            requirements = importlib.metadata.requires(DISTRIBUTION) or ()
        except importlib.metadata.PackageNotFoundError:
            return Check("packages", "warning", f"{DISTRIBUTION} is not installed", "pip install -e .")
    needed = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong: dict[str, str] = {}
    shown = []
    for requirement in needed:
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong[str(requirement)] = f"{requirement} (found {found or 'none'})"
        elif requirement.name in ("prefect", "fastapi"):
            shown.append(f"{requirement.name} {found}")
    if wrong:
        return Check("packages", "failed", "; ".join(wrong.values()), f"pip install {' '.join(map(repr, wrong))}")
    return Check("packages", "ok", ", ".join([f"{len(needed)} requirements met", *shown]))


def check_device() -> Check:
    """Torch and torchvision fit together, and which device ``runtime.device: auto`` takes."""
    import torch
    from torchvision.ops import nms

    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # torchvision's own operators load and run
    version = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        count, properties = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
        found = f"cuda: {count} × {properties.name}, {properties.total_memory / 1e9:.0f} GB; {version}"
        return Check("device", "ok", found, "runtime.devices=auto trains on all of them" if count > 1 else "")
    if torch.backends.mps.is_available():
        return Check("device", "ok", f"mps; {version}")
    return Check("device", "ok", f"cpu, {torch.get_num_threads()} threads (no GPU found); {version}")


def check_crf() -> Check:
    """The CRF backends that ``auto`` means on the CPU and on the device refine a tiny image."""
    import numpy as np

    from stages.ops.crf.dense_crf import INSTALL_NUMBA, CrfConfig, dense_crf, resolve_crf_backend

    on_cpu, on_device = resolve_crf_backend("auto"), resolve_crf_backend("auto", "auto")
    start = np.full((2, 8, 8), 0.3, np.float32)  # a pixel of another label in a flat image, which is smoothed away
    start[0] = 0.7
    start[:, 4, 4] = 0.4, 0.6
    places: dict[CrfBackend, str] = {on_device: "cuda", on_cpu: "cpu"}  # one entry where they are the same
    for backend, device in places.items():
        refined = dense_crf(np.zeros((8, 8, 3), np.uint8), start, CrfConfig(backend=backend), device=device)
        if not ((refined[0] > refined[1]).all() and np.allclose(refined.sum(axis=0), 1, atol=1e-3)):
            return Check("crf", "failed", f"{backend} gives no probabilities on the {device}", _CRF_REMEDIES[backend])
    found = on_cpu if on_device == on_cpu else f"{on_device} on the CUDA device, {on_cpu} with runtime.device=cpu"
    slow = f"numba is missing or cannot be imported; it makes the CRF faster on a CPU: {INSTALL_NUMBA}"
    return Check("crf", "ok", found, "" if on_cpu == "numba" else slow)


def check_store(artifacts: str | Path) -> Check:
    """The store can be reached, written and locked, and its disk has room; a folder that is not there is not made."""
    from pipeline.engine.forecast import check_space
    from pipeline.store.artifacts import open_store
    from pipeline.store.locks import USE_LEASES

    store = open_store(artifacts)
    if store.is_mirrored:
        store.check_visible()
    folder, free = check_space(store)
    if not os.access(folder, os.W_OK):
        return Check("store", "failed", f"{folder} cannot be written", "choose another folder with --artifacts DIR")
    room = f"{free / 1e9:.1f} GB free under {folder}"
    if store.is_mirrored or store.root.exists():
        if (lock := store.lock("doctor", "check")).try_acquire():
            lock.check_held()
            lock.release()
        kind = "leases" if (store.root / ".locks" / USE_LEASES).exists() else "flock"
        cache = f" under {store.root}, mirrored" if store.is_mirrored else ""
        found = f"{store.location}: locked by {kind}{cache}, {room}"
    else:
        found = f"{store.location} is made with the first artifact, {room}"
    if free < LOW_DISK_BYTES:
        return Check("store", "warning", found, "a run on VOC needs about 2 GB; `wsss artifacts prune` makes room")
    return Check("store", "ok", found)


def check_prefect() -> Check:
    """The server that PREFECT_API_URL names answers; without one a run needs none."""
    from pipeline.flows.environment import api_url, check_api

    url = api_url()
    if not url:
        return Check("prefect", "ok", "no server is set (PREFECT_API_URL); `wsss up` starts one")
    check_api(url)
    return Check("prefect", "ok", f"{url} answers")
