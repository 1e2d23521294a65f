"""Serve the store's ``reports`` folder to this machine's browser, so that links in Prefect's UI open.

Reads files of that folder and nothing else: no listing, no way out by dots or links, no writing, no other host.
"""

from __future__ import annotations

import contextlib
import mimetypes
import shutil
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from pipeline.flows.environment import HOST, LOOPBACK

DEFAULT_PORT = 4201


def resolve(folder: Path, target: str) -> Path | None:
    """The regular file that ``target``, the path of a request, names inside ``folder``; None when there is none."""
    with contextlib.suppress(OSError, ValueError):
        root = folder.resolve()
        path = (root / unquote(urlsplit(target).path).lstrip("/")).resolve(strict=True)
        if path.is_relative_to(root) and path.is_file():
            return path
    return None


class FilesServer(ThreadingHTTPServer):
    """Serves one folder on the loopback interface, in a thread."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        """Listen on ``port``; the folder need not exist yet.

        Raises:
            OSError: the port is taken.
        """
        super().__init__((HOST, port), _Handler)
        self.folder = folder

    @property
    def url(self) -> str:
        """Under which the folder's files are."""
        return f"http://{HOST}:{self.server_address[1]}"

    def start(self) -> None:
        """Serve until the process ends or ``shutdown`` is called."""
        threading.Thread(target=self.serve_forever, daemon=True, name="files").start()


class _Handler(BaseHTTPRequestHandler):
    server: FilesServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "wsss", ""

    def do_GET(self) -> None:
        """Send a file."""
        file = self._begin()
        if file is not None:
            with file, contextlib.suppress(ConnectionError):
                shutil.copyfileobj(file, self.wfile)

    def do_HEAD(self) -> None:
        """Say what GET would send."""
        file = self._begin()
        if file is not None:
            file.close()

    def _begin(self) -> BinaryIO | None:
        # a page elsewhere may give its own name this address; the browser then says that name
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in LOOPBACK:
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        path = resolve(self.server.folder, self.path)
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        file = path.open("rb")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", mimetypes.guess_type(path.name)[0] or "application/octet-stream")
        self.send_header("Content-Length", str(path.stat().st_size))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        return file

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the supervisor's log is for what it did."""
