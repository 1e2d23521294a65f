"""What ``wsss up`` has started, in one file: ``<home>/up.json``.

Written by one rename, so a reader sees all of it or the one before; changed only under a lock, so two commands and the
supervisor do not lose each other's lines.  Holds no secret: those stay in the environment of the processes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from pipeline.flows.processes import ProcessId, is_running
from stages.errors import DamagedFileError, EnvironmentFailure

SERVER, SUPERVISOR = "server", "supervisor"
_LOCK_TIMEOUT_S = 60.0


class Component(BaseModel):
    """One process that should run."""

    name: str
    """``server``, ``supervisor``, or the worker's."""
    command: list[str]
    environment: dict[str, str] = {}
    """Beside that of who starts it."""
    log: Path
    gpu: str | None = None
    """CUDA_VISIBLE_DEVICES of a worker; None for the server and the supervisor, empty for a worker on the CPU."""
    pid: int = 0
    started: str = ""

    @property
    def process(self) -> ProcessId:
        """The process that ran last."""
        return ProcessId(self.pid, self.started)

    @property
    def is_worker(self) -> bool:
        """Whether it takes flow runs."""
        return self.gpu is not None

    def is_running(self) -> bool:
        """Whether that process still runs."""
        return is_running(self.process)


class ClusterState(BaseModel):
    """Everything that ``wsss up`` set up on this machine."""

    api_url: str
    is_server_ours: bool
    """Whether the server was started here, or is another's at PREFECT_API_URL."""
    pool: str
    directory: Path
    """Working directory of the flow runs."""
    artifacts: str
    """Root of the store: an absolute path, or a URL."""
    files_port: int
    """Where the supervisor serves the store's reports; 0 when it does not."""
    num_workers: int | None = None
    """As last asked for; None is one per GPU."""
    components: dict[str, Component] = {}

    @property
    def workers(self) -> list[Component]:
        """The workers, by name."""
        return sorted((found for found in self.components.values() if found.is_worker), key=lambda found: found.name)


def state_path(home: Path) -> Path:
    """The file of ``home``."""
    return home / "up.json"


def read_state(home: Path) -> ClusterState | None:
    """What is up in ``home``; None when nothing is.

    Raises:
        DamagedFileError: the file cannot be understood.
    """
    path = state_path(home)
    try:
        return ClusterState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DamagedFileError(
            f"{path} is not what wsss wrote; end what `ps` shows of `prefect server` and `worker`, then remove it"
        ) from error


def write_state(home: Path, state: ClusterState) -> None:
    """Replace the file."""
    descriptor, name = tempfile.mkstemp(dir=home, prefix=".up-")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(state.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(state_path(home))


@contextlib.contextmanager
def changing(home: Path) -> Iterator[ClusterState]:
    """The state, for a change of a moment: written back at the end unless the body raises or the file is gone."""
    with _locked(home / "up.json.lock", _LOCK_TIMEOUT_S):
        state = read_state(home)
        if state is None:
            raise EnvironmentFailure(f"nothing is up in {home}; start with: wsss up")
        yield state
        write_state(home, state)


@contextlib.contextmanager
def one_command(home: Path, *, timeout_s: float = 180.0) -> Iterator[None]:
    """One ``wsss up`` or ``wsss down`` at a time.

    Raises:
        EnvironmentFailure: the folder cannot be written, or another one takes longer than ``timeout_s``.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home / "up.lock", timeout_s):
            yield
    except PermissionError as error:
        raise EnvironmentFailure(f"{home} cannot be written ({error.strerror}); choose --home DIR") from error


@contextlib.contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise EnvironmentFailure(f"another wsss up or down holds {path} for {timeout_s:.0f} s; wait for it") from error
    try:
        yield
    finally:
        lock.release()
