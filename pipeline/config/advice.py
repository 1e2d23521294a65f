"""Advice about a config that can run but is seldom what its author means.

Two sizes for one network, options that nothing reads, a backend that depends on the machine.  Pure; torch-free.
It is only said: a run that tries ``--set make_masks.refine=none`` keeps its section ``crf``.  Options that contradict
each other are refused by their own config class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from pipeline.config.run_config import RunConfig
from stages.ops.crf.dense_crf import resolve_crf_backend
from stages.training.segmenter_objective import LOSS_OPTIONS


def config_warnings(run: RunConfig) -> list[str]:
    """One line for each piece of advice about the stages that the run has."""
    return _size_warnings(run) + _crf_warnings(run) + idle_options(run)


def _size_warnings(run: RunConfig) -> list[str]:
    """Networks that are used at another size of the images than they were trained at."""
    pairs: list[tuple[str, int | None, str, int | None]] = []
    trained = run.train_classifier.augment.seen_short_side_px
    if run.evaluate.segmentation and run.train_segmenter.supervision == "weak":
        pairs.append(("train_classifier", trained, "make_attention", run.make_attention.short_side_px))
        if run.make_masks.learns_affinity:
            used = run.make_masks.affinity.augment.seen_short_side_px
            pairs.append(("train_classifier", trained, "make_masks.affinity.augment", used))
    if run.evaluate.localization is not None:
        used = run.evaluate.localization.short_side_px
        pairs.append(("train_classifier", trained, "evaluate.localization", used))
    if run.evaluate.segmentation:
        seen = run.train_segmenter.augment.seen_short_side_px
        pairs.append(("train_segmenter", seen, "evaluate", run.evaluate.short_side_px))

    def pixels(short_side_px: int | None) -> str:
        return "null (the file's size)" if short_side_px is None else f"{short_side_px}"

    return [
        f"{training}.augment.short_side_px is {pixels(trained)} and {use}.short_side_px is {pixels(used)}: the "
        "network sees images at another size than it was trained at, which costs accuracy; give both the same"
        for training, trained, use, used in pairs
        if trained != used
    ]


def _crf_warnings(run: RunConfig) -> list[str]:
    """Where ``auto`` does not mean what it means on most machines: the backend is in the key."""
    makes_masks = run.train_segmenter.supervision == "weak" and run.make_masks.uses_crf
    used = {"make_masks.crf": run.make_masks.crf} if makes_masks else {}
    used |= {"evaluate.crf_config": run.evaluate.crf_config} if run.evaluate.crf else {}
    automatic = [name for name, crf in used.items() if crf.backend == "auto"]
    if not run.evaluate.segmentation or not automatic:
        return []
    meant, without_cuda = resolve_crf_backend("auto", run.runtime.device), resolve_crf_backend("auto")
    if meant == "numba":
        return []
    reason = "it works on the CUDA device" if meant != without_cuda else "numba is not installed or does not import"
    return [
        f"{' and '.join(automatic)}.backend: auto means {meant} here ({reason}), and the key says so; to share "
        "artifacts with machines where it means another, name a backend"
    ]


def idle_options(run: RunConfig) -> list[str]:
    """One line for each option that differs from its default and has no effect."""
    sections: list[tuple[str, BaseModel, tuple[_Rule, ...]]] = [
        ("train_classifier.training", run.train_classifier.training, _TRAINING)
    ]
    if run.evaluate.segmentation:
        if run.train_segmenter.supervision == "weak":
            sections.append(("make_masks", run.make_masks, _MASKS))
        sections.append(("train_segmenter", run.train_segmenter, _SEGMENTER))
        sections.append(("train_segmenter.training", run.train_segmenter.training, _TRAINING))
        sections.append(("evaluate", run.evaluate, _EVALUATE))
    lines = []
    for name, section, rules in sections:
        idle = {option: needed for options, is_idle, needed in rules if is_idle(section) for option in options}
        for option, needed in idle.items():
            value = getattr(section, option)
            if value != type(section).model_fields[option].get_default(call_default_factory=True):
                found = f"{name}.{option} {'is set' if isinstance(value, BaseModel | tuple) else f'is {value}'}"
                lines.append(f"{found} and has no effect: it counts with {needed}; set that or remove it")
    return lines


_Rule = tuple[tuple[str, ...], Callable[[Any], object], str]
"""Options, a test of their section that is true where they do nothing, and what they count with."""

_TRAINING: tuple[_Rule, ...] = (
    (("poly_power",), lambda s: s.schedule != "poly", "schedule: poly"),
    (("step_every", "step_factor"), lambda s: s.schedule != "step", "schedule: step"),
)

_MASKS: tuple[_Rule, ...] = (
    (("threshold",), lambda s: s.background != "constant" or s.confident, "background: constant and confident: null"),
    (("background_power",), lambda s: s.background != "power" or s.confident, "background: power and confident: null"),
    (("crf", "unary", "label_confidence"), lambda s: not s.uses_crf, "crf in refine"),
    (("unary",), lambda s: "crf" in s.chain and s.confident, "confident: null"),
    (("label_confidence",), lambda s: s.uses_crf and not s.starts_from_labels, "unary: labels"),
    *(((n,), lambda s, n=n: n not in s.chain, f"{n} in refine") for n in ("par", "random_walk", "affinity")),
)

_SEGMENTER: tuple[_Rule, ...] = (
    *(((option,), lambda s, loss=loss: loss not in s.losses, f"loss: {loss}") for loss, option in LOSS_OPTIONS.items()),
    (("loss_resolution",), lambda s: s.losses == {"sec"}, "another loss than sec"),
    (("retraining",), lambda s: s.rounds == 0, "rounds of 1 or more"),
    (("corrected_repeat",), lambda s: s.corrected_masks is None, "corrected_masks"),
)

_EVALUATE: tuple[_Rule, ...] = (
    (("scales", "flip"), lambda s: not s.multi_scale, "multi_scale: true"),
    (("crf_config",), lambda s: not s.crf, "crf: true"),
)
