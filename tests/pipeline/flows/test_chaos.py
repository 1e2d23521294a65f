"""Two workers, two runs, and kill -9 for both workers: every run ends Completed with the numbers of a quiet run.

Two minutes pass from each kill to the run's next start (90 s without a heartbeat, 20 s, the start): about 6 minutes.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.flows.clusters import Cluster, free_port, wait_until
from tests.pipeline.whole_runs.here import wsss_here
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

CONFIG = tiny_yaml(
    name="chaos",
    data={"num_train": 300, "num_val": 6, "num_classes": 3},
    train_classifier={"training": {"steps": 20, "batch_size": 8}},
    make_masks={"refine": "crf", "crf": {"iterations": 40}},
    train_segmenter={"training": {"steps": 500, "batch_size": 4}},
    runtime={"checkpoint_every_s": 1.0},
)
OTHER = "make_masks.threshold=0.35"
"""What the second run changes: it shares the first three stages with the first."""

pytestmark = [pytest.mark.slow, pytest.mark.prefect, pytest.mark.skipif(sys.platform != "linux", reason="/proc")]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables that choose the server's database."""
    if request.param == "sqlite":
        yield {}
        return
    if shutil.which("postgres") is None or shutil.which("initdb") is None:
        pytest.skip("PostgreSQL is not installed")
    yield from postgresql(tmp_path / "postgresql")


def postgresql(folder: Path) -> Iterator[dict[str, str]]:
    """A PostgreSQL of our own on loopback, run by an unprivileged user where this one is root."""
    folder.mkdir()
    user = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
    if user:
        shutil.chown(folder, "nobody")
        for above in folder.parents[:3]:
            above.chmod(above.stat().st_mode | 0o011)  # pytest's folders are for root alone
    subprocess.run([*user, "initdb", "-D", folder / "data", "-A", "trust", "-U", "wsss"], check=True, cwd="/")
    port = free_port()
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
    with (folder.parent / "postgresql.log").open("w") as log:
        server = subprocess.Popen([*user, "postgres", "-D", folder / "data", *options], stdout=log, stderr=log, cwd="/")
    try:
        wait_until(lambda: can_connect(port), "PostgreSQL answers", seconds=30)
        url = f"postgresql+asyncpg://wsss@127.0.0.1:{port}/postgres"
        yield {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
    finally:
        server.terminate()
        server.wait(30)


def can_connect(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


# -- the test ---------------------------------------------------------------------------------------------------------


@dataclass
class Quiet:
    """Both runs where nobody kills anything."""

    store: Path
    keys: list[dict[str, str]]
    """Of each run: key by stage."""
    metrics: list[dict]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    folder = tmp_path_factory.mktemp("quiet")
    (folder / "chaos.yaml").write_text(CONFIG)
    runs = [wsss_here(folder, "run", "chaos.yaml", "--engine", "local", *words) for words in ((), ("--set", OTHER))]
    keys = [{stage["stage"]: stage["key"] for stage in run["stages"]} for run in runs]
    return Quiet(folder / "artifacts", keys, [run["metrics"] for run in runs])


def manifest(store: Path, stage: str, keys: dict[str, str]) -> dict:
    return json.loads((store / stage / keys[stage] / "manifest.json").read_text())


@pytest.mark.timeout(2400)
def test_both_workers_are_killed_and_every_run_ends_with_the_quiet_runs_numbers(
    tmp_path: Path, quiet: Quiet, database: dict[str, str]
) -> None:
    (tmp_path / "chaos.yaml").write_text(CONFIG)
    first, second = quiet.keys
    assert first["make_attention"] == second["make_attention"]
    assert first["make_masks"] != second["make_masks"]
    store = tmp_path / "artifacts"
    if database:  # that workers build what comes before the masks is seen on the other database
        for stage in ("prepare_data", "train_classifier", "make_attention"):
            shutil.copytree(quiet.store / stage, store / stage)
    cluster = Cluster(tmp_path, workers=2, **database)
    try:
        runs = [cluster.submit("wsss/run", config="chaos.yaml")]
        wait_until(lambda: (store / "make_attention" / first["make_attention"]).exists(), "attention", seconds=400)
        runs.append(cluster.submit("wsss/run", config="chaos.yaml", overrides=[OTHER]))

        masks = store / "make_masks" / f".work-{second['make_masks']}" / "masks"
        wait_until(lambda: len(list(masks.glob("*.png"))) > 5, "the second run makes masks", seconds=300)
        killed = [cluster.kill_worker_of(store / ".locks" / f"make_masks-{second['make_masks']}")]
        checkpoint = store / "train_segmenter" / f".work-{first['train_segmenter']}" / "checkpoint.pt"
        wait_until(checkpoint.exists, "the first run trains its segmenter", seconds=400)
        killed.append(cluster.kill_worker_of(store / ".locks" / f"train_segmenter-{first['train_segmenter']}"))
        assert len(set(killed)) == 2, "each worker had one of the runs"

        for flow_run_id in runs:
            assert cluster.finish(flow_run_id, seconds=900)["type"] == "COMPLETED"
            names = [state["name"] for state in cluster.states(flow_run_id)]
            assert names.count("AwaitingRetry") == names.count("Crashed") > 0
    finally:
        cluster.down()

    for keys, expected in zip(quiet.keys, quiet.metrics, strict=True):
        found = json.loads((store / "evaluate" / keys["evaluate"] / "metrics.json").read_text())
        assert found["segmenter.miou"] == expected["segmenter.miou"]
        for stage in keys:
            theirs, ours = (manifest(each, stage, keys)["content"] for each in (quiet.store, store))
            assert ours == theirs, f"{stage}: the bytes of the quiet run"
    assert manifest(store, "make_masks", second)["run"]["resumed"]
    assert manifest(store, "train_segmenter", first)["run"]["resumed"]

    for lock in (store / ".locks").iterdir():
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody still holds it
