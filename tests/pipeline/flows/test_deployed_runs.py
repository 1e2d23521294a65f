"""Runs of the deployments on a server and a worker that ``wsss up`` started: what a person sees of them."""

import fcntl
import json
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.flows.clusters import Cluster, holders, wait_until, wsss
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

STAGES = ["prepare_data", "train_classifier", "make_attention", "make_masks", "train_segmenter", "evaluate"]
CONFIG = tiny_yaml(name="Tiny_one", runtime={"checkpoint_every_s": 0.5})

pytestmark = [pytest.mark.slow, pytest.mark.prefect, pytest.mark.skipif(sys.platform != "linux", reason="/proc")]


@dataclass
class World:
    """One cluster, and the run that filled its store."""

    cluster: Cluster
    folder: Path
    first: str
    """Id of that flow run."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "tiny.yaml").write_text(CONFIG)
    cluster = Cluster(folder, workers=1)
    try:
        first = cluster.submit("wsss/demo", config="tiny.yaml", splits=["val"])
        assert cluster.finish(first)["type"] == "COMPLETED"
        yield World(cluster, folder, first)
    finally:
        cluster.down()


def check_task_runs(world: World, flow_run_id: str, expected: list[tuple[str, str]]) -> None:
    """Compare name and state of each task run, in order; the server hears of them later than of the flow run."""
    body = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
    end, found = time.monotonic() + 15, []
    while found != expected and time.monotonic() < end:
        runs = [run for run in world.cluster.ask("task_runs/filter", body) if run["start_time"]]
        found = [(run["name"], run["state_name"]) for run in sorted(runs, key=lambda run: run["start_time"])]
        time.sleep(0.2)
    assert found == expected


def wait_for_log(world: World, flow_run_id: str, words: str) -> None:
    """Until a line of the run's log has ``words``; lines arrive later than states."""
    body = {"logs": {"flow_run_id": {"any_": [flow_run_id]}}}

    def is_there() -> bool:
        return any(words in line["message"] for line in world.cluster.ask("logs/filter", body))

    wait_until(is_there, f"the log says {words!r}", seconds=15)


def test_a_run_is_named_after_its_config_and_key_and_ends_with_its_numbers(world: World):
    (key,) = (path.name for path in (world.folder / "artifacts" / "evaluate").glob("[0-9a-f]*"))
    run = world.cluster.ask(f"flow_runs/{world.first}")
    assert run["name"] == f"Tiny_one-{key[:8]}"
    assert re.fullmatch(r"attention mIoU .*, pseudo-masks mIoU .*, segmenter mIoU \d+\.\d %", run["state"]["message"])
    check_task_runs(world, world.first, [(stage, "Completed") for stage in STAGES])
    wait_for_log(world, world.first, "drawing 8 pictures of 64 px")  # the child's own words


def test_its_page_has_the_iou_of_every_class_and_links_that_open(world: World):
    found = world.cluster.ask("artifacts/filter", {"flow_runs": {"id": {"any_": [world.first]}}})
    pages = {entry["key"]: entry for entry in found}
    assert {"train-classifier", "train-segmenter"} <= {
        key for key, entry in pages.items() if entry["type"] == "progress" and float(entry["data"]) == 100.0
    }
    page = pages["result-tiny-one"]["data"]
    assert re.search(r"\| background \| \d+\.\d % \|\n\| auk \| ", page)
    report, picture = re.search(r"\]\((http\S+\.html)\)", page), re.search(r"\]\((http\S+\.png)\)", page)
    assert report is not None
    assert picture is not None
    for url, begin in ((report[1], b"<!DOCTYPE html>"), (picture[1], b"\x89PNG")):
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.read().startswith(begin)


def test_a_second_run_shows_its_stages_as_cached(world: World):
    again = world.cluster.submit("wsss/demo", config="tiny.yaml")
    assert world.cluster.finish(again)["type"] == "COMPLETED"
    check_task_runs(world, again, [(stage, "Cached") for stage in STAGES])


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_runs_alone_from_what_is_cached(world: World, stage: str):
    alone = world.cluster.submit(f"wsss-stage/{stage}", config="tiny.yaml")
    assert world.cluster.finish(alone)["type"] == "COMPLETED"
    check_task_runs(world, alone, [(stage, "Cached")])
    assert world.cluster.ask(f"flow_runs/{alone}")["name"].startswith(f"Tiny_one-{stage}-")


