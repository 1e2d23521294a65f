"""``wsss up`` and ``wsss down``: the state file, whose server, what it must know; and once all of it for real."""

import http.server
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.flows import cluster_server, supervisor
from pipeline.flows.cluster_down import down
from pipeline.flows.cluster_server import check_database_url, count_locked, find_server, reachable, start_server
from pipeline.flows.cluster_setup import describe_automation, set_up_automation, set_up_pool
from pipeline.flows.cluster_state import ClusterState, Component, changing, one_command, read_state, write_state
from pipeline.flows.cluster_workers import MARK, describe_worker, end_worker, find_runs, mark
from pipeline.flows.prefect_api import ApiError, PrefectApi
from pipeline.flows.processes import find_marked, identify, is_running
from pipeline.flows.supervisor import Backoff, Supervisor, ensure_running
from stages.errors import DamagedFileError, EnvironmentFailure, InputError

ROOT = Path(__file__).parents[3]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home whose processes end with the test."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("WSSS_TEST_HOME", str(tmp_path))
    yield tmp_path
    for process in find_marked("WSSS_TEST_HOME", str(tmp_path)):
        if process.pid != os.getpid():
            os.kill(process.pid, signal.SIGKILL)


def make_state(home: Path, *names: str, url: str = "http://127.0.0.1:9/api") -> ClusterState:
    components = {
        name: Component(name=name, command=SLEEP, log=home / f"{name}.log", gpu="" if "cpu" in name else None)
        for name in names
    }
    state = ClusterState(
        api_url=url,
        is_server_ours=True,
        pool="wsss",
        directory=home,
        artifacts=str(home),
        files_port=0,
        components=components,
    )
    write_state(home, state)
    return state


# -- the state --------------------------------------------------------------------------------------------------------


def test_the_state_reads_back_and_nothing_is_left_beside_it(home: Path):
    assert read_state(home) is None
    state = make_state(home, "server", "box-cpu0")
    assert read_state(home) == state
    assert [found.name for found in state.workers] == ["box-cpu0"]
    assert [path.name for path in home.iterdir()] == ["up.json"]


def test_a_change_that_fails_changes_nothing(home: Path):
    make_state(home, "server")

    def change() -> None:
        with changing(home) as state:
            state.pool = "other"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    found = read_state(home)
    assert found is not None
    assert found.pool == "wsss"


