"""What a CRF starts from wherever it stands in the chain, and the masks between the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from stages.contracts import Part, Runtime, SilentProgress, read_index_mask, read_json, write_json
from stages.make_masks import MakeMasksConfig, make_masks
from stages.masks.label_rules import ConfidentThresholds, initial_mask, map_probabilities, upsample_maps
from stages.masks.mask_files import read_steps, step_names
from stages.masks.refinements.chain import refine_in_steps
from stages.masks.refinements.config import REFINEMENTS
from stages.ops.crf.dense_crf import dense_crf, label_unary
from stages.ops.metrics.confusion import confusion_matrix, mean_iou
from stages.ops.par import ParBatch
from tests.stages.test_make_masks import ONE, SMALL_CRF, SMALL_PAR, SMALL_WALK, _noisy, _write_classifier
from tests.stages.tiny_masks import TRAIN, attention_of, size_of, truth_of, write_world

World = tuple[Path, Path, Path]
SMALL = {"crf": SMALL_CRF, "par": SMALL_PAR, "random_walk": SMALL_WALK}
PAIR = ConfidentThresholds(foreground_threshold=0.5, background_threshold=0.2)


def run(
    world: World,
    out: Path,
    refine: Sequence[str] | str,
    options: Mapping[str, object] | None = None,
    *,
    part: Part | None = None,
    runtime: Runtime = ONE,
) -> MakeMasksConfig:
    prepared, data, attention = world
    config = MakeMasksConfig.model_validate({**SMALL, "refine": refine, **(options or {})})
    classifier = _write_classifier(out.parent / "classifier") if config.walks else None
    make_masks(
        config, images=prepared, attention=attention, data_root=data, out=out, progress=SilentProgress(),
        runtime=runtime, part=part, classifier=classifier,
    )  # fmt: skip
    return config


def step_files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in (out / "steps").rglob("*.png")}


@pytest.mark.parametrize("name", REFINEMENTS)
def test_every_refinement_has_options_that_enter_the_key_only_where_it_is_in_the_chain(name: str) -> None:
    config = MakeMasksConfig(refine=name)
    assert config.chain == (name,)
    assert name in config.key_content()
    assert name == "crf" or name not in MakeMasksConfig(refine="none").key_content(), "make_masks' key has its own CRF"


@pytest.mark.parametrize("name", [name for name, refinement in REFINEMENTS.items() if refinement.open is not None])
@pytest.mark.parametrize("refine_again", [False, True])
def test_every_refinement_of_pixels_gives_probabilities_of_the_labels_at_hand(name: str, refine_again: bool) -> None:
    chain = [*(other for other in ("par", "crf") if other != name), name] if refine_again else name
    config = MakeMasksConfig.model_validate({**SMALL, "refine": chain})
    images = {"t2": (0, 2), "t1": (1,)}
    pixels = [_noisy(truth_of(labels, size_of(image_id))) for image_id, labels in images.items()]
    found = refine_in_steps(pixels, [attention_of(*image) for image in images.items()], config)
    for made, (image_id, labels) in zip(found, images.items(), strict=True):
        size = size_of(image_id)
        assert made.mask.shape == size
        assert set(np.unique(made.mask)) <= {0, *(label + 1 for label in labels)}
        (state,) = made.states
        assert state.shape == (len(labels) + 1, *size)
        np.testing.assert_allclose(state.sum(axis=0), 1, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What a CRF starts from
# ---------------------------------------------------------------------------------------------------------------------


# few and weak: what it started from shows in what it gives
WEAK_CRF = SMALL_CRF.model_copy(update={"iterations": 1, "bilateral_weight": 0.02, "gaussian_weight": 0.01})


def behind_par(**options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PAR's probabilities of t2 and those of [par, crf], (3, H, W); the mask of [par, crf]."""
    record, truth = attention_of("t2", (0, 2), shrink=4), truth_of((0, 2), size_of("t2"))
    image = _noisy(truth)
    given = {"refine": ["par", "crf"], "par": SMALL_PAR, "crf": WEAK_CRF, "threshold": 0.5, **options}
    config = MakeMasksConfig.model_validate(given)
    start = ParBatch([image], SMALL_PAR).refine([map_probabilities(upsample_maps(record), config)])[0]
    (found,) = refine_in_steps([image], [record], config)
    return start, found.states[0], found.mask