def test_a_stage_without_its_input_fails_with_the_command_that_makes_it(world: World):
    alone = world.cluster.submit("wsss-stage/make_masks", config="tiny.yaml", overrides=["seed=5"])
    state = world.cluster.finish(alone)
    assert state["type"] == "FAILED"
    store = world.folder / "artifacts"
    command = f"wsss run tiny.yaml --set seed=5 --artifacts {store} --until make_attention"
    assert state["message"].endswith(f"make it with: {command}")


def test_a_config_typed_into_the_form_is_the_same_run(world: World):
    typed = json.loads(wsss(world.folder, "config", "show", "tiny.yaml", "--json"))["values"]
    run = world.cluster.submit("wsss/demo", config=typed)
    assert world.cluster.finish(run)["type"] == "COMPLETED"
    check_task_runs(world, run, [(stage, "Cached") for stage in STAGES])


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (('splits=["train"]',), ("'train' is not one of", "'val'")),
        (("until=make_mask",), ("'make_mask' is not one of", "make_masks")),
        (('config={"name": "x", "seed": -1}',), ("config.seed", "less than the minimum of 0")),
        (("threshold=0.3",), ("not found on the deployment", "'overrides'")),
    ],
)
def test_a_wrong_value_is_refused_before_there_is_a_run(world: World, parameters: tuple[str, ...], words):
    count = world.cluster.ask("flow_runs/count", {})
    given = [word for each in parameters for word in ("--param", each)]
    text = " ".join(world.cluster.prefect("deployment", "run", "wsss/demo", *given, code=1).split())
    for word in words:
        assert word in text
    assert world.cluster.ask("flow_runs/count", {}) == count


def test_a_wrong_override_fails_the_run_with_all_its_problems(world: World):
    run = world.cluster.submit("wsss/demo", config="tiny.yaml", overrides=["make_masks.thresold=1", "sed=1"])
    state = world.cluster.finish(run)
    assert state["type"] == "FAILED"
    lines = state["message"].splitlines()
    assert lines[0] == "tiny.yaml is not a valid config: 2 problems"
    assert len(lines) == 3
    assert "did you mean 'threshold'" in state["message"]


def test_cancelling_ends_the_children_and_leaves_work_to_go_on_from(world: World):
    slow = ["train_segmenter.training.steps=4000"]
    run = world.cluster.submit("wsss/demo", config="tiny.yaml", overrides=slow)
    status = json.loads(wsss(world.folder, "status", "tiny.yaml", "--set", slow[0], "--json"))
    key = next(stage["key"] for stage in status["stages"] if stage["stage"] == "train_segmenter")
    store = world.folder / "artifacts"
    checkpoint = store / "train_segmenter" / f".work-{key}" / "checkpoint.pt"
    wait_until(checkpoint.exists, "there is a checkpoint", seconds=60)
    lock = store / ".locks" / f"train_segmenter-{key}"
    assert holders(lock), "a child is at work"

    world.cluster.prefect("flow-run", "cancel", run)
    assert world.cluster.finish(run)["type"] == "CANCELLED"
    wait_until(lambda: not holders(lock), "the child has ended", seconds=10)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody still holds it
    assert checkpoint.exists()
    time.sleep(6)  # long enough for whoever submits crashed runs again
    assert world.cluster.states(run)[-1]["type"] == "CANCELLED"


def deploy_older(world: World, **parameters: object) -> str:
    """A deployment as an older version of this code would have left it; the id of a run of it."""
    deployments = world.cluster.ask("deployments/filter", {"deployments": {"name": {"any_": ["demo"]}}})
    kept = ("flow_id", "entrypoint", "pull_steps", "work_pool_name", "tags")
    body = {name: deployments[0][name] for name in kept} | {
        "name": "older",
        "version": "0.0.1",
        "parameters": {"config": "tiny.yaml", **parameters},
        "enforce_parameter_schema": False,
    }
    deployment = world.cluster.ask("deployments/", body)
    return world.cluster.ask(f"deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]


def test_a_deployment_with_parameters_of_an_older_version_fails_with_what_to_do(world: World):
    state = world.cluster.finish(deploy_older(world, thresold=0.3))
    assert state["type"] == "FAILED"
    assert state["message"].startswith("the deployment is of another version of wsss: its parameters thresold")
    assert "run `wsss up` again" in state["message"]


def test_a_worker_with_other_code_than_the_deployments_warns(world: World):
    run = deploy_older(world)
    assert world.cluster.finish(run)["type"] == "COMPLETED"
    wait_for_log(world, run, "the deployment was made by 0.0.1")
