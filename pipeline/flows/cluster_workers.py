"""The workers of one machine: which there are, and how one ends with all that it started.

A worker of Prefect's starts each flow run in a session of its own, which lives on when the worker is killed; told to
end, it waits for its flow runs or kills them without a word to the server.  So the processes are found by the mark in
their environment: the worker is frozen, its flow runs are told to end, which end their stages and say so, and what is
left is killed, the worker too.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipeline.engine.gpus import VARIABLE, short_name
from pipeline.engine.spawn import PYTHON
from pipeline.flows.cluster_state import Component
from pipeline.flows.processes import ProcessId, end, find_marked, freeze, parent_of
from stages.errors import InputError

MARK = "WSSS_COMPONENT"
"""Variable that every process of a component carries, and every process that those start."""
FLOW_RUN_ID = "PREFECT__FLOW_RUN_ID"
"""Variable by which Prefect tells a process which flow run it is."""
FLOWS_GRACE_S = 15.0
_REST_GRACE_S = 3.0

HEARTBEAT_S = 30
"""Seconds between two signs of life of a flow run; Prefect's least."""
WORKER_SETTINGS = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    "PYTHONUNBUFFERED": "1",
    # a folder `pipeline` or `stages` in the runs' directory must not be imported in place of ours
    "PYTHONSAFEPATH": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


def mark(home: Path, name: str) -> str:
    """The value of ``MARK`` for a component of ``home``."""
    return hashlib.sha256(f"{home}\0{name}".encode()).hexdigest()[:16]


def choose_workers(number: int | None, gpus: Sequence[str], host: str = "") -> dict[str, str]:
    """Name of each worker and its CUDA_VISIBLE_DEVICES.

    Args:
        number: How many; None is one per GPU, or one on the CPU.
        gpus: What ``find_gpus`` found.
        host: First part of the names, by default this machine's.

    Raises:
        InputError: more workers than GPUs.
    """
    host = (host or socket.gethostname()).split(".")[0]
    if not gpus:
        return {f"{host}-cpu{index}": "" for index in range(1 if number is None else number)}
    if number is not None and number > len(gpus):
        raise InputError(
            f"--workers {number}: one worker per GPU, and {len(gpus)} visible here; take at most {len(gpus)}, or hide "
            f"the GPUs with {VARIABLE}=-1 for workers on the CPU"
        )
    return {f"{host}-{short_name(gpu)}": gpu for gpu in gpus[:number]}


def describe_worker(name: str, gpu: str, pool: str, logs: Path, environment: Mapping[str, str]) -> Component:
    """The component of one worker; one flow run at a time, and it never installs packages."""
    settings = {setting: value for setting, value in WORKER_SETTINGS.items() if setting not in os.environ}
    words = ("worker", "start", "--pool", pool, "--type", "process", "--name", name, "--limit", "1")
    return Component(
        name=name,
        command=[*PYTHON, "-m", "prefect", *words, "--install-policy", "never"],
        environment={**settings, **environment, VARIABLE: gpu},
        log=logs / f"worker-{name}.log",
        gpu=gpu,
    )


def find_runs(home: Path, names: Collection[str]) -> dict[str, dict[str, set[int]]]:
    """Flow runs that processes of these workers are at, by worker, each with their pids; one look for all."""
    marks = {name: mark(home, name) for name in names}
    found = find_marked(MARK, *marks.values())
    return {
        name: _group({process: variables for process, variables in found.items() if variables[MARK] == value})
        for name, value in marks.items()
    }


def end_worker(home: Path, worker: Component, *, grace_s: float = FLOWS_GRACE_S) -> dict[str, set[int]]:
    """End a worker, or what a dead one left, with its flow runs and their stages.

    Args:
        home: Whose worker.
        worker: Which.
        grace_s: Seconds that a flow run gets to end its stage and to say so to the server.

    Returns:
        Flow runs that were ended, each with the pids that it had.
    """
    freeze(worker.process)
    found = find_marked(MARK, mark(home, worker.name))
    end(_flow_processes(found), grace_s=grace_s)
    _end_rest(home, worker)
    return _group(found)


def _end_rest(home: Path, worker: Component) -> None:
    """Stages end with the pipe to their flow run; the worker, which has nothing to do any more, is killed."""
    end_at = time.monotonic() + _REST_GRACE_S
    while set(left := find_marked(MARK, mark(home, worker.name))) - {worker.process} and time.monotonic() < end_at:
        time.sleep(0.1)
    end([*left, worker.process], grace_s=0.0)


def _group(found: Mapping[ProcessId, Mapping[str, str]]) -> dict[str, set[int]]:
    runs: dict[str, set[int]] = {}
    for process, environment in found.items():
        if FLOW_RUN_ID in environment:
            runs.setdefault(environment[FLOW_RUN_ID], set()).add(process.pid)
    return runs


def _flow_processes(found: Mapping[ProcessId, Mapping[str, str]]) -> list[ProcessId]:
    """Of each flow run the process above all others of it: told to end, it ends its stages in order."""
    pids = _group(found)
    return [
        process
        for process, environment in found.items()
        if FLOW_RUN_ID in environment and parent_of(process.pid) not in pids[environment[FLOW_RUN_ID]]
    ]
