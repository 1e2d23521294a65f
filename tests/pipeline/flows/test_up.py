"""``wsss up`` and ``wsss down`` without a server, and the files that they and others hand to Prefect."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.engine.stage_table import STAGES
from pipeline.flows.up import Keeper, UpCall, find_server
from stages.errors import EnvironmentFailure, InputError
from tests.pipeline.flows.clusters import ROOT, environment

DEPLOY = ROOT / "deploy"
UP = "http://127.0.0.1:4200/api"


def wsss(home: Path, *words: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, output, and what the command printed for people."""
    command = [sys.executable, "-P", "-m", "pipeline.cli.main", *words, "--json", "--home", str(home)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**variables), check=False)
    return done.returncode, json.loads(done.stdout).get("error", {}).get("message", ""), done.stderr


# -- whose server -----------------------------------------------------------------------------------------------------


def test_the_server_is_ours_unless_the_variable_names_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert find_server(UpCall(tmp_path), "") == UP
    assert UpCall(tmp_path, host="0.0.0.0").own_url == UP, "reached at this machine"
    monkeypatch.setenv("PREFECT_API_URL", "http://localhost:4200/api/")
    assert find_server(UpCall(tmp_path), "") == UP, "the line that up prints does not hide our own server"
    monkeypatch.setenv("PREFECT_API_URL", "http://head:4200/api/")
    assert find_server(UpCall(tmp_path), "") == "http://head:4200/api"


def test_a_server_that_is_up_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    standing = "http://127.0.0.1:4300/api"
    assert find_server(UpCall(tmp_path), standing) == standing
    with pytest.raises(InputError, match=r"server at .*:4300/api, not at .*:4400/api: wsss down first"):
        find_server(UpCall(tmp_path, port=4400), standing)
    monkeypatch.setenv("PREFECT_API_URL", "http://head:4200/api")
    with pytest.raises(InputError, match="wsss down first"):
        find_server(UpCall(tmp_path), standing)


