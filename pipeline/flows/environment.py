"""The variables that Prefect reads when it is imported: private, quiet, and local to this folder.

Imports nothing of Prefect; every process that will import it goes through here first.
"""

from __future__ import annotations

import base64
import http.client
import importlib.metadata
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

from stages.contracts import expand_path
from stages.errors import EnvironmentFailure, InputError

HOST = "127.0.0.1"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STARTUP_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 10.0
"""Seconds in which a server that was up before must answer, however slowly it speaks."""
API_URL = "PREFECT_API_URL"
HOME = "PREFECT_HOME"
_CLOUD = "api.prefect.cloud"
_VERSION = re.compile(rb'"((\d{1,9})[\w.+-]*)"')
_ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[^\s?#]*)?")


def set_private(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make Prefect send nothing outside and keep its files here, in ``.prefect``; what the user has set stands."""
    environment[HOME] = str(expand_path(environment.get(HOME) or ".prefect").absolute())
    environment.setdefault("DO_NOT_TRACK", "1")
    environment.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")


def set_prefect_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make Prefect private, quiet and local to this folder; what the user has set stands.  Call before importing it."""
    set_private(environment)
    environment.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", f"{STARTUP_TIMEOUT_S:.0f}")
    # the listener writes to the terminal; Prefect's loggers still reach its API
    environment.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    environment.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


def bypass_proxy(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep requests to HOST out of a configured HTTP proxy, which could not answer those to this machine."""
    found = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    names = [name.strip() for name in found.split(",") if name.strip()]
    if HOST not in names and "*" not in names:
        names.append(HOST)
    environment["no_proxy"] = environment["NO_PROXY"] = ",".join(names)


def api_url() -> str:
    """What PREFECT_API_URL names; empty where it is not set.

    Raises:
        InputError: it holds credentials.
        EnvironmentFailure: it is no address.
    """
    url = (os.environ.get(API_URL) or "").strip().rstrip("/")
    if "@" in url:
        raise InputError(
            f"{API_URL} holds credentials, which would be printed; set PREFECT_API_AUTH_STRING=user:password"
        )
    if url and not (_ADDRESS.fullmatch(url) and url.isascii() and url.isprintable()):
        raise EnvironmentFailure(f"expected {API_URL} to be like http://127.0.0.1:4200/api, found no such address")
    return url


def check_api(url: str) -> None:
    """Make sure that a Prefect API of our version answers at ``url`` and takes our password, within ANSWER_TIMEOUT_S.

    Raises:
        EnvironmentFailure: it does not, whatever stands there instead.
    """
    found: list[str] = []
    # a thread, since no timeout of a socket ends a look-up of a name, or an answer of one byte in a while
    asking = threading.Thread(target=lambda: found.append(_ask(url)), daemon=True)
    asking.start()
    asking.join(ANSWER_TIMEOUT_S)
    problem = found[0] if found else _no_server(url, f"did not answer within {ANSWER_TIMEOUT_S:.0f} s")
    if problem:
        raise EnvironmentFailure(problem)


def _no_server(url: str, problem: str) -> str:
    return (
        f"no Prefect server answers there: {url} {problem}; start it (wsss up), correct {API_URL} (does the URL "
        "end in /api?), or unset it"
    )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A password goes to nobody but the server that was named."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:  # noqa: ANN401
        """Follow none."""


def _ask(url: str) -> str:
    """What is wrong with the answers at ``url``, and what to do; empty when nothing is."""
    is_local = urlsplit(url).hostname in LOOPBACK
    # a configured proxy cannot answer for this machine
    handlers = [_NoRedirect(), *([urllib.request.ProxyHandler({})] if is_local else [])]
    opener = urllib.request.build_opener(*handlers)
    headers = {"Content-Type": "application/json"}
    if words := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(words.encode()).decode()}"
    elif words := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {words}"
    try:
        with opener.open(f"{url}/health", timeout=ANSWER_TIMEOUT_S) as answer:
            if answer.read(64).strip() != b"true":
                return _no_server(url, "answers, but not as a Prefect API")
    except urllib.error.HTTPError as error:
        known = {status.value: f" {status.phrase}" for status in http.HTTPStatus}
        return _no_server(url, f"answers {error.code}{known.get(error.code, '')}")
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or type(error.reason).__name__
        return _no_server(url, f"does not answer ({reason})")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return _no_server(url, f"does not answer as a web server ({type(error).__name__})")
    try:  # health is told to everybody
        opener.open(urllib.request.Request(f"{url}/flows/count", b"{}", headers), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            remedy = "set PREFECT_API_AUTH_STRING to what the server has in PREFECT_SERVER_API_AUTH_STRING"
            return _no_server(url, f"refuses us: {remedy}")
    return _ask_version(url, opener, headers)


def _ask_version(url: str, opener: urllib.request.OpenerDirector, headers: dict[str, str]) -> str:
    """Why Prefect's client would refuse the server's version, in words with a remedy; empty where it would not."""
    ours = importlib.metadata.version("prefect")
    if urlsplit(url).hostname == _CLOUD:  # which answers every client
        return ""
    try:
        with opener.open(
            urllib.request.Request(f"{url}/admin/version", None, headers), timeout=ANSWER_TIMEOUT_S
        ) as tell:
            found = _VERSION.fullmatch(tell.read(64).strip())
    except (OSError, ValueError, http.client.HTTPException):
        found = None
    theirs = found[1].decode() if found else "a version that it does not tell"
    if found and int(found[2]) == int(ours.partition(".")[0]):
        return ""
    return (
        f"{url} runs Prefect {theirs}, and this machine has Prefect {ours}: their major versions must be the same; "
        f"run that server with prefect=={ours}, or use one that wsss up starts: correct {API_URL}, or unset it"
    )
