"""torchrun's agent for the ranks of one training, started by the stage's child.

Reads one JSON line from stdin, the request; the end of stdin ends this process and the ranks.  Writes JSON lines to
stdout: those of the main rank, and at the end result or error.  Everything stays on the loopback interface.
Reads and writes a temporary folder, where the request lies for the ranks and each of them writes how it ended.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.engine.child import Events, Request, die_with_parent
from pipeline.engine.failures import InternalFailure, deliberate, from_message, to_message
from stages.contracts import read_json
from stages.errors import EnvironmentFailure, WsssError

REQUEST = "request.json"
LOOPBACK = "127.0.0.1"
SHUTDOWN_S = 5
"""Seconds between asking the other ranks to end, when one has failed, and killing them."""


class RanksRequest(Request):
    """One stage, in several processes."""

    num_ranks: int
    work: Path
    """Folder that the stage writes to."""


def main() -> int:
    """Start the ranks, wait for them, say how it went."""
    events = Events(os.dup(1))
    request = RanksRequest.model_validate_json(sys.stdin.buffer.readline())
    die_with_parent()
    hold_ranks()
    try:
        with tempfile.TemporaryDirectory(prefix="wsss-ranks-") as name:
            folder = Path(name)
            (folder / REQUEST).write_text(request.model_dump_json(), encoding="utf-8")
            codes = launch(request.num_ranks, folder)
            answer = read_result(folder, codes, request)
    except Exception as error:
        events.send("error", **to_message(deliberate(error, request.stage)))
        return 1
    events.send("result", **answer)
    return 0


def hold_ranks() -> None:
    """Make stdin a pipe that this process alone holds open: the ranks inherit its reading end and see this one die."""
    reader, _ = os.pipe()  # the writing end is closed by the system when this process ends, however it does
    os.dup2(reader, 0)
    os.close(reader)


def launch(num: int, folder: Path) -> dict[int, int]:
    """Run ``pipeline.engine.rank`` in ``num`` processes under torchrun's agent.

    Returns:
        Exit code by rank of those that failed, negative for a signal; when one fails the others are ended at once.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # else they look the host's name up
        os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_S)
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
        elastic_launch(config, sys.executable)("-P", "-m", "pipeline.engine.rank", str(folder))
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


def read_result(folder: Path, codes: Mapping[int, int], request: RanksRequest) -> dict[str, Any]:
    """The main rank's result.

    Raises:
        WsssError: the error that ended the ranks, see ``find_cause``.
    """
    endings = {}
    for rank in range(request.num_ranks):
        path = folder / ending_name(rank)
        if path.exists():
            endings[rank] = read_json(path)
    if codes or 0 not in endings or any("error" in ending for ending in endings.values()):
        raise find_cause(endings, codes, request.stage)
    return endings[0]["result"]


def ending_name(rank: int) -> str:
    """Name of the file in which ``rank`` says how it ended."""
    return f"rank-{rank}.json"


def find_cause(endings: Mapping[int, Mapping[str, Any]], codes: Mapping[int, int], stage: str) -> WsssError:
    """What went wrong first: the ranks that wait for a failed one fail in turn, with a lost connection.

    A deliberate error is the cause, else a signal that did not come from the agent, else the earliest error.

    Args:
        endings: What ranks wrote: ``at``, seconds, and ``error`` or ``result``.
        codes: Exit codes of the failed ranks.
        stage: For the message.
    """
    failed = sorted((ending for ending in endings.values() if "error" in ending), key=lambda ending: ending["at"])
    foreseen = [ending for ending in failed if ending["error"]["kind"] != InternalFailure.__name__]
    # the agent ends the others by SIGTERM: that comes last
    silent = sorted((code == -signal.SIGTERM, rank, code) for rank, code in codes.items() if rank not in endings)
    killed = [(rank, code) for is_ended, rank, code in silent if code < 0 and not is_ended]
    if killed and not foreseen:
        return _describe_silence(*killed[0], stage)
    if failed:
        return from_message((foreseen or failed)[0]["error"])
    if silent:
        return _describe_silence(*silent[0][1:], stage)
    return InternalFailure(f"{stage}: the main rank ended without an answer")


def _describe_silence(rank: int, code: int, stage: str) -> WsssError:
    """Why a rank ended that wrote nothing."""
    if code >= 0:
        return InternalFailure(f"{stage}: the process of rank {rank} ended with code {code} and no answer")
    name = signal.Signals(-code).name
    hint = "; most likely the machine ran out of memory: lower the batch size, runtime.devices or runtime.workers"
    return EnvironmentFailure(
        f"{stage}: the process of rank {rank} was ended by {name}{hint if name == 'SIGKILL' else ''}; "
        "run the same command again: it continues from the unfinished work"
    )


if __name__ == "__main__":
    sys.exit(main())
