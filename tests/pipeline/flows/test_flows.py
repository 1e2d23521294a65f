"""The Prefect flow with an embedded server: what its UI shows of a first run, a cached run and a failure."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.flows.embedded_server import embedded_server
from pipeline.flows.environment import bypass_proxy, set_prefect_environment
from stages.errors import EnvironmentFailure
from tests.pipeline.engine.fake_trackers import write_fake_trackers
from tests.pipeline.flows.clusters import wait_until
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

ROOT = Path(__file__).parents[3]
STAGES = ["prepare_data", "train_classifier", "make_attention", "make_masks", "train_segmenter", "evaluate"]

# workers: 2 is on purpose: inside a Prefect process every forked child dies, so this fails unless stages have their own
CONFIG = tiny_yaml(runtime={"workers": 2})


@dataclass
class Recorded:
    """What two processes left behind."""

    first: dict
    """The JSON document of ``wsss run --engine prefect``."""
    scenario: dict
    servers_left: list[int]
    points: list[list]
    """Tag, value and step of what the first run told its tracker."""


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("flow")
    (folder / "tiny.yaml").write_text(CONFIG)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    write_fake_trackers(folder / "fakes")
    environment |= {"PYTHONPATH": f"{folder / 'fakes'}:{ROOT}", "PREFECT_HOME": str(folder / "home")}

    def run(*words: str) -> dict:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    tracked = ("--set", "track=[tensorboard]")
    first = run("-m", "pipeline.cli.main", "run", "tiny.yaml", "--engine", "prefect", "--json", *tracked)
    (points,) = (folder / "artifacts" / "tensorboard").glob("*/points.jsonl")
    scenario = run(str(Path(__file__).with_name("flow_scenario.py")))
    written = [json.loads(line) for line in points.read_text().splitlines()]
    return Recorded(first, scenario, servers_of(folder / "home"), written)


def servers_of(home: Path) -> list[int]:
    """Embedded servers that still run with ``home``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = entry.read_bytes()
            words = entry.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if f"PREFECT_HOME={home}".encode() in variables and b"pipeline.flows.server" in words:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.prefect
def test_a_first_run_shows_six_task_runs_with_the_stages_names(recorded: Recorded):
    assert [stage["state"] for stage in recorded.first["stages"]] == ["built"] * 6
    assert [stage["stage"] for stage in recorded.first["stages"]] == STAGES
    assert 0 <= recorded.first["metrics"]["segmenter.miou"] <= 1
    run = recorded.scenario["runs"][0]
    assert run["state"] == "Completed"
    assert [name for name, *_ in run["tasks"]] == STAGES
    assert [state for _, state, _ in run["tasks"]] == ["Completed"] * 6
    assert run["parameters"]["config"] == "tiny.yaml"
    assert run["tasks"][5][2] == recorded.first["stages"][5]["path"]
    assert any(line.startswith("evaluate: built in") for line in run["logs"]), "the runs' own logs reach the server"


@pytest.mark.prefect
def test_trackers_follow_a_run_of_prefects_engine(recorded: Recorded):
    tags = {tag for tag, *_ in recorded.points}
    assert {"train_classifier/loss", "train_segmenter/loss", "segmenter.miou"} <= tags
    assert recorded.points[-1][0] == "closed"


@pytest.mark.prefect
def test_a_second_run_shows_six_cached_states(recorded: Recorded):
    assert recorded.scenario["cached"] == ["cached"] * 6
    run = recorded.scenario["runs"][1]
    assert [[name, state] for name, state, _ in run["tasks"]] == [[stage, "Cached"] for stage in STAGES]


@pytest.mark.prefect
def test_a_failure_says_first_what_to_do_and_keeps_its_type(recorded: Recorded):
    assert recorded.scenario["failed"] == {"message": "remove the damaged images", "problems": ["a.jpg: truncated"]}
    run = recorded.scenario["runs"][2]
    assert run["tasks"] == [["make_masks", "Failed", "remove the damaged images\n  - a.jpg: truncated"]]
    assert run["state"] == "Failed"


