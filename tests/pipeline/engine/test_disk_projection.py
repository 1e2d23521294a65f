"""A run that the disk cannot hold is refused before it builds anything; what is there already does not count."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.disk_projection import DiskProjection, describe_bytes, human_bytes, project_disk, require_space
from pipeline.engine.disk_sizes import classifier_bytes, segmenter_bytes
from pipeline.engine.making import MIN_FREE_BYTES
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.run import run_pipeline, run_stage
from pipeline.engine.shards import shards_of
from pipeline.store.artifacts import Store
from stages.errors import EnvironmentFailure

Usage = namedtuple("Usage", "total used free")
PHOTOGRAPHS = ("data.num_train=20000", "data.num_val=2", "data.size_px=256")
"""20,000 images of 65,536 pixels, each with at least one label: 4,096 cells a map."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def plan(store: Store, *overrides: str) -> Plan:
    return plan_run(load_model(RunConfig, find_config("demo"), [*PHOTOGRAPHS, *overrides]), store.digest_cache)


def set_free(monkeypatch: pytest.MonkeyPatch, free: float) -> list[Path]:
    """Let every disk have ``free`` bytes; the folders that are asked for."""
    asked: list[Path] = []

    def usage(folder: Path) -> Usage:
        asked.append(Path(folder))
        return Usage(2**50, 0, int(free))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return asked


def test_just_enough_is_enough_and_a_byte_less_is_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(store)
    needed = project_disk(planned, store, list(planned.keys)).total_bytes + MIN_FREE_BYTES
    asked = set_free(monkeypatch, needed + 1)
    require_space(planned, store, list(planned.keys))
    assert asked == [store.root.parent], "the store is not there yet: the folder that it will be made in"
    set_free(monkeypatch, needed - 1)
    with pytest.raises(EnvironmentFailure, match="to stay free"):
        require_space(planned, store, list(planned.keys))


def test_the_message_says_what_is_needed_for_what_and_every_way_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, 50e6)
    with pytest.raises(EnvironmentFailure) as caught:
        require_space(plan(store), store, ["make_attention", "make_masks"])
    text = caught.value.message
    assert text.startswith(f"{store.root.parent}: 50 MB free, and this run writes at most about ")
    assert "MB attention maps" in text
    assert "MB masks" in text
    assert "wsss artifacts prune" in text
    assert "--artifacts DIR" in text
    assert "make_attention.map_stride=8" in text
    assert "make_attention.keep_maps=false" in text


def test_only_remedies_that_help_this_run_are_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 0)
    for options, stage in (([], "make_masks"), (["make_attention.keep_maps=false"], "make_attention")):
        with pytest.raises(EnvironmentFailure) as caught:
            require_space(plan(store, *options), store, [stage])
        assert "make_attention." not in caught.value.message
        assert caught.value.message.endswith("(wsss artifacts prune) or choose another disk with --artifacts DIR")
    with pytest.raises(EnvironmentFailure) as caught:
        require_space(plan(store, "make_attention.map_stride=8"), store, ["make_attention"])
    assert "map_stride" not in caught.value.message
    assert "keep_maps=false" in caught.value.message


def test_stages_that_are_there_and_work_that_is_begun_do_not_count(store: Store) -> None:
    planned = plan(store)
    whole = project_disk(planned, store, ["make_attention", "make_masks"])
    assert set(whole.bytes_by_stage) == {"make_attention", "make_masks"}
    work, _ = store.work_dir("make_masks", planned.keys["make_masks"])
    (work / "masks").mkdir()
    (work / "masks" / "a.png").write_bytes(b"x" * 1_000_000)
    begun = project_disk(planned, store, ["make_masks"])
    assert begun.bytes_by_stage["make_masks"] == whole.bytes_by_stage["make_masks"] - 1_000_000
    assert project_disk(planned, store, []) == DiskProjection()


def test_shards_that_are_finished_or_begun_do_not_count(store: Store) -> None:
    planned = plan(store, "runtime.shards=2")
    whole = project_disk(planned, store, ["make_masks"]).bytes_by_stage["make_masks"]
    first, second = shards_of("make_masks", planned.keys["make_masks"], 2)
    for folder in (store.path(*first.place), store.work_path(*second.place)):
        (folder / "masks").mkdir(parents=True)
        (folder / "masks" / "a.png").write_bytes(b"x" * 1_000_000)
    work, _ = store.work_dir("make_masks", planned.keys["make_masks"])
    (work / "b.png").hardlink_to(store.path(*first.place) / "masks" / "a.png")
    assert project_disk(planned, store, ["make_masks"]).bytes_by_stage["make_masks"] == whole - 2_000_000


def test_a_coarser_grid_a_quarter_of_the_maps(store: Store) -> None:
    fine, coarse = (
        project_disk(plan(store, f"make_attention.map_stride={stride}"), store, ["make_attention"]).total_bytes
        for stride in (4, 8)
    )
    headers = 20_000 * 1024
    assert (fine - headers) / 4 == pytest.approx(coarse - headers)


