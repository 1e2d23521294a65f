"""Options that a config sets and that nothing reads, because another one switches off what they belong to.

Pure; torch-free.  They are told and not refused: a run that tries ``--set make_masks.refine=none`` keeps its section
``crf``.  Options that contradict each other are refused by their own config class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline.config.run_config import RunConfig
from stages.train_segmenter import TrainSegmenterConfig
from stages.training.segmenter_objective import LOSS_OPTIONS


class _Rule(NamedTuple):
    """When some options of a section do nothing."""

    options: tuple[str, ...]
    is_idle: Callable[[Any], bool]
    """Of the section."""
    needed: str
    """What they count with."""


def idle_options(run: RunConfig) -> list[str]:
    """One line for each option that differs from its default and has no effect, of the stages that the run has."""
    sections: list[tuple[str, BaseModel, Sequence[_Rule]]] = [
        ("train_classifier.training", run.train_classifier.training, _TRAINING)
    ]
    if run.evaluate.segmentation:
        if run.train_segmenter.supervision == "weak":
            sections.append(("make_masks", run.make_masks, _MASKS))
        sections.append(("train_segmenter", run.train_segmenter, _SEGMENTER))
        sections.append(("train_segmenter.training", run.train_segmenter.training, _TRAINING))
        sections.append(("evaluate", run.evaluate, _EVALUATE))
    return [line for name, section, rules in sections for line in _idle(name, section, rules)]


def _idle(name: str, section: BaseModel, rules: Sequence[_Rule]) -> Iterator[str]:
    fields = type(section).model_fields
    for rule in rules:
        if not rule.is_idle(section):
            continue
        for option in rule.options:
            value = getattr(section, option)
            if value != fields[option].get_default(call_default_factory=True):
                found = "is set" if isinstance(value, BaseModel | tuple) else f"is {value}"
                yield f"{name}.{option} {found} and has no effect: it counts with {rule.needed}; set that or remove it"


# ---------------------------------------------------------------------------------------------------------------------
# The rules by section
# ---------------------------------------------------------------------------------------------------------------------


def _not_trained_with(loss: str) -> Callable[[TrainSegmenterConfig], bool]:
    return lambda section: loss not in section.losses


_TRAINING = (
    _Rule(("poly_power",), lambda section: section.schedule != "poly", "schedule: poly"),
    _Rule(("step_every", "step_factor"), lambda section: section.schedule != "step", "schedule: step"),
)

_MASKS = (
    _Rule(
        ("threshold",),
        lambda section: section.background != "constant" or section.confident is not None,
        "background: constant and confident: null",
    ),
    _Rule(
        ("background_power",),
        lambda section: section.background != "power" or section.confident is not None,
        "background: power and confident: null",
    ),
    _Rule(("crf", "unary", "label_confidence"), lambda section: "crf" not in section.chain, "crf in refine"),
    _Rule(("unary",), lambda section: "crf" in section.chain and section.confident is not None, "confident: null"),
    _Rule(
        ("label_confidence",),
        lambda section: "crf" in section.chain and section.unary != "labels" and section.confident is None,
        "unary: labels",
    ),
    _Rule(("par",), lambda section: "par" not in section.chain, "par in refine"),
    _Rule(("random_walk",), lambda section: "random_walk" not in section.chain, "random_walk in refine"),
)

_SEGMENTER = (
    *(_Rule((option,), _not_trained_with(loss), f"loss: {loss}") for loss, option in LOSS_OPTIONS.items()),
    _Rule(("loss_resolution",), lambda section: section.losses == {"sec"}, "another loss than sec"),
    _Rule(("retraining",), lambda section: section.rounds == 0, "rounds of 1 or more"),
)

_EVALUATE = (
    _Rule(("scales", "flip"), lambda section: not section.multi_scale, "multi_scale: true"),
    _Rule(("crf_config",), lambda section: not section.crf, "crf: true"),
)
