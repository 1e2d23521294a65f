"""Prefect's server as we start it: what a browser page, a rebound name and hostile requests get from it."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.flows.server import Guard
from tests.pipeline.flows.clusters import environment, wait_until

# -- the rule ---------------------------------------------------------------------------------------------------------


async def _nothing(*_: object) -> None:
    raise AssertionError("only the rule is asked")


def refusal(
    *origins: str, at: tuple[str, int] = ("127.0.0.1", 4200), method: str = "POST", **headers: str
) -> int | None:
    """Status of a refusal, None where the request passes; ``sec_fetch_site`` is the header Sec-Fetch-Site."""
    encoded = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    found = Guard(_nothing, origins).refuse({"type": "http", "method": method, "server": at, "headers": encoded})
    return found[0] if found else None


@pytest.mark.parametrize("host", ["127.0.0.1:4200", "localhost:4200", "LOCALHOST:4200", "[::1]:4200"])
def test_a_program_on_this_machine_passes(host: str):
    assert refusal(host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:4200",
        "127.0.0.1",
        "127.0.0.1:4201",
        "127.0.0.1.evil.example:4200",
        "0.0.0.0:4200",
        "localhost:4200@evil.example",
        "user@localhost:4200",
        "[::1",
        "localhost:4200, evil",
        "",
        "\x1b[31m",
        "\xff",
    ],
)
def test_another_host_is_refused(host: str):
    assert refusal(host=host) == 400


def test_two_hosts_and_none_are_refused():
    scope = {"type": "http", "method": "GET", "server": ("127.0.0.1", 4200)}
    guard = Guard(_nothing)
    for hosts in ([], [b"localhost:4200", b"evil.example"], [b"localhost:4200", b"localhost:4200"]):
        found = guard.refuse({**scope, "headers": [(b"host", host) for host in hosts]})
        assert found is not None
        assert found[0] == 400


def test_the_host_is_the_address_that_the_connection_came_to():
    lan = ("10.0.0.1", 4200)
    assert refusal(at=lan, host="10.0.0.1:4200") is None
    assert refusal(at=lan, host="localhost:4200") == 400, "localhost is not how one reaches that address"
    assert refusal(at=lan, host=f"{socket.gethostname()}:4200") is None
    assert refusal(at=("::ffff:10.0.0.1", 4200), host="10.0.0.1:4200") is None
    assert refusal(at=("127.0.0.1", 80), host="localhost") is None, "a browser leaves the usual port away"
    assert refusal("https://runs.example", at=lan, host="runs.example") is None, "behind a proxy, named"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8888", "http://localhost", ""])
def test_a_page_of_another_origin_is_refused(origin: str):
    assert refusal("*", host="127.0.0.1:4200", origin=origin) == 403, "a star allows nobody"


def test_the_servers_own_pages_and_named_origins_pass():
    assert refusal(host="127.0.0.1:4200", origin="http://127.0.0.1:4200") is None
    assert refusal("http://localhost:4200", host="127.0.0.1:4200", origin="http://localhost:4200") is None
    assert refusal(host="127.0.0.1:4200", origin="http://localhost:4200") == 403


def test_without_an_origin_the_browsers_mark_decides():
    assert refusal(host="127.0.0.1:4200", sec_fetch_site="cross-site", sec_fetch_mode="no-cors") == 403
    assert refusal(host="127.0.0.1:4200", sec_fetch_site="same-site", sec_fetch_mode="no-cors", method="GET") == 403
    assert refusal(host="127.0.0.1:4200", sec_fetch_site="cross-site", sec_fetch_mode="navigate") == 403, "a form"
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "method": "GET"}
    assert refusal(host="127.0.0.1:4200", **link) is None, "a link to a run in a mail"
    assert refusal(host="127.0.0.1:4200", sec_fetch_site="same-origin", sec_fetch_mode="cors") is None
    assert refusal(host="127.0.0.1:4200", sec_fetch_site="none", sec_fetch_mode="navigate") is None


# -- a real server ----------------------------------------------------------------------------------------------------


class Server:
    """``python -m pipeline.flows.server`` with its files in ``home``."""

    def __init__(self, home: Path) -> None:
        self.home, self.log = home, home / "server.log"
        with socket.socket() as listener, self.log.open("wb") as output:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
            number = listener.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.flows.server", "--descriptor", str(number)],
                env=environment(PREFECT_HOME=str(home), PREFECT_API_BLOCKS_REGISTER_ON_START="false"),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[number],
            )

    def send(self, raw: bytes) -> bytes:
        """The answer to bytes, until the server closes or is silent for a moment."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(raw)
            try:
                while data := connection.recv(65536):
                    answer += data
            except OSError:
                pass
        return answer

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Status and whole answer; ``Host`` is ours unless it is given."""
        found = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(body)), "Connection": "close", **headers}
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in found.items())
        answer = self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        return int(answer.split()[1]), answer

    def is_up(self) -> bool:
        try:
            return self.ask("GET", "/api/health")[0] == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    (home / "prefect.db").touch(0o644)  # of a server that was started by other means
    found = Server(home)
    try:
        wait_until(found.is_up, "the server answers", seconds=120)
        yield found
    finally:
        assert found.process.stdin is not None
        found.process.stdin.close()
        found.process.wait(30)


EVIL = "http://evil.example"


@pytest.mark.slow
@pytest.mark.prefect
@pytest.mark.parametrize("origin", [EVIL, "null", "http://localhost:1"])
def test_what_a_page_sends_without_asking_changes_nothing(server: Server, origin: str):
    """A form or a no-cors fetch: the browser sends it at once, and Prefect's API takes it whatever its type."""
    flow = json.dumps({"name": "planted"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json"):
        status, answer = server.ask("POST", "/api/flows/", flow, Origin=origin, Content_Type=kind)
        assert status == 403
        assert b"access-control-allow-origin" not in answer.lower()
    assert server.ask("POST", "/api/flows/filter", b"{}", Content_Type="application/json")[1].endswith(b"[]")


@pytest.mark.slow
@pytest.mark.prefect
def test_a_page_is_not_told_that_it_may(server: Server):
    ask = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    status, answer = server.ask("OPTIONS", "/api/flows/filter", Origin=EVIL, **ask)
    assert status == 403
    assert b"access-control-allow" not in answer.lower()
    status, answer = server.ask("POST", "/api/flows/filter", b"{}", Host=f"evil.example:{server.port}", Origin=EVIL)
    assert status == 400, "a rebound name"
    assert b"[]" not in answer


@pytest.mark.slow
@pytest.mark.prefect
def test_a_page_gets_no_web_socket(server: Server):
    shake = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    shake["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    assert server.ask("GET", "/api/events/out", Origin=EVIL, **shake)[0] == 403
    assert server.ask("GET", "/api/events/out", **shake)[0] == 101, "a program does"


@pytest.mark.slow
@pytest.mark.prefect
def test_hostile_hosts_leave_no_traceback_and_the_server_up(server: Server):
    hosts = [b"[::1", b"[", b"]:", b"%00", b"\xff\xfe", b"\x1b[31m", b"a" * 9000, b"http://x", b"a b", b"", b"::::"]
    for host in hosts:
        answer = server.send(b"GET /api/health HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        assert answer.split()[1] == b"400"
    assert server.send(b"GET /api/health HTTP/1.0\r\n\r\n").split()[1] == b"400"
    assert server.is_up()
    assert b"Traceback" not in server.log.read_bytes()


@pytest.mark.slow
@pytest.mark.prefect
def test_malformed_handshakes_get_a_plain_error_at_once_and_leave_no_traceback(server: Server):
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    upgrade, key, version = (
        "Upgrade: websocket\r\nConnection: Upgrade\r\n",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        "Sec-WebSocket-Version: 13\r\n",
    )
    shake = host + upgrade + key + version
    get = "GET /api/events/out HTTP/1.1\r\n"
    malformed = {
        "no key": get + host + upgrade + version,
        "a short key": get + host + upgrade + version + "Sec-WebSocket-Key: x\r\n",
        "two keys": get + shake + key,
        "no version": get + host + upgrade + key,
        "an old version": get + host + upgrade + key + "Sec-WebSocket-Version: 8\r\n",
        "odd protocols": get + shake + "Sec-WebSocket-Protocol: ,,,\r\n",
        "odd extensions": get + shake + "Sec-WebSocket-Extensions: ;;;\r\n",
        "a version in no ASCII": get + host + upgrade + key + "Sec-WebSocket-Version: \xff\r\n",
        **{
            f"{name} in no ASCII": get + shake + f"{name}: Upgrade, \xff\r\n"
            for name in ("Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions", "Connection")
        },
        "a key in no ASCII": get + host + upgrade + version + "Sec-WebSocket-Key: \xff\xfe\r\n",
        **{f"{method} upgrades": get.replace("GET", method) + shake for method in ("POST", "HEAD", "OPTIONS", "PUT")},
        "a body": get + shake + "Content-Length: 3\r\n\r\nabc",
        "a body that does not come": get + shake + "Content-Length: 3\r\n",
        "chunks": get + shake + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
        "a long header": get + shake + f"X: {'a' * 9000}\r\n",
        "a very long header": get + shake + f"X: {'a' * 200_000}\r\n",
        "many headers": get + shake + "".join(f"X{number}: a\r\n" for number in range(300)),
        "control characters": get + shake + "X: a\x01b\r\n",
        "a long path": get.replace("out", "a" * 9000) + shake,
        "no path": "GET  HTTP/1.1\r\n" + shake,
    }
    for what, request in malformed.items():
        begun = time.monotonic()
        answer = server.send(f"{request}\r\n".encode("latin-1"))
        assert answer.split(b" ")[:2] in ([b"HTTP/1.1", b"400"], [b"HTTP/1.1", b"426"]), what
        assert time.monotonic() - begun < 8, f"{what}: the connection is closed, not given up"
    assert b"101 Switching" in server.send(f"{get}{shake}\r\n".encode()), "a program that speaks well is let in"
    assert server.is_up()
    assert b"Traceback" not in server.log.read_bytes()


@pytest.mark.slow
@pytest.mark.prefect
def test_only_this_user_reads_the_database(server: Server):
    server.ask("POST", "/api/flows/", b'{"name": "mine"}', Content_Type="application/json")
    files = list(server.home.glob("prefect.db*"))
    assert {file.name for file in files} >= {"prefect.db", "prefect.db-wal", "prefect.db-shm"}
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in files} == {"0o600"}


CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)
PAGE = """<script>
const to = "http://127.0.0.1:PORT/api/flows/", body = JSON.stringify({name: "planted"});
Promise.allSettled([
  fetch(to, {method: "POST", mode: "no-cors", headers: {"Content-Type": "text/plain"}, body}),
  fetch(to, {method: "POST", headers: {"Content-Type": "application/json"}, body}).then(answer => answer.text()),
  fetch(to + "filter", {method: "POST", body: "{}"}).then(answer => answer.text()),
]).then(all => document.title = all.map(each => each.status + ":" + typeof each.value).join(" "));
</script>"""


@pytest.mark.slow
@pytest.mark.prefect
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; the requests that it would send are tested above")
def test_a_page_in_a_real_browser_plants_and_reads_nothing(server: Server, tmp_path: Path):
    (tmp_path / "page.html").write_text(PAGE.replace("PORT", str(server.port)))
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    command = [str(CHROMIUM), *words, "--virtual-time-budget=5000", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ))
    assert "fulfilled:object rejected:undefined rejected:undefined" in done.stdout
    found = server.ask("POST", "/api/flows/filter", b"{}", Content_Type="application/json")[1]
    assert b"planted" not in found
