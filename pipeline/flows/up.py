"""``wsss up`` and ``wsss down``: the commands of Prefect and supervisord that a person could type, in their order.

Prints each command that it calls, and changes nothing but by them and by the file that supervisord reads,
``<home>/supervisord.conf``; beside them it only asks the server and supervisord.  supervisord keeps server and workers
alive; runs that die are the business of Prefect's automations (deploy/automations.yaml).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from xmlrpc.client import ServerProxy

import jinja2
from filelock import FileLock, Timeout

from pipeline.engine.failures import hide_secrets
from pipeline.engine.gpus import VARIABLE, find_gpus, short_name
from pipeline.engine.spawn import find_our_code
from pipeline.flows.environment import (
    API_URL,
    HOST,
    LOOPBACK,
    STARTUP_TIMEOUT_S,
    api_url,
    bypass_proxy,
    check_api,
    set_private,
)
from pipeline.flows.server import ORIGINS
from stages.contracts import expand_path, write_atomic
from stages.errors import EnvironmentFailure, InputError

Say = Callable[[str], None]

SERVER = "server"
POOL_FILE = "process-pool.json"
"""The pool's job template: a run cannot choose the program, the folder or the variables that it is executed with."""
SETTINGS = {
    # signs of life of a flow run, which the automation for zombies counts on; Prefect's least
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    # a run begins soon after it is submitted, and no worker takes one that another could begin now
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    # block types are not used, and registering them is a burst of writes
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    # a folder `pipeline` or `stages` in the runs' directory must not be imported in place of ours
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


@dataclass(frozen=True)
class UpCall:
    """What ``wsss up`` was asked for; ``workers`` None is one per GPU, or what is up already."""

    home: Path
    host: str = HOST
    port: int = 4200
    pool: str = "wsss"
    workers: int | None = None
    artifacts: str = "artifacts"

    @property
    def own_url(self) -> str:
        """API of a server that is started here, as this machine reaches it."""
        return f"http://{HOST if self.host in ('0.0.0.0', '::', *LOOPBACK) else self.host}:{self.port}/api"


def up(call: UpCall, say: Say) -> dict[str, Any]:
    """Bring everything up that is not, say each command, and return the document of ``wsss up --json``.

    Raises:
        InputError: an argument that cannot be met.
        EnvironmentFailure: a server that does not answer, a port in use, a command that failed.
    """
    with _one_command(call.home):
        keeper = Keeper(call.home, say)
        before, state = keeper.processes(), keeper.state
        url = find_server(call, state["api_url"] if before else "")
        is_ours = SERVER in before if before else url == call.own_url
        is_kept = call.workers is None and before.keys() - {SERVER}
        workers = state["workers"] if is_kept else choose_workers(call.workers, find_gpus())
        variables = _variables(call, url, is_ours=is_ours)
        say("$ export " + shlex.join(f"{name}={value}" for name, value in variables.items()))
        os.environ.update(variables)  # before Prefect is imported, which then reads them
        bypass_proxy()
        start = f"python -m pipeline.flows.server --host {call.host} --port {call.port}"
        programs = {SERVER: state["programs"][SERVER] if before else start} if is_ours else {}
        if is_ours and not before:
            _check_port(call, url)
            say(f"# kept by supervisord: {start}")
            keeper.write(programs, api_url=url, workers={})
            keeper.run("supervisord")
        _wait_for_server(url, keeper if is_ours else None)
        steps = _set_up(call, keeper)
        for name, gpu in workers.items():
            start = f"prefect worker start --pool {shlex.quote(call.pool)} --type process --name {name} --limit 1"
            programs[name] = f"env {VARIABLE}={gpu} {start} --install-policy never"
            if name not in before:
                say(f"# kept by supervisord: {programs[name]}")
        keeper.write(programs, api_url=url, workers=workers)
        if before or is_ours:
            keeper.run("supervisorctl", "update")
        elif programs:
            keeper.run("supervisord")
        after = keeper.processes()

    def describe(name: str) -> dict[str, Any]:
        pid, state = after[name]["pid"], after[name]["statename"].lower()
        if pid:
            state = "already up" if name in before and before[name]["pid"] == pid else "started"
        return {"name": name, "state": state, "pid": pid, "log": after[name]["stdout_logfile"]}

    return {
        "api_url": url,
        "ui_url": url.removesuffix("/api"),
        "server": describe(SERVER) if is_ours else {"name": SERVER, "state": "of PREFECT_API_URL"},
        "workers": [describe(name) | {"gpu": gpu or None} for name, gpu in workers.items()],
        **steps,
        "supervisord": keeper.file,
        "logs": keeper.logs,
    }


def down(home: Path, say: Say) -> dict[str, Any]:
    """End everything that ``up`` started in ``home``; runs that this interrupts go on after the next ``up``."""
    with _one_command(home):
        keeper = Keeper(home, say)
        running = keeper.processes()
        if workers := running.keys() - {SERVER}:
            # first the runs: told to end they say so to the server, where a worker would kill them without a word
            pids = ",".join(str(running[name]["pid"]) for name in workers)
            with contextlib.suppress(EnvironmentFailure, OSError):  # there is no run, or no pkill
                keeper.run("pkill", "-TERM", "-P", pids)
                _wait(lambda: subprocess.run(["pgrep", "-P", pids], capture_output=True, check=False).returncode != 0)
            keeper.run("supervisorctl", "stop", *sorted(workers))
        if running:
            keeper.run("supervisorctl", "shutdown")
            _wait(lambda: not keeper.pid_file.exists())
    return {"ended": sorted(name for name, process in running.items() if process["pid"]), "home": home}


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30.0
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)