@pytest.mark.prefect
def test_a_wrong_config_fails_the_flow_before_any_task(recorded: Recorded):
    assert "no_such_config.yaml" in recorded.scenario["refused"]
    run = recorded.scenario["runs"][3]
    assert (run["state"], run["tasks"]) == ("Failed", [])
    assert recorded.scenario["refused"] in run["message"]


@pytest.mark.prefect
def test_a_run_that_crashed_three_times_is_given_up_in_one_line(recorded: Recorded):
    assert recorded.scenario["given up"].startswith("FAILED given up: this is start 4 of a run that ended 3 times")
    assert "\n" not in recorded.scenario["given up"]
    assert recorded.scenario["runs"][4]["tasks"] == []


@pytest.mark.prefect
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_embedded_server_is_left(recorded: Recorded):
    assert recorded.servers_left == []


# -- without a server -------------------------------------------------------------------------------------------------


def test_prefect_is_private_and_local_unless_the_user_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    environment = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "DEBUG"}
    set_prefect_environment(environment)
    assert environment["PREFECT_HOME"] == str(tmp_path / ".prefect")
    assert environment["DO_NOT_TRACK"] == "1"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] == "120"
    assert environment["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] == "DEBUG"


@pytest.mark.parametrize(
    ("found", "expected"),
    [({}, "127.0.0.1"), ({"NO_PROXY": "a.org, b.org"}, "a.org,b.org,127.0.0.1"), ({"no_proxy": "*"}, "*")],
)
def test_a_proxy_does_not_stand_between_a_run_and_its_own_server(found: dict[str, str], expected: str):
    environment = {"http_proxy": "http://proxy.example:3128", **found}
    bypass_proxy(environment)
    assert environment["no_proxy"] == environment["NO_PROXY"] == expected


def test_a_home_that_cannot_be_written_is_a_failure_of_the_machine(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(EnvironmentFailure, match=r"PREFECT_HOME .*file.* cannot be written"),
        embedded_server(tmp_path / "file"),
    ):
        pass


@pytest.fixture
def own_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server is configured, and none stays so."""
    for name in ("PREFECT_API_URL", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")


def fake_uvicorn(folder: Path, text: str) -> str:
    """A PYTHONPATH on which uvicorn is ``text``."""
    (folder / "uvicorn.py").write_text(text)
    return os.pathsep.join([str(folder), str(ROOT)])


@pytest.mark.usefixtures("own_url")
def test_a_server_that_dies_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = "raise ImportError(\"Body() got an unexpected keyword argument 'min_items'\")"
    monkeypatch.setenv("PYTHONPATH", fake_uvicorn(tmp_path, broken))
    with (
        pytest.raises(EnvironmentFailure, match=r"(?s)ended with code 1: see .*--engine local.*unexpected keyword"),
        embedded_server(tmp_path / "home") as wait,
    ):
        wait()
    assert "PREFECT_API_URL" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_server_does_not_outlive_a_killed_run(tmp_path: Path):
    server = "class Config:\n    def __init__(*_, **__): ...\nclass Server(Config):\n    def run(self, sockets):\n"
    home = tmp_path / "home"
    begin = (
        "import os, sys, time, pathlib; from pipeline.flows.embedded_server import embedded_server\n"
        "with embedded_server(pathlib.Path(os.environ['PREFECT_HOME'])): print(flush=True), time.sleep(60)"
    )
    path = fake_uvicorn(tmp_path, f"{server}        import time; time.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": path, "PREFECT_HOME": str(home)}
    run = subprocess.Popen([sys.executable, "-P", "-c", begin], stdout=subprocess.PIPE, env=environment)
    assert run.stdout is not None
    run.stdout.readline()
    wait_until(lambda: servers_of(home), "there is a server", seconds=10)
    run.kill()
    run.communicate()
    wait_until(lambda: not servers_of(home), "the server has ended", seconds=10)