def test_a_wrong_api_url_is_exit_4_and_starts_nothing(tmp_path: Path):
    code, message, said = wsss(tmp_path / "home", "up", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert code == 4
    assert "no Prefect server answers there" in message
    assert "correct PREFECT_API_URL (does the URL end in /api?), or unset it" in message
    assert "$ supervisord" not in said


def test_a_port_of_another_program_is_exit_4_and_starts_nothing(tmp_path: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, message, said = wsss(tmp_path / "home", "up", "--port", port)
    assert code == 4
    assert f"port {port} of 127.0.0.1 cannot be had" in message
    assert "wsss up --port N" in message
    assert "$ supervisord" not in said


def test_down_with_nothing_up_calls_nothing(tmp_path: Path):
    code, _, said = wsss(tmp_path / "home", "down")
    assert (code, said) == (0, "")


# -- supervisord ------------------------------------------------------------------------------------------------------


def test_supervisord_keeps_what_its_file_names_and_reports_it(tmp_path: Path):
    said: list[str] = []
    home = tmp_path / "a folder whose name is so long that a socket of the system could not be in it at all"
    keeper = Keeper(home, said.append)
    assert keeper.processes() == {}
    assert keeper.state["workers"] == {}
    command = "env CUDA_VISIBLE_DEVICES=1 prefect version"
    keeper.write({"box-gpu1": command}, api_url=UP, workers={"box-gpu1": "1"})
    assert keeper.state == {"api_url": UP, "workers": {"box-gpu1": "1"}, "programs": {"box-gpu1": command}}
    keeper.run("supervisord")
    try:
        (process,) = keeper.processes().values()
        assert (process["name"], process["stdout_logfile"]) == ("box-gpu1", str(home / "logs" / "box-gpu1.log"))
    finally:
        keeper.run("supervisorctl", "shutdown")
    assert said[0] == f"$ supervisord -c '{home}/supervisord.conf'"


def test_the_file_of_supervisord_names_programs_by_their_path_and_nobody_else_reads_it(tmp_path: Path):
    keeper = Keeper(tmp_path, lambda text: None)
    worker = "env CUDA_VISIBLE_DEVICES=0,1 prefect worker start --pool prefect"
    keeper.write({"server": "python -m pipeline.flows.server", "gpu0": worker}, api_url=UP, workers={})
    lines = [line for line in keeper.file.read_text().splitlines() if line.startswith("command=")]
    folder = Path(sys.executable).parent
    assert lines == [
        f"command={folder}/python -m pipeline.flows.server",
        f"command=env CUDA_VISIBLE_DEVICES=0,1 {folder}/prefect worker start --pool prefect",
    ]
    assert keeper.file.stat().st_mode & 0o777 == 0o600


def test_a_command_that_fails_shows_its_words(tmp_path: Path):
    with pytest.raises(EnvironmentFailure, match=r"supervisord -c .*supervisord.conf failed") as caught:
        Keeper(tmp_path, lambda text: None).run("supervisord")
    assert any("could not find config file" in line for line in caught.value.problems)


# -- the files --------------------------------------------------------------------------------------------------------


def test_there_is_a_deployment_of_the_whole_run_and_one_of_each_stage():
    assert (ROOT / "prefect.yaml").read_text() == (DEPLOY / "prefect.yaml").read_text()
    found = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())["deployments"]
    assert [entry["name"] for entry in found] == ["run", *STAGES]
    assert [entry["parameters"] for entry in found[1:]] == [{"stage": stage, "config": "demo"} for stage in STAGES]
    assert {entry["enforce_parameter_schema"] for entry in found} == {True}
    assert not any("work_pool" in entry for entry in found), "PREFECT_DEFAULT_WORK_POOL_NAME chooses it"


def test_the_automations_expect_exactly_what_ends_the_watch():
    found = {each["name"]: each for each in yaml.safe_load((DEPLOY / "automations.yaml").read_text())["automations"]}
    for each in found.values():
        assert each["trigger"]["match_related"]["prefect.resource.name"] == ["wsss", "wsss-stage"]
    zombies, again = found["wsss: zombies"]["trigger"], found["wsss: resubmit"]["trigger"]
    ends = {"heartbeat", "Completed", "Failed", "Cancelled", "Crashed"}
    assert set(zombies["expect"]) == {f"prefect.flow-run.{end}" for end in ends}
    assert (zombies["within"], again["within"]) == (90, 20)
    assert again["posture"] == "Proactive", "at once would kill the worker"


def test_the_compose_file_listens_on_this_machine_alone():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"database", "server", "setup", "worker0", "reports"}
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    device = services["worker0"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert (device["device_ids"], device["capabilities"]) == (["0"], ["gpu"])
    assert services["worker0"]["shm_size"] == "8g"
    assert services["server"]["command"][:3] == ["python", "-m", "pipeline.flows.server"], "behind the guard"
    assert "http://server:4200" in services["server"]["environment"]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    url = services["server"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    assert url.startswith("postgresql+asyncpg://")


def test_no_pool_lets_a_run_choose_its_program():
    process = json.loads((DEPLOY / "process-pool.json").read_text())
    assert process["variables"]["properties"] == {}
    for name in ("process", "docker", "kubernetes"):
        text = (DEPLOY / f"{name}-pool.json").read_text()
        variables = json.loads(text)["variables"]
        assert variables["additionalProperties"] is False
        assert not {"command", "args"} & variables["properties"].keys()
        assert "{{ command }}" not in text


def test_the_pool_templates_give_a_gpu_shared_memory_and_the_store():
    docker = json.loads((DEPLOY / "docker-pool.json").read_text())["variables"]["properties"]
    extra = docker["container_create_kwargs"]["default"]
    assert extra["device_requests"][0]["capabilities"] == [["gpu"]]
    assert extra["shm_size"] == "8g"
    assert any(volume.endswith(":/wsss/artifacts") for volume in docker["volumes"]["default"])
    kubernetes = json.loads((DEPLOY / "kubernetes-pool.json").read_text())
    pod = kubernetes["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names == {"artifacts", "data", "shm"}
    for properties in (docker, kubernetes["variables"]["properties"]):
        assert properties["env"]["default"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
        assert properties["env"]["default"]["WSSS_ARTIFACTS"] == "/wsss/artifacts"