class Keeper:
    """supervisord with the processes of one home."""

    def __init__(self, home: Path, say: Say) -> None:
        """Look at ``home``; say each command that is run."""
        self.file, self.pid_file, self.logs = home / "supervisord.conf", home / "supervisord.pid", home / "logs"
        self._socket, self._say = home / "supervisord.sock", say
        if len(str(self._socket)) > 100:  # the system's limit is 108
            name = hashlib.sha256(str(home).encode()).hexdigest()[:16]
            self._socket = Path(tempfile.gettempdir()) / f"wsss-{os.getuid()}-{name}.sock"

    @property
    def state(self) -> dict[str, Any]:
        """What was written last: ``api_url``, ``workers`` (name to GPU) and ``programs`` (name to command)."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("; "))
        return {"api_url": "", "workers": {}, "programs": {}}

    def processes(self) -> dict[str, dict[str, Any]]:
        """What supervisord says of each process, by name; empty when it does not run."""
        from supervisor.xmlrpc import SupervisorTransport  # pyright: ignore[reportMissingTypeStubs]

        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        with contextlib.suppress(OSError), ServerProxy("http://127.0.0.1", transport=transport) as asked:
            return {found["name"]: found for found in cast(Any, asked).supervisor.getAllProcessInfo()}
        return {}

    def write(self, programs: Mapping[str, str], **state: Any) -> None:  # noqa: ANN401 - JSON is any
        """Write the file with these programs, name to command, and what else to remember."""
        self.logs.mkdir(parents=True, exist_ok=True)
        commands = {name: _with_full_path(command) for name, command in programs.items()}
        template = jinja2.Template((_deploy_folder() / "supervisord.conf").read_text(), keep_trailing_newline=True)
        known = json.dumps({**state, "programs": programs})
        text = template.render(state=known, file=self.file, socket=self._socket, commands=commands)
        write_atomic(self.file, text.encode())
        self.file.chmod(0o600)

    def run(self, *words: str) -> None:
        """Print a command and run it; one of supervisord's gets our file.

        Raises:
            EnvironmentFailure: it failed.
        """
        if words[0].startswith("supervisor"):
            words = (words[0], "-c", str(self.file), *words[1:])
        self._say(f"$ {shlex.join(words)}")
        command = [_program(words[0]), *words[1:]]
        done = subprocess.run(command, env=find_our_code(), capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            shown = [hide_secrets(line) for line in lines[-8:]]
            raise EnvironmentFailure(f"{shlex.join(words)} failed; see below, then run it again", shown)


def _deploy_folder() -> Path:
    """The files beside this code: of the installed package, or of a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "_deploy", package.parent / "deploy") if folder.is_dir())


def _with_full_path(command: str) -> str:
    """``command`` with the path of its program, which may follow ``env NAME=value``."""
    return re.sub(r"^(env \S+ )?(\w+)", lambda found: (found[1] or "") + shlex.quote(_program(found[2])), command)


def _program(name: str) -> str:
    """A program of our environment, or one of the system's."""
    ours = Path(sys.executable).with_name(name)
    return str(ours) if ours.exists() else name


@contextlib.contextmanager
def _one_command(home: Path) -> Iterator[None]:
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "up.lock", timeout=180):
            yield
    except PermissionError as error:
        raise EnvironmentFailure(f"{home} cannot be written ({error.strerror}); choose --home DIR") from error
    except Timeout as error:
        raise EnvironmentFailure(f"another wsss up or down is at {home} for 180 s; wait for it") from error


