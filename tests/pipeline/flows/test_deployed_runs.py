"""Runs of the deployments on a server and two workers that ``wsss up`` started: what a person sees of them.

One server for all tests: about 4 minutes on two quiet cores.
"""

import fcntl
import json
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.flows.clusters import Cluster, holders, kill_with_all_below, wait_until, wsss
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
    cluster = Cluster(folder, workers=2)
    try:
        first = cluster.submit("wsss/run", config="tiny.yaml", splits=["val"])
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


def test_its_page_has_the_iou_of_every_class_and_the_reports_path(world: World):
    found = world.cluster.ask("artifacts/filter", {"flow_runs": {"id": {"any_": [world.first]}}})
    pages = {entry["key"]: entry for entry in found}
    assert {"train-classifier", "train-segmenter"} <= {
        key for key, entry in pages.items() if entry["type"] == "progress" and float(entry["data"]) == 100.0
    }
    page = pages["result-tiny-one"]["data"]
    assert re.search(r"\| background \| \d+\.\d % \|\n\| auk \| ", page)
    report = re.search(r"- report: `(.*)`", page)
    assert report is not None
    assert Path(report[1]).read_text().startswith("<!DOCTYPE html>")


def test_a_second_run_shows_its_stages_as_cached(world: World):
    again = world.cluster.submit("wsss/run", config="tiny.yaml")
    assert world.cluster.finish(again)["type"] == "COMPLETED"
    check_task_runs(world, again, [(stage, "Cached") for stage in STAGES])


def test_a_stage_runs_alone_from_what_is_cached(world: World):
    alone = world.cluster.submit("wsss-stage/evaluate", config="tiny.yaml")
    assert world.cluster.finish(alone)["type"] == "COMPLETED"
    check_task_runs(world, alone, [("evaluate", "Cached")])
    assert world.cluster.ask(f"flow_runs/{alone}")["name"].startswith("Tiny_one-evaluate-")


def test_a_stage_without_its_input_fails_with_the_command_that_makes_it(world: World):
    alone = world.cluster.submit("wsss-stage/make_masks", config="tiny.yaml", overrides=["seed=5"])
    state = world.cluster.finish(alone)
    assert state["type"] == "FAILED"
    store = world.folder / "artifacts"
    command = f"wsss run tiny.yaml --set seed=5 --artifacts {store} --until make_attention"
    assert state["message"].endswith(f"make it with: {command}")


def test_a_config_typed_into_the_form_is_the_same_run(world: World):
    typed = json.loads(wsss(world.folder, "config", "show", "tiny.yaml", "--json"))["values"]
    run = world.cluster.submit("wsss/run", config=typed)
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
    text = " ".join(world.cluster.prefect("deployment", "run", "wsss/run", *given, code=1).split())
    for word in words:
        assert word in text
    assert world.cluster.ask("flow_runs/count", {}) == count


def test_a_wrong_override_fails_the_run_with_all_its_problems(world: World):
    run = world.cluster.submit("wsss/run", config="tiny.yaml", overrides=["make_masks.thresold=1", "sed=1"])
    state = world.cluster.finish(run)
    assert state["type"] == "FAILED"
    lines = state["message"].splitlines()
    assert lines[0] == "tiny.yaml is not a valid config: 2 problems"
    assert len(lines) == 3
    assert "did you mean 'threshold'" in state["message"]


def test_cancelling_ends_the_children_and_leaves_work_to_go_on_from(world: World):
    slow = ["train_segmenter.training.steps=4000"]
    run = world.cluster.submit("wsss/run", config="tiny.yaml", overrides=slow)
    status = json.loads(wsss(world.folder, "status", "tiny.yaml", "--set", slow[0], "--json"))
    key = next(stage["key"] for stage in status["stages"] if stage["stage"] == "train_segmenter")
    store = world.folder / "artifacts"
    checkpoint = store / "train_segmenter" / f".work-{key}" / "checkpoint.pt"
    wait_until(checkpoint.exists, "there is a checkpoint", seconds=180)
    lock = store / ".locks" / f"train_segmenter-{key}"
    assert holders(lock), "a child is at work"

    world.cluster.prefect("flow-run", "cancel", run)
    assert world.cluster.finish(run)["type"] == "CANCELLED"
    wait_until(lambda: not holders(lock), "the child has ended", seconds=10)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody still holds it
    assert checkpoint.exists()


def test_an_idle_worker_helps_with_a_stage_in_parts(world: World):
    changes = ["make_masks.threshold=0.31", "make_masks.refine=crf", "make_masks.crf.iterations=5"]
    run = world.cluster.submit("wsss/run", config="tiny.yaml", overrides=changes, parts=3, until="make_masks")
    assert world.cluster.finish(run)["type"] == "COMPLETED"
    wait_for_log(world, run, "make_masks in 3 parts: 1 idle workers were asked for help")
    stages = {"flows": {"name": {"any_": ["wsss-stage"]}}, "sort": "START_TIME_DESC"}
    helper = next(each for each in world.cluster.ask("flow_runs/filter", stages) if each["parameters"].get("part"))
    assert helper["parameters"]["overrides"][-1].endswith("=3")
    assert world.cluster.finish(helper["id"])["type"] in ("COMPLETED", "CANCELLED")


def test_a_second_up_finds_what_runs_and_a_killed_worker_starts_again(world: World):
    before = world.cluster.workers
    again = json.loads(world.cluster.wsss(*world.cluster.words))
    assert {process["state"] for process in (again["server"], *again["workers"])} == {"already up"}
    assert (again["pool"]["state"], again["automations"]) == ("already there", "already there")
    assert world.cluster.workers == before
    killed, name = next(iter(before.items()))
    kill_with_all_below(killed)
    wait_until(
        lambda: name in {n for pid, n in world.cluster.workers.items() if pid != killed}, "it is back", seconds=30
    )


def test_a_web_page_cannot_start_runs(world: World):
    headers = {"Origin": "http://a.page", "Access-Control-Request-Method": "POST"}
    request = urllib.request.Request(f"{world.cluster.up['api_url']}/flow_runs/", headers=headers, method="OPTIONS")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=20)
