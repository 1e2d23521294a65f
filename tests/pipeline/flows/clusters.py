"""A server and workers by ``wsss up`` for tests, and what they need to look into and to kill processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.flows.up import SERVER, Keeper

ROOT = Path(__file__).parents[3]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "WSSS_", "DO_NOT"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def run(folder: Path, *words: str, code: int = 0, **more: str) -> str:
    done = subprocess.run(words, cwd=folder, env=environment(**more), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code else "")


def wsss(folder: Path, *words: str, **more: str) -> str:
    return run(folder, sys.executable, "-P", "-m", "pipeline.cli.main", *words, **more)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until(condition: Callable[[], object], what: str, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s until {what}"
        time.sleep(0.1)


# -- processes --------------------------------------------------------------------------------------------------------


def parents() -> dict[int, int]:
    """Parent of every process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found[int(stat.parent.name)] = int(fields[1])
    return found


def ancestors(pid: int) -> list[int]:
    """``pid`` and those above it."""
    above, chain = parents(), [pid]
    while chain[-1] in above:
        chain.append(above[chain[-1]])
    return chain


def kill_with_all_below(pid: int) -> None:
    """As when the machine dies: nobody has a chance to clean up."""
    os.kill(pid, signal.SIGSTOP)
    above = parents()
    doomed = [pid]
    for each in doomed:
        doomed += [child for child, parent in above.items() if parent == each]
    for each in doomed:
        os.kill(each, signal.SIGKILL)


def holders(lock: Path) -> list[int]:
    """The processes that have a lock file open."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.readlink() == lock.absolute():
                found.append(int(descriptor.parts[2]))
        except OSError:
            continue
    return found


def those_of(folder: Path) -> list[str]:
    """Command lines of the processes that work in ``folder`` or were started for it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = str(folder).encode() in (entry / "environ").read_bytes() and int(entry.name) != os.getpid()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if is_ours and command:
            found.append(f"{entry.name} {command}")
    return found


# -- the cluster ------------------------------------------------------------------------------------------------------


class Cluster:
    """A server and workers in a folder."""

    def __init__(self, folder: Path, *, workers: int, **more: str) -> None:
        self.folder, self.home, self.more = folder, folder / "home", more
        self.words = ("up", "--port", str(free_port()), "--workers", str(workers), "--json")
        self.up = json.loads(self.wsss(*self.words))

    def wsss(self, *words: str) -> str:
        return wsss(self.folder, *words, "--home", str(self.home), **self.more)

    def down(self) -> None:
        """End it, and see that no process is left."""
        self.wsss("down")
        wait_until(lambda: not those_of(self.home), "no process is left", seconds=10)

    @property
    def workers(self) -> dict[int, str]:
        """Name by process id, those that were started again included."""
        found = Keeper(self.home, print).processes()
        return {process["pid"]: name for name, process in found.items() if name != SERVER and process["pid"]}

    def prefect(self, *words: str, code: int = 0) -> str:
        variables = {"PREFECT_API_URL": self.up["api_url"], "PREFECT_HOME": str(self.home), "DO_NOT_TRACK": "1"}
        command = str(Path(sys.executable).with_name("prefect"))
        return run(self.folder, command, "--no-prompt", *words, code=code, **variables)

    def submit(self, deployment: str, **parameters: object) -> str:
        """Begin a run; its id.  Asked of the server: Prefect's command takes seconds to start."""
        found = self.ask(f"deployments/name/{deployment}")
        body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
        return self.ask(f"deployments/{found['id']}/create_flow_run", body)["id"]

    def ask(self, path: str, body: object = None) -> Any:
        """The server's answer: to GET, or to POST where there is a body; asked again while its database is busy."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.up['api_url']}/{path}", data, {"Content-Type": "application/json"})
        for last in (False,) * 9 + (True,):
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if error.code != 503 or last:
                    raise
                time.sleep(1.0)

    def states(self, flow_run_id: str) -> list[dict[str, Any]]:
        """All states that a run has had, the last one last."""
        return self.ask(f"flow_run_states/?flow_run_id={flow_run_id}")

    def finish(self, flow_run_id: str, *, seconds: float = 300) -> dict[str, Any]:
        """Wait until a run is over; its last state."""
        over = {"COMPLETED", "FAILED", "CANCELLED"}
        wait_until(lambda: self.states(flow_run_id)[-1]["type"] in over, "the run is over", seconds=seconds)
        return self.states(flow_run_id)[-1]

    def kill_worker_of(self, lock: Path) -> str:
        """Kill the worker whose run holds ``lock``, and all below it; the worker's name."""
        workers = self.workers
        (worker,) = {pid for holder in holders(lock) for pid in ancestors(holder) if pid in workers}
        kill_with_all_below(worker)
        return workers[worker]
