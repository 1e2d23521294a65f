"""``wsss run --engine prefect``: the flow in this process, with a server of its own where none is configured.

Prefect would start one by itself, but that outlives a ``kill -9`` of the run.  This one ends with its parent however
that ends, starts while the parent imports Prefect, and is stopped only after every task run has been recorded.
Its database stays in PREFECT_HOME (``./.prefect``): a later server there shows the finished runs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from filelock import FileLock

from pipeline.engine.outcomes import RunOutcome
from pipeline.engine.spawn import PYTHON, find_our_code
from pipeline.flows.environment import (
    API_URL,
    HOST,
    STARTUP_TIMEOUT_S,
    api_url,
    bypass_proxy,
    check_api,
    set_prefect_environment,
)
from pipeline.flows.server import ORIGINS, STOP_TIMEOUT_S
from stages.errors import EnvironmentFailure

_SERVER_ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}
"""What Prefect itself gives to its temporary server, and no block types."""


@contextlib.contextmanager
def prepared_flow() -> Iterator[Callable[..., RunOutcome]]:
    """``flows.run_flow``, when Prefect is imported and a server answers: that of PREFECT_API_URL, or one of our own.

    Raises:
        InputError: PREFECT_API_URL holds credentials.
        EnvironmentFailure: no Prefect API answers there, or our own server did not come up.
    """
    set_prefect_environment()
    url = api_url()
    if url:
        check_api(url)
    is_own = not url
    with embedded_server(Path(os.environ["PREFECT_HOME"])) if is_own else contextlib.nullcontext() as wait:
        from pipeline.flows.flows import run_flow  # takes seconds, in which the server starts too

        if wait is not None:
            wait()
        yield partial(run_flow, is_server_ending=is_own)


@contextlib.contextmanager
def embedded_server(home: Path) -> Iterator[Callable[[], None]]:
    """A server whose database is in ``home`` and which PREFECT_API_URL names; yields what waits until it answers.

    Raises:
        EnvironmentFailure: PREFECT_HOME cannot be written, or the server died or did not answer in time.
    """
    log = home / "embedded-server.log"
    lock = FileLock(home / "embedded-server.lock")
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind((HOST, 0))
        url = f"http://{HOST}:{listener.getsockname()[1]}/api"
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock.acquire()  # two new servers must not migrate one database at the same time
            stack.callback(lock.release)
            output = stack.enter_context(log.open("wb"))
        except OSError as error:
            raise EnvironmentFailure(f"PREFECT_HOME {home} cannot be written ({error.strerror})") from error
        process = subprocess.Popen(
            [*PYTHON, "-m", "pipeline.flows.server", "--descriptor", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for the run, which still has to tell the server
            env=find_our_code() | _SERVER_ENVIRONMENT | {ORIGINS: url.removesuffix("/api")},
        )

        def wait() -> None:
            end = time.monotonic() + STARTUP_TIMEOUT_S
            while not _is_healthy(url):
                code = process.poll()
                if code is not None or time.monotonic() > end:
                    late = f"did not answer within {STARTUP_TIMEOUT_S:.0f} s"
                    what = late if code is None else f"ended with code {code}"
                    raise EnvironmentFailure(
                        f"Prefect's embedded server {what}: see {log}, check the pins with `wsss doctor`, "
                        "or run without a server: --engine local",
                        log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:],
                    )
                time.sleep(0.05)
            lock.release()

        os.environ[API_URL] = url
        bypass_proxy()
        try:
            yield wait
        finally:
            # what Prefect sends in the background must go before its server does: else this process waits for it
            senders = {"prefect.logging.handlers": "APILogWorker", "prefect.events.worker": "EventsWorker"}
            for module in senders.keys() & sys.modules.keys():
                getattr(sys.modules[module], senders[module]).drain_all(timeout=5.0)
            os.environ.pop(API_URL, None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=STOP_TIMEOUT_S)  # closes its stdin
            process.kill()
            process.wait()


def _is_healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5.0) as answer:
        return answer.status == 200
    return False
