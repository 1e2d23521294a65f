"""Prefect's server as we start it: ``python -m pipeline.flows.server --host 127.0.0.1 --port 4200``.

Whoever may talk to it can start runs, and so programs of this user.  Prefect's own start lets every web page do so: a
page may send requests to this machine, and one whose name is bound to this machine's address (DNS rebinding) may read
the answers too.  So a guard stands before Prefect's application, and the database is for this user's eyes only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.flows.environment import HOST, LOOPBACK, set_private

STOP_TIMEOUT_S = 10.0
"""Seconds that a server has to end once its parent has ended."""
ORIGINS = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
_MAPPED = "::ffff:"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application that refuses what does not come from its own pages or a program, and lets the rest through.

    A ``Host`` must name the address that the connection came to, this machine by its name, or an origin that was
    allowed; an ``Origin`` must be such a host's.  Programs send none.  What a browser sends without one (images,
    scripts) it marks by ``Sec-Fetch-Site``; of that, only a link that is followed passes.
    """

    def __init__(self, app: Application, origins: Iterable[str] = ()) -> None:
        """Guard ``app``; ``origins`` are further ones, as ``http://name:port``.  ``*`` allows none."""
        self._app = app
        self._origins = {origin.strip().rstrip("/").lower() for origin in origins} - {"", "*"}
        self._hosts = {urlsplit(origin).netloc for origin in self._origins}
        self._names = {socket.gethostname().lower(), socket.gethostname().lower().partition(".")[0]}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or WebSocket."""
        refusal = self.refuse(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: a browser sees 403
        else:
            status, detail = refusal
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})

    def refuse(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason where the request is not for this server or not from its pages; None where it may pass."""
        found: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").lower())
        hosts, origins = found.get("host", []), found.get("origin", [])
        if len(hosts) != 1 or hosts[0] not in self._hosts | self._own_hosts(scope):
            return 400, f"this server does not go by that Host; allow http://HOST:PORT in its {ORIGINS}"
        if origins:
            own = {f"http://{hosts[0]}", f"https://{hosts[0]}"}
            if len(origins) == 1 and origins[0] in own | self._origins:
                return None
            return 403, f"no page of another origin may use this server; allow its origin in {ORIGINS}"
        is_link = scope.get("method") == "GET" and found.get("sec-fetch-mode") == ["navigate"]
        if not is_link and not set(found.get("sec-fetch-site", [])) <= {"same-origin", "none"}:
            return 403, "no page of another site may use this server"
        return None

    def _own_hosts(self, scope: Scope) -> set[str]:
        """What a client may call the address that this connection came to."""
        address, port = scope["server"] or ("", 0)
        address = address.lower().removeprefix(_MAPPED)
        names = {address, *self._names} | (set(LOOPBACK) if address in LOOPBACK else set())
        names = {f"[{name}]" if ":" in name else name for name in names}
        return {f"{name}:{port}" for name in names} | (names if port == 80 else set())


def make_app() -> Application:
    """Prefect's application behind a guard, with Prefect's settings."""
    from prefect.server.api.server import create_app
    from prefect.settings import PREFECT_SERVER_CORS_ALLOWED_ORIGINS

    return Guard(create_app(final=True), PREFECT_SERVER_CORS_ALLOWED_ORIGINS.value().split(","))


def _hide_database() -> None:
    """Let nobody but this user read the database that is there, nor any file that this process will make."""
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
    from sqlalchemy import make_url

    os.umask(0o077)
    url = make_url(PREFECT_API_DATABASE_CONNECTION_URL.value())
    if url.get_backend_name() == "sqlite" and url.database:
        for end in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(OSError):
                Path(url.database + end).chmod(0o600)


def _end_with_parent() -> None:
    """Ask this process to end when its stdin does, and end it when it does not."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_TIMEOUT_S / 2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Serve until SIGTERM, or with ``--descriptor`` on that socket until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.flows.server", description="Prefect's server, guarded.")
    parser.add_argument("--host", default=HOST, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=4200, help="port to listen on (%(default)s)")
    parser.add_argument("--descriptor", type=int, help="number of an open socket to use; ends when stdin ends")
    call = parser.parse_args()
    if call.descriptor is not None:
        _end_with_parent()
    set_private()

    import uvicorn
    from prefect.settings import PREFECT_SERVER_API_KEEPALIVE_TIMEOUT, PREFECT_SERVER_LOGGING_LEVEL

    try:
        from pipeline.flows.handshakes import CheckedHandshake as protocol
    except ImportError:  # another uvicorn, which has another protocol
        protocol = "auto"
    _hide_database()
    config = uvicorn.Config(
        make_app(),
        host=call.host,
        port=call.port,
        lifespan="on",
        ws=protocol,
        log_level="error" if call.descriptor is not None else PREFECT_SERVER_LOGGING_LEVEL.value().lower(),
        timeout_keep_alive=PREFECT_SERVER_API_KEEPALIVE_TIMEOUT.value(),
        timeout_graceful_shutdown=2 if call.descriptor is not None else None,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=call.descriptor)] if call.descriptor is not None else None)


if __name__ == "__main__":
    main()