def test_a_run_is_refused_before_it_leaves_a_trace(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(store)
    set_free(monkeypatch, 1e6)
    with pytest.raises(EnvironmentFailure, match="to stay free"):
        run_pipeline(planned.run, store, plan=planned)
    with pytest.raises(EnvironmentFailure, match="to stay free"):
        run_stage("prepare_data", planned.run, store)
    assert [path.name for path in store.root.glob("*")] == []


def test_the_command_says_the_bytes_and_ends_with_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    set_free(monkeypatch, 3e8)
    words = ["run", "demo", "--engine", "local", "--json", *(w for text in PHOTOGRAPHS for w in ("--set", text))]
    assert cli.main(words) == 4
    captured = capsys.readouterr()
    assert "disk:         at most about" in captured.err
    error = json.loads(captured.out)["error"]
    assert error["code"] == 4
    assert "300 MB free" in error["message"]
    assert not list(tmp_path.glob("artifacts/*/*"))


def test_a_net_of_unknown_size_is_said_not_guessed(store: Store) -> None:
    net = "train_segmenter.net={name: deeplabv3plus, encoder: dpn68, pretrained: false}"
    found = project_disk(plan(store, net, "train_segmenter.init=random"), store, ["train_segmenter", "evaluate"])
    assert found.unknown == ("train_segmenter",)
    assert found.describe() == "at most about 0.1 MB, without train_segmenter, whose size is unknown"


@pytest.mark.parametrize(
    ("count", "text"),
    [(3e4, "0.1 MB"), (2.34e6, "2.3 MB"), (1.816e8, "182 MB"), (1.94e9, "1.9 GB"), (4e12, "4,000.0 GB")],
)
def test_bytes_are_told_no_finer_than_they_are_known(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_the_largest_part_comes_first() -> None:
    text = describe_bytes({"make_masks": 2e8, "make_attention": 3e9, "prepare_data": 10.0})
    assert text == "at most about 3.2 GB (3.0 GB attention maps, 200 MB masks)"


METHODS = ("cam", "acol", "spg", "adl")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["small", "vgg16", "resnet50"])
def test_the_classifiers_weights_fit_into_what_is_projected(name: str, method: str) -> None:
    import torch

    from stages.contracts import ClassList
    from stages.methods.classifier_files import ClassifierDescription, build_classifier

    backbone = {"name": name, "pretrained": False}
    fields = {"backbone": backbone, "method": {"name": method}, "classes": ClassList(names=("auk", "bee"))}
    description = ClassifierDescription.model_validate(fields)
    with torch.device("meta"):
        classifier, _ = build_classifier(description, {})
    num_weights = sum(tensor.numel() for tensor in classifier.state_dict().values())
    config = {**description.model_dump(mode="json"), "training": {}}
    projected = classifier_bytes(config)
    assert projected is not None
    # twice weights and momentum, and the weights: five copies of four bytes
    assert 0.98 * 20 * num_weights <= projected <= 2.5 * 20 * num_weights


@pytest.mark.parametrize(
    "net",
    [
        {"name": "largefov", "backbone": {"name": "small"}},
        {"name": "largefov", "backbone": {"name": "vgg16", "pretrained": False}},
        {"name": "deeplabv3", "encoder": "resnet50", "pretrained": False},
        {"name": "deeplabv3plus", "encoder": "resnet34", "pretrained": False},
        {"name": "deeplabv3plus", "encoder": "resnet101", "pretrained": False},
    ],
    ids=lambda net: "-".join(map(str, net.values())),
)
def test_the_segmenters_weights_fit_into_what_is_projected(net: dict) -> None:
    import torch
    from pydantic import TypeAdapter

    from stages.nets.segmenters.build import build_segmenter
    from stages.nets.segmenters.config import SegmenterConfig

    config = TypeAdapter(SegmenterConfig).validate_python(net)
    with torch.device("meta"):
        segmenter = build_segmenter(config, 21, init="random", weights={})
    num_weights = sum(tensor.numel() for tensor in segmenter.state_dict().values())
    projected = segmenter_bytes({"net": config.model_dump(mode="json"), "training": {"ema_decay": None}}, 9, None)
    assert projected is not None
    assert 0.95 * 20 * num_weights <= projected <= 2.5 * 20 * num_weights


def test_the_best_weights_and_the_rounds_are_projected() -> None:
    config = {"net": {"name": "deeplabv3", "encoder": "resnet18", "decoder_channels": 256}, "training": {}}
    weights = 4 * (11.19e6 + 17e6)
    assert segmenter_bytes(config, 9, None) == 5 * weights
    # the best weights lie in the checkpoint, which is there twice while it is replaced, and as a file in the end
    watched = config | {"validation": {}}
    assert segmenter_bytes(watched, 9, None) == 8 * weights
    # each round has finished weights, and 9 masks of 1,000 pixels at 0.05 bytes and a block of 4 KiB
    masks = 9 * (50 + 4096)
    assert segmenter_bytes(config | {"rounds": 2}, 9, 1000.0) == 5 * weights + 2 * (weights + masks)
    assert segmenter_bytes(watched | {"rounds": 2}, 9, 1000.0) == 8 * weights + 2 * (2 * weights + masks)
    assert segmenter_bytes(config | {"rounds": 2}, 9, None) is None