@pytest.mark.parametrize("confidence", [0.6, 0.95])
def test_a_crf_behind_par_starts_from_the_most_probable_labels(confidence: float) -> None:
    start, found, mask = behind_par(label_confidence=confidence)
    image = _noisy(truth_of((0, 2), size_of("t2")))
    labels = np.exp(-label_unary(start.argmax(axis=0), 3, confidence))
    np.testing.assert_allclose(found, dense_crf(image, labels, WEAK_CRF), atol=1e-5)
    assert np.abs(found - dense_crf(image, start, WEAK_CRF)).max() > 0.1, "the two starts cannot be told apart"
    np.testing.assert_array_equal(mask, np.array([0, 1, 3])[found.argmax(axis=0)])


def test_unary_maps_hands_par_s_probabilities_on() -> None:
    start, found, _ = behind_par(unary="maps")
    expected = dense_crf(_noisy(truth_of((0, 2), size_of("t2"))), start, WEAK_CRF)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_with_confident_a_crf_starts_from_labels_wherever_it_stands() -> None:
    record, truth = attention_of("t0", (0,), shrink=4), truth_of((0,), size_of("t0"))
    config = MakeMasksConfig.model_validate({"refine": ["par", "crf"], **SMALL, "crf": WEAK_CRF, "confident": PAIR})
    labels, maps = (
        refine_in_steps([_noisy(truth)], [record], config.model_copy(update={"unary": unary}))[0].states
        for unary in ("labels", "maps")
    )
    assert len(labels) == 2, "the strict and the loose"
    np.testing.assert_array_equal(labels, maps)


# ---------------------------------------------------------------------------------------------------------------------
# The masks between the steps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", ["crf", "par", ["par", "crf"], ["random_walk"], ["random_walk", "par", "crf"]])
@pytest.mark.parametrize("options", [{}, {"confident": PAIR}, {"conflict": "unsure"}, {"conflict": "smallest_area"}])
def test_the_masks_between_the_steps_are_those_of_the_shorter_chains(
    tmp_path: Path, refine: str | list[str], options: dict[str, object]
) -> None:
    world = write_world(tmp_path)
    config = run(world, tmp_path / "out", refine, options)
    for length, name in enumerate(step_names(config.chain)[:-1]):
        shorter = tmp_path / f"only-{length}"
        run(world, shorter, config.chain[:length] or "none", options)
        folder = tmp_path / "out" / "steps" / f"{length}-{name}"
        assert {path.stem for path in folder.iterdir()} == set(TRAIN)
        for path in folder.iterdir():
            assert path.read_bytes() == (shorter / "masks" / path.name).read_bytes(), name
    steps = read_steps(tmp_path / "out", "t2")
    assert tuple(steps) == step_names(config.chain)[:-1]
    assert len(list((tmp_path / "out" / "steps").iterdir())) == len(config.chain)


def test_without_refinement_there_are_no_steps(tmp_path: Path) -> None:
    run(write_world(tmp_path), tmp_path / "out", "none")
    assert not (tmp_path / "out" / "steps").exists()
    assert read_steps(tmp_path / "out", "t2") == {}


