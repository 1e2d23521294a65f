"""An export is sent to a hub: a stand-in on loopback that speaks the few requests of the client."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from pipeline.cli.main import main
from stages.contracts import SilentProgress
from stages.scoring.export import export_segmenter
from stages.scoring.prediction import PredictionConfig
from tests.stages.trained_nets import save_lively_segmenter


class Hub(BaseHTTPRequestHandler):
    """Repositories that are made, files that are committed; a token that is not good is refused."""

    files: dict[str, bytes]
    made: list[dict[str, object]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer good":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            return self.answer(200, {"url": f"{self.base}/owner/cats", "name": "owner/cats", "id": "1"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if "/commit/main" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                200, {"commitUrl": f"{self.base}/owner/cats/commit/1", "commitOid": "1", "success": True}
            )
        return self.answer(404, {})

    def do_GET(self) -> None:
        self.answer(200, {"id": "owner/cats", "sha": "0", "siblings": [], "private": False, "tags": [], "downloads": 0})

    def answer(self, code: int, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.files, Hub.made = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "good")
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    trained, out = save_lively_segmenter(tmp_path / "trained"), tmp_path / "exported"
    options = PredictionConfig()
    export_segmenter(trained, out, prediction=options, provenance={}, progress=SilentProgress(), onnx=False)
    return out


def test_the_files_of_the_export_and_no_others_arrive(hub: type[Hub], exported: Path, capsys) -> None:
    (exported / "secret.txt").write_text("not of the export")
    assert main(["push", str(exported), "owner/cats", "--private"]) == 0
    assert "/owner/cats" in capsys.readouterr().out
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors"}
    assert all(data == (exported / name).read_bytes() for name, data in hub.files.items())
    assert hub.made[0].get("private") is True or hub.made[0].get("visibility") == "private"


@pytest.mark.parametrize("name", ["cats", "a/b/c", "owner/--", "owner/a b"])
def test_a_name_that_cannot_be_is_refused(hub: type[Hub], exported: Path, name: str, capsys) -> None:
    assert main(["push", str(exported), name]) == 2
    assert "expected a repository as OWNER/NAME" in capsys.readouterr().err
    assert hub.files == {}


def test_a_token_that_is_not_good_says_what_to_do(hub: type[Hub], exported: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert main(["push", str(exported), "owner/cats"]) == 2
    text = capsys.readouterr().err
    assert "hf auth login" in text
    assert "bad" not in text.replace("bad_", "")
    assert hub.files == {}


def test_a_damaged_export_and_a_folder_that_is_none_are_not_sent(
    hub: type[Hub], exported: Path, tmp_path, capsys
) -> None:
    (exported / "model.safetensors").write_bytes(b"x")
    assert main(["push", str(exported), "owner/cats"]) == 4
    assert "is damaged" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "owner/cats"]) == 2
    assert hub.made == []


def test_a_hub_that_is_away(exported: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "good")
    assert main(["push", str(exported), "owner/cats"]) == 4
    assert "cannot be reached" in capsys.readouterr().err