def test_changes_at_the_same_time_all_count(home: Path):
    make_state(home, "server")

    def add(index: int) -> None:
        with changing(home) as state:
            state.components[f"w{index}"] = Component(name=f"w{index}", command=[], log=home / "log")

    threads = [threading.Thread(target=add, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_state(home)
    assert found is not None
    assert len(found.components) == 9


def test_a_damaged_state_says_what_to_do(home: Path):
    (home / "up.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"up\.json is not what wsss wrote.*remove it"):
        read_state(home)


def test_a_second_command_waits_and_then_says_for_whom(home: Path):
    with (
        one_command(home),
        pytest.raises(EnvironmentFailure, match="another wsss up or down"),
        one_command(home, timeout_s=0.1),
    ):
        pass


def test_a_component_is_started_once_and_never_taken_for_another(home: Path):
    make_state(home, "box-cpu0")
    assert ensure_running(home, "box-cpu0")
    assert not ensure_running(home, "box-cpu0")
    first = read_state(home)
    assert first is not None
    with changing(home) as state:
        state.components["box-cpu0"].started += "1"  # the pid now belongs to somebody else
    assert ensure_running(home, "box-cpu0")
    assert is_running(first.components["box-cpu0"].process), "a process that is not ours was ended"


# -- whose server -----------------------------------------------------------------------------------------------------


def test_without_a_variable_the_server_is_ours(home: Path):
    found = find_server("127.0.0.1", 4300, None)
    assert (found.url, found.is_ours) == ("http://127.0.0.1:4300/api", True)


def test_the_variable_names_the_server(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://head:4200/api/")
    found = find_server("127.0.0.1", 4200, None)
    assert (found.url, found.is_ours) == ("http://head:4200/api", False)


@pytest.mark.parametrize("url", ["http://127.0.0.1:4200/api", "http://localhost:4200/api"])
def test_the_line_that_up_prints_does_not_hide_our_own_server(home: Path, monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.setenv("PREFECT_API_URL", url)
    assert find_server("127.0.0.1", 4200, None).is_ours


def test_a_server_that_is_up_stays_where_it_is(home: Path, monkeypatch: pytest.MonkeyPatch):
    before = make_state(home, "server", url="http://127.0.0.1:4300/api")
    assert find_server("127.0.0.1", 4200, before).url == "http://127.0.0.1:4300/api"
    with pytest.raises(InputError, match="wsss down first, to move it to port 4400"):
        find_server("127.0.0.1", 4400, before)
    monkeypatch.setenv("PREFECT_API_URL", "http://head:4200/api")
    with pytest.raises(InputError, match="wsss down first"):
        find_server("127.0.0.1", 4200, before)


@pytest.mark.parametrize("url", ["head:4200", "ftp://head/api", "http:///api"])
def test_a_variable_that_is_no_url(home: Path, monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(InputError, match="PREFECT_API_URL must be a URL such as"):
        find_server("127.0.0.1", 4200, None)


def test_a_wrong_api_url_is_the_environments_failure(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    server = find_server("127.0.0.1", 4200, None)
    with pytest.raises(
        EnvironmentFailure, match=r"127\.0\.0\.1:9/api.*Connection refused.*unset it: wsss up then starts"
    ):
        start_server(home, server, print)


def test_up_with_a_wrong_api_url_is_exit_4_and_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    words = ["up", "--json", "--home", str(home / "prefect")]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "correct the variable, or unset it" in json.loads(done.stdout)["error"]["message"]
    assert not (home / "prefect" / "up.json").exists()


class _OtherProgram(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>another program</html>")

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def other_program() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), _OtherProgram) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_port_of_another_program(home: Path, other_program: int):
    make_state(home, "server")
    server = find_server("127.0.0.1", other_program, None)
    with pytest.raises(
        EnvironmentFailure, match=rf"port {other_program} .*stop that program, or take another port: wsss"
    ):
        start_server(home, server, print)
    state = read_state(home)
    assert state is not None
    assert not state.components["server"].is_running()


def test_another_program_is_no_prefect_api(other_program: int):
    assert "does not answer as a Prefect API" in PrefectApi(f"http://127.0.0.1:{other_program}").problem()


def test_a_server_that_dies_shows_its_log(home: Path):
    make_state(home, "server")
    with changing(home) as state:
        state.components["server"].command = [sys.executable, "-c", "raise SystemExit('min_items')"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(EnvironmentFailure, match=r"(?s)did not come up.*server\.log.*wsss doctor.*min_items"):
        start_server(home, find_server("127.0.0.1", port, None), print)


def test_an_address_for_all_is_reached_at_this_machine():
    assert reachable("0.0.0.0") == reachable("127.0.0.1") == "127.0.0.1"
    assert reachable("10.1.2.3") == "10.1.2.3"


def test_a_database_without_the_right_driver_is_refused_without_its_password():
    check_database_url(None)
    check_database_url("postgresql+asyncpg://prefect:hidden@db/prefect")
    with pytest.raises(InputError, match=r"must begin with postgresql\+asyncpg://.*got postgresql:…") as caught:
        check_database_url("postgresql://prefect:hidden@db/prefect")
    assert "hidden" not in str(caught.value)


def test_locked_errors_are_counted_once_each(tmp_path: Path):
    assert count_locked(tmp_path) == 0
    text = "sqlite3.OperationalError: database is locked\nx: (sqlite3.OperationalError) database is locked\n"
    (tmp_path / "server.log").write_text(text * 3)
    assert count_locked(tmp_path) == 3


# -- what the server must know ----------------------------------------------------------------------------------------


class FakeApi(PrefectApi):
    """Answers by method and path, and remembers what was asked."""

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__("http://127.0.0.1:9/api")
        self.answers, self.asked = answers, []

    def call(self, method: str, path: str, body: object = None) -> Any:
        self.asked.append((f"{method} {path}", body))
        answer = self.answers.get(f"{method} {path}")
        if isinstance(answer, Exception):
            raise answer
        return answer


FIND, POOL = "POST /automations/filter", "GET /work_pools/wsss"


def as_served(automation: dict[str, Any]) -> dict[str, Any]:
    """The automation as a server gives it back: more keys, sets in another order."""
    found = json.loads(json.dumps(automation | {"id": "1", "tags": []}))
    found["trigger"]["expect"].reverse()
    return found


def test_the_automation_is_created_once():
    api = FakeApi({FIND: []})
    assert set_up_automation(api) == "created"
    assert api.asked[-1] == ("POST /automations/", describe_automation())
    api = FakeApi({FIND: [as_served(describe_automation())]})
    assert set_up_automation(api) == "unchanged"
    assert [asked for asked, _ in api.asked] == [FIND]


def test_an_old_automation_is_updated_and_a_disabled_one_stays_so():
    old = as_served(describe_automation() | {"enabled": False})
    old["trigger"]["within"] = 90
    api = FakeApi({FIND: [old, {"id": "2"}]})
    assert set_up_automation(api) == "updated"
    assert [asked for asked, _ in api.asked[1:]] == ["DELETE /automations/2", "PUT /automations/1"]
    assert api.asked[-1][1] == describe_automation() | {"enabled": False}


def test_the_automation_is_about_our_flows_alone():
    trigger = describe_automation()["trigger"]
    assert trigger["match_related"]["prefect.resource.name"] == ["wsss", "wsss-stage", "wsss-shard"]
    assert trigger["within"] == 70


def test_a_pool_is_left_unless_its_limit_differs():
    api = FakeApi({POOL: {"type": "process", "concurrency_limit": 2}})
    assert set_up_pool(api, "wsss", max_runs=None, environment={}) == "unchanged"
    assert set_up_pool(api, "wsss", max_runs=2, environment={}) == "unchanged"
    assert set_up_pool(api, "wsss", max_runs=3, environment={}) == "updated"
    assert api.asked[-1] == ("PATCH /work_pools/wsss", {"concurrency_limit": 3})


def test_a_pool_of_another_type_is_not_ours():
    api = FakeApi({POOL: {"type": "docker", "concurrency_limit": None}})
    with pytest.raises(InputError, match=r"'wsss' is of type docker.*prefect worker start --pool wsss"):
        set_up_pool(api, "wsss", max_runs=None, environment={})


def test_a_worker_takes_one_run_and_installs_nothing(home: Path):
    worker = describe_worker("box-gpu1", "1", "wsss", home, {"PREFECT_API_URL": "u"})
    text = " ".join(worker.command)
    assert "--pool wsss --type process --name box-gpu1 --limit 1 --install-policy never" in text
    assert worker.environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert worker.environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert worker.environment["PREFECT_API_URL"] == "u"


# -- the supervisor ---------------------------------------------------------------------------------------------------


def test_backoff_doubles_to_a_minute_and_forgets():
    backoff, waits = Backoff(), []
    for _ in range(8):
        backoff.started_s = 1000.0
        backoff.died(1000.0)
        waits.append(backoff.next_s - 1000.0)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    backoff.died(1000.0 + supervisor.STEADY_S + 1)
    assert backoff.next_s == 1000.0 + supervisor.STEADY_S + 2


def test_a_dead_worker_starts_again_and_what_it_left_is_ended(home: Path):
    make_state(home, "supervisor", "box-cpu0")
    flow = f"import os, subprocess, time; os.environ['PREFECT__FLOW_RUN_ID'] = 'run-1'; subprocess.Popen({SLEEP!r},"
    with changing(home) as state:
        state.components["box-cpu0"].command = [
            sys.executable,
            "-c",
            f"{flow} start_new_session=True); time.sleep(60)",
        ]
    ensure_running(home, "box-cpu0")
    wait_until(lambda: "run-1" in find_runs(home, ["box-cpu0"])["box-cpu0"])
    watcher = Supervisor(home, read_needed(home), logging.getLogger("test"))
    watcher.look(read_needed(home), 100.0)
    first = read_needed(home).components["box-cpu0"].process
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not is_running(first))
    watcher.look(read_needed(home), 101.0)
    assert find_runs(home, ["box-cpu0"]) == {"box-cpu0": {}}, "the flow run of the dead worker still runs"
    watcher.look(read_needed(home), 101.5)
    assert not read_needed(home).components["box-cpu0"].is_running(), "it must wait for a second"
    watcher.look(read_needed(home), 102.1)
    assert read_needed(home).components["box-cpu0"].is_running()
    end_worker(home, read_needed(home).components["box-cpu0"], grace_s=1.0)


def test_ending_a_worker_leaves_nothing_with_its_mark(home: Path):
    make_state(home, "box-cpu0")
    with changing(home) as state:
        code = f"import subprocess, time; subprocess.Popen({SLEEP!r}, start_new_session=True); time.sleep(60)"
        state.components["box-cpu0"].command = [sys.executable, "-c", code]
    ensure_running(home, "box-cpu0")
    wait_until(lambda: len(find_marked(MARK, mark(home, "box-cpu0"))) == 2)
    end_worker(home, read_needed(home).components["box-cpu0"], grace_s=1.0)
    assert find_marked(MARK, mark(home, "box-cpu0")) == {}


def read_needed(home: Path) -> ClusterState:
    state = read_state(home)
    assert state is not None
    return state


def wait_until(is_so, timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end_s, "waited too long"
        time.sleep(0.05)


# -- down -------------------------------------------------------------------------------------------------------------


def test_down_with_nothing_up(home: Path):
    assert down(home / "none", print)["ended"] == []


def test_down_without_a_server_ends_what_is_there(home: Path):
    make_state(home, "server", "supervisor", "box-cpu0")
    for name in ("server", "supervisor", "box-cpu0"):
        ensure_running(home, name)
    state = read_needed(home)
    found = down(home, lambda text: None)
    assert sorted(found["ended"]) == ["box-cpu0", "server", "supervisor"]
    assert [identify(component.pid) for component in state.components.values()] == [None, None, None]
    assert read_state(home) is None


# -- the files for other places ---------------------------------------------------------------------------------------


def test_the_compose_file_listens_on_this_machine_alone():
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    assert set(services) == {"database", "server", "workers", "reports"}
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert services["workers"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert services["workers"]["shm_size"] == "8g"
    check_database_url(services["server"]["environment"][cluster_server.DATABASE_URL])


def test_the_pool_templates_give_a_gpu_shared_memory_and_the_store():
    docker = json.loads((ROOT / "deploy" / "docker-pool.json").read_text())["variables"]["properties"]
    extra = docker["container_create_kwargs"]["default"]
    assert extra["device_requests"][0]["capabilities"] == [["gpu"]]
    assert extra["shm_size"] == "8g"
    assert any(volume.endswith(":/wsss/artifacts") for volume in docker["volumes"]["default"])
    kubernetes = json.loads((ROOT / "deploy" / "kubernetes-pool.json").read_text())
    pod = kubernetes["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names == {"artifacts", "data", "shm"}
    for properties in (docker, kubernetes["variables"]["properties"]):
        assert properties["env"]["default"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
        assert properties["env"]["default"]["WSSS_ARTIFACTS"] == "/wsss/artifacts"


# -- for real ---------------------------------------------------------------------------------------------------------


def free_ports(number: int) -> list[str]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return found


@pytest.mark.prefect
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_up_twice_a_killed_worker_and_down(home: Path, monkeypatch: pytest.MonkeyPatch):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "WSSS_UP"))}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    port, files_port = free_ports(2)
    prefect = home / ".prefect"

    def wsss(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "pipeline.cli.main", *words, "--json"]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        return json.loads(done.stdout)

    up = ("up", "--port", port, "--files-port", files_port, "--max-runs", "2")
    first = wsss(*up)
    try:
        (worker,) = first["workers"]
        states = [first[name]["state"] for name in ("server", "supervisor")]
        assert [*states, worker["state"], first["pool"]["state"]] == ["started", "started", "started", "created"]
        assert worker["gpu"] is None
        assert PrefectApi(first["api_url"]).work_pool("wsss")["concurrency_limit"] == 2
        marked = len(find_marked("WSSS_TEST_HOME", str(home)))

        second = wsss(*up)
        states = [second[name]["state"] for name in ("server", "supervisor")]
        assert [*states, second["workers"][0]["state"]] == ["already up"] * 3
        assert (second["pool"]["state"], second["automation"]) == ("unchanged", "unchanged")
        assert len(find_marked("WSSS_TEST_HOME", str(home))) == marked, "a second up started something"

        os.kill(worker["pid"], signal.SIGKILL)
        wait_until(lambda: read_needed(prefect).components[worker["name"]].pid != worker["pid"], 30.0)
        wait_until(lambda: read_needed(prefect).components[worker["name"]].is_running(), 5.0)
        with pytest.raises(ApiError, match="404"):
            PrefectApi(first["files_url"]).call("GET", "/")
    finally:
        found = wsss("down")
    assert sorted(found["ended"]) == sorted(["server", "supervisor", worker["name"]])
    assert [process for process in find_marked("WSSS_TEST_HOME", str(home)) if process.pid != os.getpid()] == []
    assert not (prefect / "up.json").exists()
    assert wsss("down")["ended"] == []
