"""Nothing leaves the machine: every connection of a server, a worker and a run goes to loopback or a socket file."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.pipeline.flows.clusters import free_port, run
from tests.pipeline.flows.test_deployed_runs import CONFIG

SCRIPT = """
set -e
{wsss} up --home home --port {port} --workers 1 > up.txt
eval "$(grep ^export up.txt)"
{wsss} run tiny.yaml --json > run.json
{prefect} --no-prompt deployment run wsss/run --param config=tiny.yaml --watch > deployed.txt
{wsss} doctor > doctor.txt
{wsss} down --home home > down.txt
"""


@pytest.mark.slow
@pytest.mark.prefect
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_every_connection_stays_on_this_machine(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    wsss, prefect = f"{sys.executable} -P -m pipeline.cli.main", Path(sys.executable).with_name("prefect")
    script = SCRIPT.format(wsss=wsss, prefect=prefect, port=free_port())
    run(
        tmp_path,
        "strace",
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-e",
        "trace=connect,sendto",
        "-o",
        "calls.txt",
        "bash",
        "-c",
        script,
    )
    assert "finished successfully" in (tmp_path / "deployed.txt").read_text()
    assert len(json.loads((tmp_path / "run.json").read_text())["stages"]) == 6

    calls = (tmp_path / "calls.txt").read_text(errors="replace")
    addresses = re.findall(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"', calls)
    found = {four or six for four, six in addresses}
    assert "127.0.0.1" in found, "the trace has the connections to the server"
    assert found <= {"127.0.0.1", "::1"}
    assert not re.search(r"htons\(53\)", calls), "no name was looked up"