def find_server(call: UpCall, standing: str) -> str:
    """URL of the server that is meant; ``standing`` is that of what is up already."""
    configured = api_url().replace("//localhost:", "//127.0.0.1:")
    wanted = configured or (call.own_url if call.port != UpCall.port or not standing else standing)
    if standing and wanted != standing:
        raise InputError(f"what is up works with the server at {standing}, not at {wanted}: wsss down first")
    return wanted


def _variables(call: UpCall, url: str, *, is_ours: bool) -> dict[str, str]:
    """What every process has beside its inherited environment, which may hold secrets; what the user has set stands."""
    variables = dict(SETTINGS)
    set_private(variables)
    if is_ours:  # no web page but the server's own may start runs
        origin = url.removesuffix("/api")
        variables[ORIGINS] = f"{origin},{origin.replace(HOST, 'localhost')}"
    variables = {name: os.environ.get(name, value) for name, value in variables.items()}
    store = call.artifacts if "://" in call.artifacts else str(expand_path(call.artifacts).absolute())
    variables |= {"PREFECT_HOME": str(call.home), API_URL: url, "WSSS_ARTIFACTS": store}
    return variables | {"PREFECT_DEFAULT_WORK_POOL_NAME": call.pool, "PWD": str(Path.cwd())}


def _check_port(call: UpCall, url: str) -> None:
    """Nobody else may have the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((call.host, call.port))
        except OSError as error:
            raise EnvironmentFailure(
                f"port {call.port} of {call.host} cannot be had ({error.strerror}): stop that program, use it with "
                f"export {API_URL}={url} if it is a Prefect server, or take another port: wsss up --port N"
            ) from error


def _wait_for_server(url: str, keeper: Keeper | None) -> None:
    """Return when the server answers: a new one of the keeper's within two minutes, another at once."""
    end = time.monotonic() + STARTUP_TIMEOUT_S
    while True:
        try:
            return check_api(url)
        except EnvironmentFailure as failure:
            if keeper is None:
                raise
            problem = failure.message
        if keeper.processes()[SERVER]["statename"] not in ("STARTING", "RUNNING") or time.monotonic() > end:
            lines = (keeper.logs / "server.log").read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            keeper.run("supervisorctl", "shutdown")
            raise EnvironmentFailure(
                f"Prefect's server did not come up ({problem}); see {keeper.logs}/server.log, and check the pins with "
                "wsss doctor",
                [hide_secrets(line) for line in lines],
            )
        time.sleep(0.2)


def _set_up(call: UpCall, keeper: Keeper) -> dict[str, Any]:
    """Give the server the work pool, the deployments and the automations; what was done, for the document."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    files = _deploy_folder()
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(call.pool)
        except ObjectNotFound:
            pool = None
        names = {"automations": {"name": {"any_": ["wsss: zombies"]}}}
        has_automations = bool(client.request("POST", "/automations/filter", json=names).json())
    if pool is None:
        # a worker creates its pool; `prefect work-pool create` would make the server ask GitHub for all types of pools
        words = ("--pool", call.pool, "--type", "process", "--name", "setup", "--install-policy", "never", "--run-once")
        keeper.run("prefect", "worker", "start", *words, "--base-job-template", str(files / POOL_FILE))
    elif pool.type != "process":
        raise InputError(
            f"work pool {call.pool!r} is of type {pool.type}, wsss up runs workers of type process: choose another "
            f"name with --pool, or start that pool's workers yourself: prefect worker start --pool {call.pool}"
        )
    elif "command" in pool.base_job_template.get("variables", {}).get("properties", {}):
        # whoever reaches the server could have the workers execute any program
        keeper.run("prefect", "work-pool", "update", call.pool, "--base-job-template", str(files / POOL_FILE))
    # before the workers: each poll of theirs is a write, and SQLite refuses a deployment that meets one
    keeper.run("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(files / "prefect.yaml"))
    if not has_automations:
        keeper.run("prefect", "automation", "create", "--from-file", str(files / "automations.yaml"))
    return {
        "pool": {"name": call.pool, "state": "created" if pool is None else "already there"},
        "automations": "already there" if has_automations else "created",
    }


def choose_workers(number: int | None, gpus: Sequence[str], host: str = "") -> dict[str, str]:
    """Name of each worker, which begins with the host's, and its CUDA_VISIBLE_DEVICES.

    ``number`` None is one per GPU, or one on the CPU.

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
