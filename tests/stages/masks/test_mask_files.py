"""How sure a pseudo-mask is: by hand, beside the masks, and through a stopped run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.contracts import Runtime, SilentProgress, read_index_mask
from stages.errors import DamagedFileError
from stages.make_masks import MakeMasksConfig, make_masks
from stages.masks.label_rules import ConfidentThresholds, map_probabilities
from stages.masks.mask_files import label_confidence, read_confidence, write_confidence
from stages.masks.refinements.chain import refine_in_steps
from stages.ops.crf.dense_crf import CrfConfig
from tests.stages.tiny_masks import COLOURS, TRAIN, attention_of, size_of, truth_of, write_world

SMALL_CRF = CrfConfig(bilateral_sxy_px=20, bilateral_srgb=10, gaussian_sxy_px=1, gaussian_weight=1, iterations=5)

World = tuple[Path, Path, Path]


def run(config: MakeMasksConfig, world: World, out: Path):
    return make_masks(
        config, images=world[0], attention=world[2], data_root=world[1], out=out, progress=SilentProgress(),
        runtime=Runtime(processes=1, device="cpu"),
    )  # fmt: skip


def test_confidence_is_the_probability_of_the_label() -> None:
    """Four pixels: background, class 1, class 3, unsure."""
    mask = np.array([[0, 1, 3, 255]], np.uint8)
    state = np.array([[[0.6, 0.2, 0.0, 0.9]], [[0.3, 0.8, 0.0, 0.05]], [[0.1, 0.0, 1.0, 0.05]]], np.float32)
    assert label_confidence(mask, (0, 2), [state]).tolist() == [[153, 204, 255, 0]]


def test_background_of_two_labellings_is_as_sure_as_the_less_sure_of_them() -> None:
    mask = np.array([[0, 1]], np.uint8)
    strict = np.array([[[0.8, 0.4]], [[0.2, 0.6]]], np.float32)
    loose = np.array([[[0.6, 0.0]], [[0.4, 1.0]]], np.float32)
    assert label_confidence(mask, (0,), [strict, loose]).tolist() == [[153, 153]]


def test_an_image_without_labels_is_surely_background() -> None:
    assert label_confidence(np.zeros((1, 2), np.uint8), (), []).tolist() == [[255, 255]]


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_states_of_a_crf_are_its_marginals(backend: str) -> None:
    record, truth = attention_of("t2", (0, 2), shrink=2), truth_of((0, 2), size_of("t2"))
    config = MakeMasksConfig(crf=SMALL_CRF.model_copy(update={"backend": backend}), soft=True)
    ((mask, states, _),) = refine_in_steps([COLOURS[truth]], [record], config)
    assert len(states) == 1
    np.testing.assert_allclose(states[0].sum(axis=0), 1, atol=1e-4)
    np.testing.assert_array_equal(np.array([0, 1, 3])[states[0].argmax(axis=0)], mask)
    sure = label_confidence(mask, record.labels, states)
    assert sure.min() > 255 / 3, "the likeliest of three"
    assert sure.max() > 250


def test_without_refinement_the_maps_say_how_sure_it_is(tmp_path: Path) -> None:
    """t0 has a cat: 255 inside, 100 on the edge, 10 elsewhere, cut at 0.3."""
    config = MakeMasksConfig(threshold=0.3, refine="none", soft=True)
    run(config, write_world(tmp_path), tmp_path / "out")
    record = attention_of("t0", (0,), shrink=2)
    found = read_confidence(tmp_path / "out" / "confidence" / "t0.png", record.size)
    expected = map_probabilities(record.maps, config).max(axis=0)
    np.testing.assert_allclose(found / 255, expected, atol=0.5 / 255 + 1e-6)
    inside, edge = found[record.maps[0] == 255], found[record.maps[0] == 100]
    assert set(inside.tolist()) == {255}
    assert 127 < edge.max() < 200
    with Image.open(tmp_path / "out" / "confidence" / "t0.png") as image:
        assert image.mode == "L"


def test_every_mask_has_one_and_the_masks_are_those_without(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    for name, options in {
        "crf": {"crf": SMALL_CRF},
        "confident": {"refine": "none", "confident": ConfidentThresholds(foreground_threshold=0.5)},
        "unsure": {"crf": SMALL_CRF, "conflict": "unsure"},
    }.items():
        plain = run(MakeMasksConfig(**options), world, tmp_path / name / "plain")
        soft = run(MakeMasksConfig(**options, soft=True), world, tmp_path / name / "soft")
        assert soft == plain
        assert not (tmp_path / name / "plain" / "confidence").exists()
        for image_id in TRAIN:
            path = tmp_path / name / "soft" / "masks" / f"{image_id}.png"
            assert path.read_bytes() == (tmp_path / name / "plain" / "masks" / path.name).read_bytes()
            sure = read_confidence(tmp_path / name / "soft" / "confidence" / path.name, size_of(image_id))
            np.testing.assert_array_equal(sure == 0, read_index_mask(path) == 255)


def test_a_mask_that_is_there_has_its_confidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed between the two files makes both again."""

    def killed(path: Path, mask: np.ndarray) -> None:
        raise KeyboardInterrupt

    world, config = write_world(tmp_path), MakeMasksConfig(refine="none", soft=True)
    run(config, world, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("stages.masks.building.write_index_mask", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, world, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.png")] == ["t0.png"]
    assert (tmp_path / "out" / "confidence" / "t0.png").exists()
    run(config, world, tmp_path / "out")
    for path in (tmp_path / "whole").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_confidence_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write_confidence(tmp_path / "x.png", np.zeros((2, 3), np.uint8))
    with pytest.raises(DamagedFileError, match=r"x\.png: expected \(3, 2\) pixels, found \(2, 3\)"):
        read_confidence(tmp_path / "x.png", (3, 2))
    with pytest.raises(DamagedFileError, match=r"y\.png: not a readable mask .*; rebuild make_masks with soft: true"):
        read_confidence(tmp_path / "y.png", (3, 2))
