"""``wsss doctor --self-test``: the promises of this program, tried on this machine and this disk.

A tiny run on generated images in a folder beside the artifacts: built, found again, damaged, killed and continued.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import EnvironmentFailure

if TYPE_CHECKING:
    from pipeline.engine.outcomes import RunOutcome

SelfTests = Mapping[str, Callable[[], str]]
"""What each does by its name: it returns what it found in a line, and raises where a promise does not hold."""

CRF_TOLERANCE = 2e-3
"""Largest difference of a probability between the backends of the CRF, which round differently."""

_RUN_S = 300.0
_CONFIG = """\
name: self_test
data: {format: synthetic, num_train: 6, num_val: 2, size_px: 64, num_classes: 2}
train_classifier:
  backbone: {name: small}
  method: {name: cam}
  augment: {crop_px: 64, scale: [1.0, 1.0]}
  training: {steps: 4, batch_size: 2, learning_rate: 0.05}
make_attention: {scales: [1.0], flip: false}
make_masks: {threshold: 0.3, refine: crf, crf: {backend: torch}}
train_segmenter:
  init: classifier
  net: {name: largefov, backbone: {name: small}}
  augment: {crop_px: 64}
  training: {steps: 4, batch_size: 2, learning_rate: 0.01}
evaluate: {multi_scale: false}
runtime: {device: cpu, workers: 0, processes: 1, threads: 1}
"""
_HOLDER = """\
import sys
from pathlib import Path
from pipeline.store.locks import ArtifactLock
lock = ArtifactLock(Path(sys.argv[1]))
print(lock.try_acquire(), flush=True)
sys.stdin.read()
"""


def make_self_tests(folder: Path) -> SelfTests:
    """The tests in their order, with their files in ``folder``; after one that fails the later ones tell nothing."""
    (folder / "self_test.yaml").write_text(_CONFIG, encoding="utf-8")
    return {
        "locks": lambda: _try_locks(folder),
        "run": lambda: _try_run(folder),
        "again": lambda: _try_again(folder),
        "damage": lambda: _try_damage(folder),
        "kill": lambda: _try_kill(folder),
        "crf": _compare_crf,
    }


def _run(folder: Path, store: str, until: str | None = None) -> RunOutcome:
    from pipeline.config.run_config import load_config
    from pipeline.engine.run import Run
    from pipeline.store.artifacts import open_store

    return Run(load_config(folder / "self_test.yaml", []), open_store(folder / store)).run_pipeline(until=until)


def _try_run(folder: Path) -> str:
    """The six stages, each in its own process."""
    started = time.monotonic()
    outcome = _run(folder, "quiet")
    if [stage.state for stage in outcome.stages] != ["built"] * 6 or "segmenter.miou" not in outcome.metrics:
        raise EnvironmentFailure(f"expected six stages built and a score, found {outcome.stages}")
    return f"six stages from images to a score in {time.monotonic() - started:.0f} s"


def _try_again(folder: Path) -> str:
    """The same run finds everything in the store."""
    started = time.monotonic()
    states = {stage.stage: stage.state for stage in _run(folder, "quiet").stages}
    if set(states.values()) != {"cached"}:
        raise EnvironmentFailure(f"expected every stage to be cached, found {states}")
    return f"every stage found in the store in {time.monotonic() - started:.1f} s"


def _try_damage(folder: Path) -> str:
    """One byte of a weight is noticed, and nothing once it is back."""
    from pipeline.store.artifacts import open_store

    store = open_store(folder / "quiet")
    (path,) = (folder / "quiet" / "train_classifier").glob("*/classifier.safetensors")
    whole = path.read_bytes()
    for data, is_damaged in ((whole[:-1] + bytes([whole[-1] ^ 1]), True), (whole, False)):
        path.write_bytes(data)
        if bool(store.verify("train_classifier", path.parent.name)) != is_damaged:
            raise EnvironmentFailure(f"expected verify to find {'a changed byte' if is_damaged else 'nothing'}: {path}")
    return "a changed byte of the weights is noticed"


def _try_kill(folder: Path) -> str:
    """A run that is killed while it trains goes on and ends with the same bytes."""
    from pipeline.engine.spawn import PYTHON, find_our_code

    words = ["run", "self_test.yaml", "--artifacts", "killed", "--engine", "local", "--until", "train_classifier"]
    process = subprocess.Popen(
        [*PYTHON, "-m", "pipeline.cli.main", *words],
        cwd=folder,
        env=find_our_code(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    work = folder / "killed" / "train_classifier"
    end = time.monotonic() + _RUN_S
    while process.poll() is None and time.monotonic() < end and not list(work.glob(".work-*/*")):
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    states = [stage.state for stage in _run(folder, "killed", "train_classifier").stages]
    differing = [
        name
        for stage in ("prepare_data", "train_classifier")
        for name in _differing(folder / "quiet" / stage, folder / "killed" / stage)
    ]
    if differing:
        raise EnvironmentFailure("a run that was killed and went on ended with other files", differing)
    return f"killed while it trained, then {states[-1]}: the same bytes"


def _differing(one: Path, other: Path) -> list[str]:
    """Names of the files that are not the same in both, the manifests left out, which tell when they were built."""
    found = [
        {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.glob("[0-9a-f]*/**/*")
            if file.is_file()
        }
        for folder in (one, other)
    ]
    names = {name for files in found for name in files if not name.endswith("/manifest.json")}
    return sorted(name for name in names if found[0].get(name) != found[1].get(name))


def _try_locks(folder: Path) -> str:
    """Another process's lock keeps us out while it lives, and no longer."""
    from pipeline.engine.spawn import PYTHON, find_our_code
    from pipeline.store.locks import LEASE_S, USE_LEASES, ArtifactLock

    path = folder / ".locks" / "self-test"
    path.parent.mkdir(exist_ok=True)
    if (folder.parent / ".locks" / USE_LEASES).exists():
        (path.parent / USE_LEASES).touch()
    with subprocess.Popen(
        [*PYTHON, "-c", _HOLDER, str(path)], env=find_our_code(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            is_held = holder.stdout.readline().strip() == b"True"
            is_open = (lock := ArtifactLock(path)).try_acquire()
        finally:
            holder.kill()
    if not is_held or is_open:
        raise EnvironmentFailure(f"{path}: a lock of another process kept nobody out; choose another disk")
    end = time.monotonic() + 2 * LEASE_S
    while not lock.try_acquire(patience_s=LEASE_S):
        if time.monotonic() > end:
            raise EnvironmentFailure(f"{path}: the lock of a killed process stayed; choose another disk")
    kind = "leases" if (path.parent / USE_LEASES).exists() else "flock"
    lock.release()
    return f"{kind}: kept out while the holder lived, free once it was killed"


def _compare_crf() -> str:
    """The backends of the CRF that this machine has agree."""
    import numpy as np

    from stages.ops.crf.dense_crf import CrfConfig, dense_crf, resolve_crf_backend

    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (24, 32, 3), np.uint8)
    start = draw.dirichlet(np.ones(3), (24, 32)).transpose(2, 0, 1).astype(np.float32)
    usual = resolve_crf_backend("auto")
    if usual == "torch":
        return "torch's backend alone is here"
    one, other = (dense_crf(image, start, CrfConfig(backend=name), device="cpu") for name in (usual, "torch"))
    difference = float(np.abs(one - other).max())
    if not difference <= CRF_TOLERANCE:
        raise EnvironmentFailure(f"{usual} and torch differ by {difference:.1e}, expected at most {CRF_TOLERANCE:.0e}")
    return f"{usual} and torch agree to {difference:.0e}"
