"""The reports folder over HTTP: its files, and nothing else of the machine."""

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.flows.files_server import FilesServer, resolve


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("files")
    folder = home / "artifacts" / "reports"
    (folder / "pictures").mkdir(parents=True)
    (folder / "demo-1.html").write_text("<p>mIoU</p>")
    (folder / "pictures" / "a b.png").write_bytes(b"png")
    (home / "artifacts" / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(home / "artifacts" / "secret.txt")
    (folder / "inside.html").symlink_to(folder / "demo-1.html")
    return folder


@pytest.fixture(scope="module")
def server(reports: Path) -> Iterator[FilesServer]:
    with FilesServer(reports, 0) as server:
        server.start()
        yield server
        server.shutdown()


def ask(server: FilesServer, target: str, method: str = "GET", **headers: str) -> tuple[int, bytes, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        connection.request(method, target, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheader("Content-Type")
    finally:
        connection.close()


def test_a_report_opens(server: FilesServer):
    assert ask(server, "/demo-1.html") == (200, b"<p>mIoU</p>", "text/html")
    assert ask(server, "/demo-1.html?x=1#top")[0] == 200
    assert ask(server, "/pictures/a%20b.png") == (200, b"png", "image/png")
    assert ask(server, "/demo-1.html", "HEAD") == (200, b"", "text/html")
    assert ask(server, "/inside.html")[0] == 200


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/pictures",
        "/pictures/",
        "/none.html",
        "/link.txt",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/pictures/..%2f..%2fsecret.txt",
        "//etc/passwd",
        "/%2Fetc/passwd",
        "/demo-1.html%00.png",
        "/" + "a" * 5000,
    ],
)
def test_nothing_else_does(server: FilesServer, target: str):
    status, body, _ = ask(server, target)
    assert status == 404
    assert b"secret" not in body
    assert b"root:" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_is_written(server: FilesServer, reports: Path, method: str):
    assert ask(server, "/demo-1.html", method)[0] == 501
    assert (reports / "demo-1.html").read_text() == "<p>mIoU</p>"


def test_a_page_that_gave_its_own_name_this_address_is_refused(server: FilesServer):
    assert ask(server, "/demo-1.html", Host="evil.example:4201")[0] == 403
    assert ask(server, "/demo-1.html", Host="localhost:4201")[0] == 200


def test_a_folder_that_is_not_there_yet(tmp_path: Path):
    assert resolve(tmp_path / "none", "/demo-1.html") is None
