"""One training in several processes, a device each, by torch's ``elastic_launch``.

The stage's child is torch's agent: it starts the ranks, ends all of them when one fails, and knows from its error file
which one and why.  The main rank writes the stage's files and says its progress on the child's own channel; the others
are silent.  Every rank ends when the child does.  Everything stays on the loopback interface.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.engine.building import to_plain
from pipeline.engine.failures import InternalFailure, deliberate, from_message, to_message
from pipeline.engine.request import ChildProgress, Events, Request, call_stage, die_with, prepare_call
from pipeline.store.artifacts import open_store
from stages.contracts import Runtime, SilentProgress, StageResult, read_json, write_json
from stages.errors import EnvironmentFailure, WsssError
from stages.training.distributed import is_main, num_ranks, resolve_devices

_REQUEST, _RESULT = "request.json", "result.json"
LOOPBACK = "127.0.0.1"
SHUTDOWN_S = 5
"""Seconds between asking the other ranks to end, when one has failed, and killing them."""


def count_ranks(config: object, runtime: Runtime | None) -> int:
    """Processes that a stage has to be called in; 1: this one.  One that can be spread has ``config.max_devices``.

    Raises:
        ConfigError: more devices than ``max_devices``, or one device is named where several are asked for.
        EnvironmentFailure: there are fewer devices than were asked for.
    """
    most = getattr(config, "max_devices", None)
    if most is None or runtime is None or num_ranks() > 1:
        return 1
    return resolve_devices(runtime, most)


def run_on_ranks(request: Request, num: int, work: Path, progress: ChildProgress) -> StageResult:
    """Call the stage of ``request`` in ``num`` processes at once, a device each; the main rank's result.

    Raises:
        WsssError: what the stage raised on any of the ranks.
        InternalFailure: an exception that nobody foresaw.
        EnvironmentFailure: a rank was ended by a signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    progress.info(f"on {num} devices")
    progress.flush()
    has_threads = request.run.get("runtime", {}).get("threads") or "OMP_NUM_THREADS" in os.environ
    threads = {} if has_threads else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num))}
    loopback = "lo0" if sys.platform == "darwin" else "lo"  # else the ranks look the host's name up
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback} | dict(os.environ) | threads
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_S)
    with tempfile.TemporaryDirectory(prefix="wsss-ranks-") as name, _heard_and_held(progress.events.descriptor):
        folder = Path(name)
        (folder / _REQUEST).write_text(request.model_dump_json(), encoding="utf-8")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{LOOPBACK}:0",
            local_addr=LOOPBACK,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "pipeline.engine.ranks", str(folder), str(work))
        except ChildFailedError as error:
            raise find_cause(error.failures, request.stage) from None
        answer = read_json(folder / _RESULT)
    progress.warnings += answer["warnings"]
    return StageResult(metrics=answer["metrics"], mask_supervision=tuple(answer["mask_supervision"]))


@contextlib.contextmanager
def _heard_and_held(descriptor: int) -> Iterator[None]:
    """Let processes that are started within have ``descriptor`` as stdout, and as stdin a pipe that ends with us."""
    reader, writer = os.pipe()  # the system closes the writing end when this process ends, however it does
    kept = os.dup(0), os.dup(1)
    os.dup2(reader, 0)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        for number, own in enumerate(kept):
            os.dup2(own, number)
        for own in (*kept, reader, writer):
            os.close(own)


def run_rank(folder: Path, work: Path) -> None:
    """One rank: call the stage as the request in ``folder`` says; the main rank leaves its result there.

    Raises:
        RankError: the stage failed; its text is the error as JSON, which torch keeps in the rank's error file.
    """
    events = Events(os.dup(1))
    os.dup2(2, 1)
    faulthandler.enable()
    die_with(os.dup(0))
    request = Request.model_validate_json((folder / _REQUEST).read_bytes())
    told = ChildProgress(events)
    try:
        spec, run, call = prepare_call(request, open_store(request.artifacts))
        arguments = {**spec.arguments(call), "runtime": run.runtime}
        result = call_stage(spec, arguments, work, told if is_main() else SilentProgress())
    except Exception as error:
        raise RankError(json.dumps(to_message(deliberate(error, request.stage)))) from error
    finally:
        told.flush()
    if is_main():
        metrics, supervision = to_plain(result.metrics), list(result.mask_supervision)
        answer = {"metrics": metrics, "mask_supervision": supervision, "warnings": told.warnings}
        write_json(folder / _RESULT, answer)


class RankError(Exception):
    """An error of a rank on its way to the child, as JSON."""


def find_cause(failures: Mapping[int, Any], stage: str) -> WsssError:
    """What went wrong first: the ranks that wait for a failed one fail in turn, with a lost connection.

    A deliberate error is the cause, else a signal that did not come from the agent, else the earliest error.
    ``failures`` has torch's ``ProcessFailure`` by rank: ``exitcode``, ``message``, ``timestamp``.
    """
    errors, silent = [], []
    for rank, failure in failures.items():
        message = failure.message["message"] if isinstance(failure.message, Mapping) else str(failure.message)
        _, is_ours, text = message.partition(f"{RankError.__name__}: ")
        if is_ours:
            error = from_message(json.loads(text))
            errors.append((isinstance(error, InternalFailure), failure.timestamp, rank, error))
        else:  # the agent ends the others by SIGTERM: that comes last
            silent.append((failure.exitcode == -signal.SIGTERM, rank, failure.exitcode))
    is_killed = bool(silent) and not min(silent)[0] and min(silent)[2] < 0
    if errors and not (min(errors)[0] and is_killed):
        return min(errors)[-1]
    _, rank, code = min(silent)
    if code >= 0:
        return InternalFailure(f"{stage}: the process of rank {rank} ended with code {code} and no answer")
    name = signal.Signals(-code).name
    hint = "; most likely the machine ran out of memory: lower the batch size, runtime.devices or runtime.workers"
    return EnvironmentFailure(
        f"{stage}: the process of rank {rank} was ended by {name}{hint if name == 'SIGKILL' else ''}; "
        "run the same command again: it continues from the unfinished work"
    )


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(run_rank)(Path(sys.argv[1]), Path(sys.argv[2]))
    except RankError:
        sys.stderr.flush()
        os._exit(1)  # at once: the connection to the other ranks is open, and closing it could wait for them
