"""An estimate goes by what this host built before, in proportion to the work, and is silent where it knows nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from pipeline.engine.estimate import Estimate, about, describe_disk, describe_stage, describe_time, estimate

from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.run import status
from pipeline.store.artifacts import Store
from stages.contracts import ClassList, ImageIndex, ImageRecord, write_json

SMALL = ("data.num_train=4", "data.num_val=2", "train_classifier.training={steps: 30, batch_size: 2}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def plan(store: Store, *overrides: str) -> Plan:
    return plan_run(load_model(RunConfig, find_config("demo"), [*SMALL, *overrides]), store.digest_cache)


def publish(store: Store, planned: Plan, stage: str, seconds: float, **run: Any) -> Path:
    """An artifact as if a run of ``planned`` had built it on the host "here"."""
    key = planned.keys[stage]
    with store.lock(stage, key):
        work, _ = store.work_dir(stage, key)
        if stage == "prepare_data":
            index = make_index(planned.run.data.num_train, planned.run.data.num_val)
            write_json(work / "index.json", index.model_dump(mode="json"))
        described = {
            "host": "here",
            "seconds": seconds,
            "runtime": planned.run.runtime.model_dump(mode="json"),
            "upstream": {name: planned.keys[name] for name in planned.upstream(stage)},
        }
        content = {**planned.contents[stage], "mask_supervision": []}
        return store.publish(stage, key, content=content, run={**described, **run}).path


def make_index(num_train: int, num_val: int) -> ImageIndex:
    names = [f"i{number}" for number in range(num_train + num_val)]
    return ImageIndex(
        classes=ClassList(names=("auk", "bee")),
        images=tuple(
            ImageRecord(id=name, image=f"{name}.jpg", size=(96, 96), labels=(0,), mask="m.png") for name in names
        ),
        splits={"train": tuple(names[:num_train]), "train_score": (), "val": tuple(names[num_train:])},
        mask_values={},
    )


def look(store: Store, planned: Plan, *, forced: int = 9, host: str = "here") -> Estimate:
    return estimate(planned, store, status(planned.run, store, plan=planned), forced=forced, host=host)


def test_an_empty_store_gives_work_and_no_seconds(store: Store) -> None:
    found = look(store, plan(store))
    assert [describe_stage(stage) for stage in found.values()] == [
        "6 images",
        "30 steps",
        "4 images",
        "4 images",
        "12 steps",
        "2 images",
    ]
    assert describe_time(found) == "the first run on a machine has no estimate and shows the time left as it goes"
    text = describe_disk(found)
    assert text is not None
    assert re.fullmatch(
        r"at most about \d\.\d MB \(\d\.\d MB the segmenter and its checkpoints, \d\.\d MB the classifier and its "
        r"checkpoints\)",
        text,
    ), text
    assert not store.root.exists(), "looking writes nothing"


def test_seconds_are_in_proportion_to_the_work(store: Store) -> None:
    before = plan(store)
    publish(store, before, "prepare_data", 3.0)
    publish(store, before, "train_classifier", 60.0)
    publish(store, before, "make_attention", 10.0)
    longer = "train_classifier.training={steps: 60, batch_size: 3}"
    found = look(store, plan(store, longer, "train_classifier.augment.crop_px=192", "data.num_train=8"))
    assert found["train_classifier"].seconds == pytest.approx(60 * 2 * 1.5 * 4)
    assert found["make_attention"].seconds == pytest.approx(20)
    assert found["prepare_data"].seconds == pytest.approx(3.0 * 10 / 6)
    assert found["evaluate"].seconds is None
    text = describe_time(found)
    assert text.startswith("about 12 min without make_masks, train_segmenter, evaluate: the first run on a machine")


def test_the_newest_artifact_counts(store: Store) -> None:
    old, new = plan(store, "seed=1"), plan(store, "seed=2")
    publish(store, old, "prepare_data", 3.0)
    for planned, seconds, written in ((old, 50.0, 2000), (new, 40.0, 1000)):
        path = publish(store, planned, "train_classifier", seconds)
        os.utime(path / "manifest.json", (written, written))
    assert look(store, plan(store))["train_classifier"].seconds == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("overrides", "run"),
    [
        ((), {"host": "elsewhere"}),
        ((), {"resumed": True}),
        ((), {"seconds": "soon"}),
        (("runtime.device=cuda",), {}),
        (("train_classifier.training.precision=bf16",), {}),
        (("train_classifier.training.steps=700",), {}),
    ],
    ids=["another host", "a continued build", "no number", "another device", "another precision", "much more work"],
)
def test_what_does_not_compare_is_no_history(store: Store, overrides: tuple[str, ...], run: dict[str, Any]) -> None:
    before = plan(store)
    publish(store, before, "prepare_data", 3.0)
    publish(store, before, "train_classifier", **{"seconds": 60.0, **run})
    assert look(store, plan(store, "seed=1", *overrides))["train_classifier"].seconds is None


def test_history_without_its_data_is_passed_over(store: Store) -> None:
    publish(store, plan(store), "train_classifier", 60.0)
    assert look(store, plan(store, "seed=1"))["train_classifier"].seconds is None


def test_nothing_is_estimated_where_all_is_cached(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(store)
    for stage in planned.keys:
        publish(store, planned, stage, 5.0)
    forced = look(store, planned, forced=4)
    assert list(forced) == ["train_segmenter", "evaluate"]
    assert describe_time(forced) == "about 10 s in all, going by earlier runs on this machine"
    assert "masks" not in str(describe_disk(forced)), "they are there"
    assert describe_disk({}) is None

    def unwanted(*_: object) -> None:
        raise AssertionError("a cached run reads nothing more")

    monkeypatch.setattr("pipeline.engine.estimate.facts_of_index", unwanted)
    monkeypatch.setattr("pipeline.engine.disk_projection.facts_of_index", unwanted)
    monkeypatch.setattr(Store, "newest_manifests", unwanted)
    assert look(store, planned) == {}


def test_begun_work_takes_at_most_its_whole_time(store: Store) -> None:
    before, planned = plan(store), plan(store, "seed=1")
    publish(store, before, "prepare_data", 3.0)
    publish(store, before, "train_classifier", 60.0)
    (store.work_dir("train_classifier", planned.keys["train_classifier"])[0] / "checkpoint.pt").write_bytes(b"x")
    assert describe_stage(look(store, planned)["train_classifier"]) == "30 steps, at most about 1 min"
    assert describe_stage(look(store, planned, forced=0)["train_classifier"]) == "30 steps, about 1 min"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "about 1 s"),
        (7.5, "about 8 s"),
        (38, "about 40 s"),
        (58, "about 1 min"),
        (170, "about 3 min"),
        (3590, "about 1 h"),
        (7790, "about 2 h 10 min"),
    ],
)
def test_times_are_told_no_finer_than_they_are_known(seconds: float, text: str) -> None:
    assert about(seconds) == text
