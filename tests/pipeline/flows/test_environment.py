"""PREFECT_API_URL: whatever stands there is told apart, in time, without a password in any text."""

import http.server
import threading
import time
from collections.abc import Iterator
from urllib.parse import unquote

import pytest

from pipeline.flows.environment import ANSWER_TIMEOUT_S, api_url, check_api
from stages.errors import EnvironmentFailure, InputError


class _Stranger(http.server.BaseHTTPRequestHandler):
    """Something that is not Prefect, or Prefect with a password; the first word of the path says what."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        asked = self.headers.get("Authorization", "")
        status = {"gateway": 502, "moved": 301, "missing": 404}.get(kind, 200)
        if kind == "locked" and not self.path.endswith("/health") and asked != "Basic dXNlcjpwYXNzd29yZA==":
            status = 401
        if kind == "ssh":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
            return
        if kind == "silent":
            self.server.released.wait(60)  # type: ignore[attr-defined]
            return
        self.send_response_only(status, "\x1b[31mown words")
        if kind == "moved":
            self.send_header("Location", "http://127.0.0.1:9/")
        self.end_headers()
        if self.path.endswith("/admin/version"):
            self.wfile.write(unquote(self.path.split("/")[2]).encode())
        else:
            self.wfile.write(b"<html></html>" if kind == "page" else b"true")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Stranger)
    server.released = threading.Event()  # type: ignore[attr-defined]
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.released.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("page", "answers, but not as a Prefect API;"),
        ("gateway", "answers 502 Bad Gateway;"),
        ("missing", "answers 404 Not Found;"),
        ("moved", "answers 301 Moved Permanently;"),
        ("ssh", "does not answer as a web server (BadStatusLine);"),
    ],
)
def test_what_is_no_prefect_server_is_named_in_one_line(stranger: str, kind: str, words: str):
    with pytest.raises(EnvironmentFailure) as caught:
        check_api(f"{stranger}/{kind}")
    assert f"{stranger}/{kind} {words}" in caught.value.message
    assert "(does the URL end in /api?)" in caught.value.message
    assert caught.value.message.isprintable()


def test_a_refused_connection_is_named():
    with pytest.raises(EnvironmentFailure, match=r"does not answer \(Connection refused\)"):
        check_api("http://127.0.0.1:9/api")


def test_one_that_says_nothing_is_given_up(stranger: str, monkeypatch: pytest.MonkeyPatch):
    assert ANSWER_TIMEOUT_S <= 10, "with the start of the command within 15 s"
    monkeypatch.setattr("pipeline.flows.environment.ANSWER_TIMEOUT_S", 0.3)
    started = time.monotonic()
    with pytest.raises(EnvironmentFailure, match="did not answer within 0 s"):
        check_api(f"{stranger}/silent")
    assert time.monotonic() - started < 3


def test_the_password_is_asked_for_and_taken(stranger: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    monkeypatch.delenv("PREFECT_API_KEY", raising=False)
    with pytest.raises(EnvironmentFailure, match="refuses us: set PREFECT_API_AUTH_STRING"):
        check_api(f"{stranger}/locked/%223.0.0%22/api")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "user:password")
    check_api(f"{stranger}/locked/%223.0.0%22/api")


@pytest.mark.parametrize("version", ["3.0.0", "3.99.1rc1+local", "3.9.0.dev2"])
def test_another_server_of_our_major_version_passes(stranger: str, version: str):
    check_api(f"{stranger}/server/%22{version}%22/api")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("%222.20.16%22", "runs Prefect 2.20.16, and this machine has Prefect 3."),
        ("%2210.1%22", "runs Prefect 10.1, and this machine has Prefect 3."),
        *(
            (odd, "runs Prefect a version that it does not tell, and this machine has Prefect 3.")
            for odd in ("true", "%22%22", "%22x%22", "%22%1B[31m%22", "3.8.8", "%223.8%0A%22")
        ),
    ],
)
def test_a_server_that_prefects_client_would_refuse_is_named_in_one_line(stranger: str, answer: str, told: str):
    with pytest.raises(EnvironmentFailure) as caught:
        check_api(f"{stranger}/server/{answer}/api")
    assert told in caught.value.message
    assert "run that server with prefect==3." in caught.value.message
    assert caught.value.message.isprintable()


def test_credentials_in_the_url_are_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch):
    for url in ("http://user:hunter22@head/api", "https://hunter22@head:4200/api", "http://user:hunter/22@head/api"):
        monkeypatch.setenv("PREFECT_API_URL", url)
        with pytest.raises(InputError, match="PREFECT_API_AUTH_STRING=user:password") as caught:
            api_url()
        assert "hunter" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "head",
        "ftp://head/api",
        "http://",
        "http://head:a/api",
        "http://head/api?token=hunter22",
        "http://[::1/api",
        "/api",
    ],
)
def test_what_is_no_address_is_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(EnvironmentFailure, match=r"like http://127\.0\.0\.1:4200/api, found no such address") as caught:
        api_url()
    assert "hunter" not in caught.value.message


def test_addresses_pass(monkeypatch: pytest.MonkeyPatch):
    for url in ("http://head:4200/api", "http://[::1]:4200/api", "https://runs.example/prefect/api", ""):
        monkeypatch.setenv("PREFECT_API_URL", f"{url}/" if url else "")
        assert api_url() == url
