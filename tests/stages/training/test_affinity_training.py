"""Learned affinity inside make_masks: what it recovers, and that stops, parts and second calls change no byte."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.contracts import Part, Runtime, SilentProgress, read_index_mask, write_attention_shard
from stages.errors import ConfigError, DamagedFileError, InputError
from stages.make_masks import MakeMasksConfig, make_masks
from stages.masks.mask_files import read_steps, step_names
from tests.stages.test_make_masks import SMALL_CRF, _write_classifier
from tests.stages.tiny_masks import TRAIN, attention_of, size_of, truth_of, write_world

World = tuple[Path, Path, Path]
ONE = Runtime(processes=1, device="cpu", workers=0)
HEAD = {
    "stride_px": 4,
    "channels": 8,
    "radius_cells": 3,
    "augment": {"crop_px": 32, "scale": (1.0, 1.0)},
    "epochs": 6,
    "batch_size": 2,
    "log2_steps": 4,
}


def config_of(refine: str | list[str] = "affinity", **options: object) -> MakeMasksConfig:
    return MakeMasksConfig.model_validate({"refine": refine, "crf": SMALL_CRF, "affinity": {**HEAD, **options}})


def run(
    world: World,
    out: Path,
    config: MakeMasksConfig,
    *,
    part: Part | None = None,
    runtime: Runtime = ONE,
    seed: int = 0,
) -> SilentProgress:
    prepared, data, attention = world
    classifier = out.parent / "classifier"
    if not classifier.exists():
        _write_classifier(classifier)
    progress = SilentProgress()
    make_masks(
        config, images=prepared, attention=attention, data_root=data, out=out, progress=progress, runtime=runtime,
        part=part, classifier=classifier, seed=seed,
    )  # fmt: skip
    return progress


def files(out: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if not Path(name).name.startswith(".tmp-")}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the trainings that were begun."""
    from stages.training import affinity

    begun: list[Path] = []
    train = affinity.train_affinity
    monkeypatch.setattr(affinity, "train_affinity", lambda *a, **k: begun.append(k["out"]) or train(*a, **k))
    return begun


def test_affinity_recovers_a_region_that_the_maps_miss(tmp_path: Path) -> None:
    """The maps see the first five columns of an object; the CRF that makes the labels knows the colour of the rest."""
    world = write_world(tmp_path)
    records = []
    for image_id, labels in TRAIN.items():
        record = attention_of(image_id, labels)
        for target, label in zip(record.maps, labels, strict=True):
            columns = np.flatnonzero((truth_of(labels, size_of(image_id)) == label + 1).any(0))
            target[:, columns[5:]] = 10
        records.append(replace(record, maps=record.maps))
    for shard in (world[2] / "shards").iterdir():
        shard.unlink()
    write_attention_shard(world[2] / "shards" / "attention-00000.npz", records)
    scores = {}
    for refine in ("none", "affinity"):
        config = config_of(refine, stride_px=2, epochs=30, learning_rate=0.05).model_copy(update={"threshold": 0.3})
        run(world, tmp_path / refine, config)
        masks = {name: read_index_mask(tmp_path / refine / "masks" / f"{name}.png") for name in TRAIN}
        truths = {name: truth_of(labels, size_of(name)) for name, labels in TRAIN.items()}
        both = sum(int(((masks[n] == truths[n]) & (truths[n] > 0)).sum()) for n in TRAIN)
        either = sum(int(((masks[n] > 0) | (truths[n] > 0)).sum()) for n in TRAIN)
        scores[refine] = both / either
    assert scores["affinity"] > scores["none"] + 0.05, scores


def test_it_stands_before_the_refinements_of_pixels_with_a_step_of_its_own(tmp_path: Path) -> None:
    config = config_of(["affinity", "crf"])
    run(write_world(tmp_path), tmp_path / "out", config)
    assert step_names(config.chain) == ("threshold", "affinity", "crf")
    assert set(read_steps(tmp_path / "out", "t2")) == {"threshold", "affinity"}
    assert not (tmp_path / "out" / "affinity").exists(), "labels and checkpoint are left"
    history = json.loads((tmp_path / "out" / "affinity.json").read_text())["history"]
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_second_call_a_stop_and_parts_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[Path]
) -> None:
    from stages.training import loop

    world, config = write_world(tmp_path), config_of()
    run(world, tmp_path / "whole", config)
    expected = files(tmp_path / "whole")
    assert {"affinity.json", "affinity.safetensors", "stats.json", "masks/t0.png"} <= set(expected)
    (tmp_path / "whole" / "masks" / "t1.png").unlink()
    run(world, tmp_path / "whole", config)
    assert trainings == [tmp_path / "whole"], "a second call must not train again"
    assert files(tmp_path / "whole") == expected

    take_step, count = loop._Loop._take_step, iter(range(100))

    def stop(self: loop._Loop, batch: object) -> object:
        if next(count) == 5:
            raise KeyboardInterrupt
        return take_step(self, batch)  # pyright: ignore[reportArgumentType]

    often = ONE.model_copy(update={"checkpoint_every_s": 0.0})
    monkeypatch.setattr(loop._Loop, "_take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "stopped", config, runtime=often)
    assert (tmp_path / "stopped" / "affinity" / "checkpoint.pt").exists()
    assert not (tmp_path / "stopped" / "affinity.json").exists()
    monkeypatch.undo()
    run(world, tmp_path / "stopped", config, runtime=often)
    assert files(tmp_path / "stopped") == expected

    for index in range(2):
        run(world, tmp_path / "parts", config, part=Part(index, 2))
    run(world, tmp_path / "parts", config)
    assert files(tmp_path / "parts") == expected
    run(world, tmp_path / "seeded", config, seed=1)
    assert files(tmp_path / "seeded")["affinity.safetensors"] != expected["affinity.safetensors"]


def test_one_of_two_processes_in_one_folder_trains(tmp_path: Path, trainings: list[Path]) -> None:
    """As two parts that begin at once; here threads, whose locks are as two processes'."""
    world, config = write_world(tmp_path), config_of()
    run(world, tmp_path / "whole", config)
    trainings.clear()
    failed: list[BaseException] = []

    def part(index: int) -> None:
        try:
            run(world, tmp_path / "out", config, part=Part(index, 2))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=part, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert trainings == [tmp_path / "out"]
    run(world, tmp_path / "out", config)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_without_a_classifier_it_is_refused_before_work(tmp_path: Path) -> None:
    prepared, data, attention = write_world(tmp_path)
    with pytest.raises(ConfigError, match="refine: affinity compares the trained classifier's features"):
        make_masks(
            config_of(), images=prepared, attention=attention, data_root=data, out=tmp_path / "out",
            progress=SilentProgress(), runtime=ONE,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_maps_in_which_nothing_is_surely_an_object_are_refused(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    for shard in (world[2] / "shards").iterdir():
        shard.unlink()
    empty = [attention_of(image_id, labels) for image_id, labels in TRAIN.items()]
    empty = [replace(record, maps=np.zeros_like(record.maps)) for record in empty]
    write_attention_shard(world[2] / "shards" / "attention-00000.npz", empty)
    with pytest.raises(InputError, match=r"no training image has any; lower make_masks\.affinity\.confident"):
        run(world, tmp_path / "out", config_of())


def test_a_damaged_head_is_named(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    run(world, tmp_path / "out", config_of())
    (tmp_path / "out" / "affinity.json").write_text("{}")
    with pytest.raises(DamagedFileError, match="does not describe a trained affinity; rebuild make_masks"):
        run(world, tmp_path / "out", config_of())
