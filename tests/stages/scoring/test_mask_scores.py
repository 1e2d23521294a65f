"""What each step of the pseudo-masks is worth: counted by hand from files, absent where no step was kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.contracts import SilentProgress, read_json, write_index_mask
from stages.errors import DamagedFileError
from stages.evaluate import EvaluateConfig, PseudoMasks, evaluate
from stages.make_masks import MakeMasksConfig, make_masks
from stages.masks.mask_files import step_path
from stages.ops.metrics.confusion import confusion_matrix, mean_iou, read_confusions
from stages.scoring.mask_scores import step_things
from tests.stages.test_make_masks import ONE, SMALL_CRF, SMALL_PAR
from tests.stages.tiny_masks import TRAIN, size_of, truth_of, write_world

World = tuple[Path, Path, Path]
CHAIN = MakeMasksConfig(refine=("par", "crf"), par=SMALL_PAR, crf=SMALL_CRF)


@pytest.fixture(autouse=True)
def _no_segmenter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of the training images alone."""
    monkeypatch.setattr("stages.evaluate._check_classes", lambda *_: None)
    monkeypatch.setattr("stages.evaluate._evaluate_segmenter", lambda *_: {})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return write_world(tmp_path)


def make(config: MakeMasksConfig, world: World, out: Path) -> Path:
    prepared, data, attention = world
    make_masks(
        config, images=prepared, attention=attention, data_root=data, out=out, progress=SilentProgress(), runtime=ONE
    )
    return out


def score(
    config: MakeMasksConfig, world: World, made: Path, *, exclude: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], SilentProgress]:
    prepared, data, attention = world
    progress = SilentProgress()
    result = evaluate(
        EvaluateConfig(), images=prepared, data_root=data, segmenter=Path("none"),
        pseudo_masks=PseudoMasks(attention, made, config, exclude), out=made / "scores", progress=progress, runtime=ONE,
    )  # fmt: skip
    return dict(result.metrics), progress


def cut(columns: int, *, unsure: bool = False) -> dict[str, np.ndarray]:
    """The true masks without the left ``columns`` of the image, which become background or 255."""
    masks = {image_id: truth_of(labels, size_of(image_id)) for image_id, labels in TRAIN.items()}
    for mask in masks.values():
        mask[:, :columns] = 255 if unsure else 0
    return masks


def write_step(made: Path, number: int, name: str, masks: Mapping[str, np.ndarray]) -> None:
    for image_id, mask in masks.items():
        write_index_mask(step_path(made, number, name, image_id), mask)


def miou_of(masks: Mapping[str, np.ndarray], unsure: str = "background") -> float:
    truths = cut(0)
    pairs = [(truths[image_id], mask) for image_id, mask in masks.items()]
    return mean_iou(sum(confusion_matrix(truth, mask, 4, unsure=unsure) for truth, mask in pairs))


def test_every_step_is_scored_from_its_own_files(world: World, tmp_path: Path) -> None:
    made = make(CHAIN, world, tmp_path / "made")
    unsure = cut(6, unsure=True)
    write_step(made, 0, "threshold", cut(10))
    write_step(made, 1, "par", unsure)
    for image_id, mask in cut(0).items():
        write_index_mask(made / "masks" / f"{image_id}.png", mask)
    metrics, progress = score(CHAIN, world, made)
    first, second, last = metrics["masks.steps"]
    assert (first["step"], second["step"], last["step"]) == ("threshold", "par", "crf")
    assert first["miou"] == first["miou_labelled"] == metrics["masks.miou_before_crf"] == miou_of(cut(10)) < 1
    assert second["miou"] == miou_of(unsure)
    assert second["miou_labelled"] == miou_of(unsure, "drop") == 1
    assert second["coverage"] == pytest.approx(1 - (2 * 6 * 24 + 3 * 6 * 32) / (5 * 24 * 32))
    assert (last["miou"], last["miou_labelled"], last["coverage"]) == (1, 1, 1)
    assert (metrics["masks.miou"], metrics["masks.coverage"]) == (last["miou"], last["coverage"])
    assert progress.warnings == []
    assert read_json(made / "scores" / "metrics.json")["masks.steps"] == metrics["masks.steps"]
    stored = read_confusions(made / "scores" / "confusions.npz")
    assert mean_iou(stored["masks_after_par"].total()) == second["miou"]
    assert {thing for pair in step_things(CHAIN.chain).values() for thing in pair} <= set(stored)


def test_images_that_were_trained_on_count_in_no_step(world: World, tmp_path: Path) -> None:
    made = make(CHAIN, world, tmp_path / "made")
    write_step(made, 0, "threshold", {**cut(0), "t0": cut(10)["t0"]})
    metrics, _ = score(CHAIN, world, made, exclude=frozenset({"t0"}))
    assert metrics["masks.steps"][0]["miou"] == 1


def test_the_first_step_is_what_attention_says_and_a_lost_file_is_damage(world: World, tmp_path: Path) -> None:
    """The file of step 0 and the mask counted anew from the maps are one."""
    config = CHAIN.model_copy(update={"threshold": 0.5, "conflict": "unsure"})
    made = make(config, world, tmp_path / "made")
    metrics, _ = score(config, world, made)
    assert metrics["masks.steps"][0]["miou"] == metrics["masks.miou_before_crf"] < 1
    next((made / "steps" / "0-threshold").iterdir()).unlink()
    shutil.rmtree(made / "scores")
    with pytest.raises(DamagedFileError, match=r"0-threshold.*not a readable mask"):
        score(config, world, made)


def test_without_refinement_no_step_is_scored(world: World, tmp_path: Path) -> None:
    config = MakeMasksConfig(refine="none")
    metrics, _ = score(config, world, make(config, world, tmp_path / "made"))
    assert "masks.steps" not in metrics
    assert metrics["masks.miou"] == 1


def test_the_step_that_lost_most_is_named(world: World, tmp_path: Path) -> None:
    made = make(CHAIN, world, tmp_path / "made")
    write_step(made, 0, "threshold", cut(0))
    write_step(made, 1, "par", cut(10))
    for image_id, mask in cut(11).items():
        write_index_mask(made / "masks" / f"{image_id}.png", mask)
    metrics, progress = score(CHAIN, world, made)
    lost = 1 - metrics["masks.steps"][1]["miou"]
    assert f"(255 as background), par lost most ({lost * 100:.1f} points); leave par out of" in progress.warnings[0]


@pytest.mark.parametrize("damage", ["missing", "size", "bytes"])
def test_a_damaged_step_is_named(world: World, tmp_path: Path, damage: str) -> None:
    made = make(CHAIN, world, tmp_path / "made")
    path = step_path(made, 1, "par", "t2")
    if damage == "size":
        write_index_mask(path, np.zeros((3, 4), np.uint8))
    else:
        path.unlink() if damage == "missing" else path.write_bytes(b"half a png")
    with pytest.raises(DamagedFileError, match=r"1-par/t2\.png.*rebuild make_masks"):
        score(CHAIN, world, made)


def test_masks_of_nothing_but_255_have_no_score_of_sure_pixels(world: World, tmp_path: Path) -> None:
    made = make(CHAIN, world, tmp_path / "made")
    write_step(made, 1, "par", cut(32, unsure=True))
    metrics, _ = score(CHAIN, world, made)
    assert set(metrics["masks.steps"][1]) == {"step", "miou", "coverage"}
    assert metrics["masks.steps"][1]["coverage"] == 0