def test_steps_are_kept_of_every_image_and_no_true_mask_is_read(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    index = read_json(world[0] / "index.json")
    index["splits"]["train_score"] = ["t1", "t3"]
    write_json(world[0] / "index.json", index)
    for path in (world[1] / "masks").iterdir():
        path.unlink()
    run(world, tmp_path / "out", ["par", "crf"])
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 5
    assert set(step_files(tmp_path / "out")) == {
        f"steps/{step}/{image_id}.png" for step in ("0-threshold", "1-par") for image_id in TRAIN
    }
    assert (read_steps(tmp_path / "out", "t3")["par"] == 0).all(), "an image without labels is background throughout"


def test_processes_parts_and_a_stop_change_no_step(tmp_path: Path) -> None:
    world, chain = write_world(tmp_path), ["random_walk", "par", "crf"]
    run(world, tmp_path / "whole", chain)
    files = step_files(tmp_path / "whole")
    assert len(files) == 15
    run(world, tmp_path / "two", chain, runtime=Runtime(processes=2, device="cpu"))
    for index in range(2):
        run(world, tmp_path / "parts", chain, part=Part(index, 2))
    (tmp_path / "whole" / "masks" / "t2.png").unlink()
    for path in (tmp_path / "whole" / "steps").rglob("t2.png"):
        path.write_bytes(b"half a png")
    run(world, tmp_path / "whole", chain)
    for name in ("whole", "two", "parts"):
        assert step_files(tmp_path / name) == files


def test_a_mask_is_written_after_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask says that the image is done: whoever stops before it makes the steps again."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    world = write_world(tmp_path)
    monkeypatch.setattr("stages.masks.building.write_steps", stop)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "out", "crf")
    assert not list((tmp_path / "out").rglob("*.png"))
    monkeypatch.undo()
    run(world, tmp_path / "out", "crf")
    assert len(step_files(tmp_path / "out")) == 5


def test_steps_are_asked_for(tmp_path: Path) -> None:
    record, truth = attention_of("t2", (0, 2), shrink=2), truth_of((0, 2), size_of("t2"))
    config = MakeMasksConfig.model_validate({"refine": ["par", "crf"], **SMALL})
    images: Sequence[np.ndarray] = [_noisy(truth)]
    (plain,) = refine_in_steps(images, [record], config)
    (kept,) = refine_in_steps(images, [record], config, keep_steps=True)
    assert plain.before == ()
    np.testing.assert_array_equal(plain.mask, kept.mask)
    np.testing.assert_array_equal(kept.before[0], initial_mask(record, config))
    assert len(kept.before) == 2


# ---------------------------------------------------------------------------------------------------------------------
# A threshold chosen behind a walk
# ---------------------------------------------------------------------------------------------------------------------


def test_a_sweep_before_a_walk_scores_the_walked_maps(tmp_path: Path) -> None:
    """The chosen threshold is the best of those tried one by one on the walk's own masks."""
    world = write_world(tmp_path)
    run(world, tmp_path / "out", "random_walk", {"sweep": {"num_images": 4}})
    sweep = read_json(tmp_path / "out" / "stats.json")["sweep"]
    scores = {}
    for cut in sorted({*range(0, 255, 16), round(sweep["threshold"] * 255)}):
        out = tmp_path / f"cut-{cut}"
        run(world, out, "random_walk", {"threshold": cut / 255})
        made = {i: read_index_mask(out / "masks" / f"{i}.png") for i in sweep["image_ids"]}
        counted = [confusion_matrix(truth_of(TRAIN[i], size_of(i)), mask, 4) for i, mask in made.items()]
        scores[cut] = mean_iou(np.sum(counted, axis=0))
    assert scores[round(sweep["threshold"] * 255)] == sweep["miou"] == max(scores.values())
    assert len(set(scores.values())) > 3, "the threshold matters"
    for image_id in TRAIN:
        folders = ("out", f"cut-{round(sweep['threshold'] * 255)}")
        swept, fixed = (tmp_path / folder / "masks" / f"{image_id}.png" for folder in folders)
        assert swept.read_bytes() == fixed.read_bytes()


def test_confident_and_sweep_stay_apart_behind_a_walk() -> None:
    with pytest.raises(ValidationError, match="sweep chooses threshold, which confident does not use"):
        MakeMasksConfig.model_validate({"sweep": {}, "refine": "random_walk", "confident": {}})
