"""Prefect's API server for the length of one run, where no server is configured.

Prefect would start one by itself.  This one costs about half: the run's own process never imports the server, both
start at the same time, and no block types are registered.  It also ends with its parent however that ends (Prefect's
own outlives a ``kill -9``), and it is stopped only after every task run has been recorded.
Its database stays in PREFECT_HOME (``./.prefect``): a later ``prefect server start`` there shows the finished runs.
Neither side imports Prefect here; uvicorn loads the server by name in the child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from filelock import FileLock

from pipeline.engine.spawn import PYTHON, find_our_code
from pipeline.flows.environment import HOST, STARTUP_TIMEOUT_S, bypass_proxy
from stages.errors import EnvironmentFailure

_STOP_TIMEOUT_S = 10.0
_SERVER_ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}
"""What Prefect itself gives to its temporary server, and no block types."""


class EmbeddedServer:
    """A server in a child process; ``with EmbeddedServer(home) as url`` waits until it answers."""

    def __init__(self, home: Path) -> None:
        """Prepare a server whose database is in ``home``."""
        self.home = home
        self.log = home / "embedded-server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = FileLock(home / "embedded-server.lock")
        self.url = ""

    def start(self) -> str:
        """Start the child and return the API's URL at once, before it answers.

        Raises:
            EnvironmentFailure: PREFECT_HOME cannot be written, or the child died.
        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()  # two new servers must not migrate one database at the same time
            log = self.log.open("wb")
        except OSError as error:
            raise EnvironmentFailure(f"PREFECT_HOME {self.home} cannot be written ({error.strerror})") from error
        with log:
            self._process = subprocess.Popen(
                [*PYTHON, "-m", "pipeline.flows.embedded_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run, which still has to tell the server
                env=find_our_code() | _SERVER_ENVIRONMENT,
            )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip().decode()
        if not port:
            raise self._failure("did not start")
        self.url = f"http://{HOST}:{port}/api"
        bypass_proxy()
        return self.url

    def wait(self, timeout_s: float = STARTUP_TIMEOUT_S) -> None:
        """Return when the server answers.

        Raises:
            EnvironmentFailure: it died or did not answer in time.
        """
        assert self._process is not None
        end = time.monotonic() + timeout_s
        while not _is_healthy(self.url):
            if self._process.poll() is not None:
                raise self._failure(f"ended with code {self._process.returncode}")
            if time.monotonic() > end:
                raise self._failure(f"did not answer within {timeout_s:.0f} s")
            time.sleep(0.05)
        self._lock.release()

    def stop(self) -> None:
        """End the child; harmless when there is none."""
        self._lock.release()
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def __enter__(self) -> str:
        """Start, wait, and return the API's URL."""
        try:
            url = self.start()
            self.wait()
        except BaseException:
            self.stop()
            raise
        return url

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    def _failure(self, what: str) -> EnvironmentFailure:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
        return EnvironmentFailure(
            f"Prefect's embedded server {what}: see {self.log}, check the pins with `wsss doctor`, "
            "or run without a server: --engine local",
            lines,
        )


def _is_healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5.0) as answer:
        return answer.status == 200
    return False


# ---------------------------------------------------------------------------------------------------------------------
# The child
# ---------------------------------------------------------------------------------------------------------------------


def _end_with_parent() -> None:
    """Stop the server when the parent closes the pipe, by will or by death."""
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 1024):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_TIMEOUT_S / 2)
    os._exit(1)


@contextlib.contextmanager
def _stdout_for_the_port() -> Iterator[int]:
    """The parent's pipe for one line; afterwards stdout goes to the log like stderr."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    try:
        yield pipe
    finally:
        os.close(pipe)


def main() -> None:
    """Serve on a free port of the loopback interface, written to stdout first."""
    import uvicorn

    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        host=HOST,
        port=0,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=2,
    )
    socket = config.bind_socket()
    with _stdout_for_the_port() as pipe:
        os.write(pipe, f"{socket.getsockname()[1]}\n".encode())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    uvicorn.Server(config).run(sockets=[socket])


if __name__ == "__main__":
    main()
