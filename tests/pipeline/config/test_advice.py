"""Options that another one switches off are told, all of them and no others."""

from __future__ import annotations

import pytest

from pipeline.config.advice import idle_options
from pipeline.config.run_config import RunConfig, find_config, load_config, shipped_configs


def load(*overrides: str) -> RunConfig:
    return load_config(find_config("demo"), overrides)


def test_no_shipped_config_has_an_idle_option() -> None:
    found = {path.stem: idle_options(load_config(path)) for path in shipped_configs()}
    assert not {name: lines for name, lines in found.items() if lines}


STEPS = "train_segmenter.training={steps: 9, schedule: step, step_every: 3}"


@pytest.mark.parametrize(
    ("path", "option", "needed"),
    [
        ("train_segmenter.retraining", "train_segmenter.retraining.flip=false", "train_segmenter.rounds=1"),
        ("train_segmenter.sec", "train_segmenter.sec.crf_shrink=8", "train_segmenter.loss=sec"),
        ("train_segmenter.bootstrap_trust", "=0.5", "train_segmenter.loss=bootstrapped_cross_entropy"),
        ("train_segmenter.label_smoothing", "=0.2", "train_segmenter.loss=smoothed_cross_entropy"),
        ("train_segmenter.training.step_factor", "=0.5", STEPS),
        ("make_masks.par", "make_masks.par.iterations=5", "make_masks.refine=[par, crf]"),
        ("make_masks.random_walk", "make_masks.random_walk.steps=4", "make_masks.refine=[random_walk, crf]"),
        ("make_masks.background_power", "=8", "make_masks.background=power"),
        ("evaluate.crf_config", "evaluate.crf_config.preset=psa", "evaluate.crf=true"),
    ],
)
def test_an_option_is_idle_until_what_it_belongs_to_is_there(path: str, option: str, needed: str) -> None:
    option = path + option if option.startswith("=") else option
    (line,) = idle_options(load(option))
    assert line.startswith(f"{path} is")
    # the option comes last: STEPS replaces the whole section
    assert not [line for line in idle_options(load(needed, option)) if line.startswith(f"{path} is")]


def test_all_are_told_at_once() -> None:
    found = idle_options(
        load(
            "train_segmenter.loss=sec",
            "train_segmenter.loss_resolution=cells",
            "train_segmenter.label_smoothing=0.2",
            "train_classifier.training.schedule=constant",
            "train_classifier.training.poly_power=2",
            "make_masks.refine=none",
            "make_masks.crf.preset=psa",
            "make_masks.label_confidence=0.9",
            "evaluate.multi_scale=false",
        )
    )
    assert [line.partition(" ")[0] for line in found] == [
        "train_classifier.training.poly_power",
        "make_masks.crf",
        "make_masks.label_confidence",
        "train_segmenter.label_smoothing",
        "train_segmenter.loss_resolution",
        "evaluate.scales",
    ]
    assert found[2] == (
        "make_masks.label_confidence is 0.9 and has no effect: it counts with crf in refine; set that or remove it"
    )


def test_a_loss_of_the_rounds_reads_its_option() -> None:
    rounds = ("train_segmenter.rounds=1", "train_segmenter.label_smoothing=0.2")
    assert len(idle_options(load(*rounds))) == 1
    assert not idle_options(load(*rounds, "train_segmenter.retraining.loss=smoothed_cross_entropy"))


def test_stages_that_do_not_run_have_no_idle_options() -> None:
    masks = ("make_masks.refine=none", "make_masks.crf.preset=psa")
    assert idle_options(load(*masks))
    assert not idle_options(load(*masks, "train_segmenter.supervision=full"))
    assert not idle_options(load(*masks, "evaluate.segmentation=false", "evaluate.localization={}"))
