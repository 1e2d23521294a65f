"""Refinements in keys: numbers count only where they are used."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.stage_table import TABLE, DataState, StageCall
from stages.errors import ConfigError


def _plan(cache: Path, *overrides: str) -> Plan:
    return plan_run(load_model(RunConfig, find_config("demo"), ["data.num_train=4", *overrides]), cache)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "digests.json"


def test_a_list_of_one_is_its_name(cache: Path) -> None:
    assert _plan(cache, "make_masks.refine=[crf]").keys == _plan(cache, "make_masks.refine=crf").keys


@pytest.mark.parametrize(
    ("refine", "override", "counts"),
    [
        ("crf", "par.iterations=3", False),
        ("[par,crf]", "par.iterations=3", True),
        ("[par,crf]", "crf.iterations=3", True),
        ("par", "crf.iterations=3", False),
        ("par", "random_walk.steps=3", False),
        ("random_walk", "random_walk.steps=3", True),
        ("[random_walk,crf]", "crf.preset=sec", True),
        ("[random_walk,crf]", "affinity.epochs=3", False),
        ("affinity", "affinity.epochs=3", True),
        ("affinity", "crf.preset=sec", True),
        ("affinity", "random_walk.steps=3", False),
    ],
)
def test_numbers_count_where_their_refinement_is_in_the_chain(
    cache: Path, refine: str, override: str, counts: bool
) -> None:
    before = _plan(cache, f"make_masks.refine={refine}").keys["make_masks"]
    after = _plan(cache, f"make_masks.refine={refine}", f"make_masks.{override}").keys["make_masks"]
    assert (before != after) == counts


def test_the_seed_counts_where_affinity_is_learned() -> None:
    """The classifier's key has it too, so the key's own content is compared."""
    for refine, counts in (("affinity", True), ("random_walk", False)):
        run = load_model(RunConfig, find_config("demo"), [f"make_masks.refine={refine}", "seed=7"])
        assert (TABLE.spec("make_masks").key_parts(run, DataState()).get("seed") == 7) == counts


def test_order_counts(cache: Path) -> None:
    keys = {_plan(cache, f"make_masks.refine={chain}").keys["make_masks"] for chain in ("[par,crf]", "[crf,par]")}
    assert len(keys) == 2


@pytest.mark.parametrize(("refine", "walks"), [("[random_walk,crf]", True), ("affinity", True), ("[par,crf]", False)])
def test_only_a_walk_reads_the_classifier(cache: Path, refine: str, walks: bool) -> None:
    plan = _plan(cache, f"make_masks.refine={refine}")
    assert ("train_classifier" in plan.inputs("make_masks")) == walks
    inputs = {name: Path(name) for name in plan.inputs("make_masks")}
    arguments = TABLE.spec("make_masks").arguments(StageCall(plan.run, inputs, None, frozenset()))
    assert arguments["classifier"] == (Path("train_classifier") if walks else None)


@pytest.mark.parametrize(
    ("refine", "message"),
    [
        ("crff", "there is no refinement 'crff'; did you mean 'crf'?"),
        ("[par, random-walk]", "there is no refinement 'random-walk'; did you mean 'random_walk'?"),
        ("[xyz]", "there is no refinement 'xyz'; expected none, or one or a list of crf, par, random_walk, affinity"),
        (
            "[[crf]]",
            "a refinement is a name, not ['crf']; expected none, or one or a list of crf, par, random_walk, affinity",
        ),
        ("[]", "expected none, or one or a list of crf, par, random_walk, affinity"),
        ("null", "expected none, or one or a list of crf, par, random_walk, affinity"),
        ("[none, crf]", "none stands alone"),
        ("[crf, par, crf]", "a refinement may stand once, found crf again"),
        ("[par, random_walk]", "put it first: [random_walk, …]"),
        ("[crf, affinity]", "put it first: [affinity, …]"),
        ("[random_walk, affinity]", "random_walk and affinity both walk over the coarse maps"),
    ],
)
def test_a_chain_that_cannot_be_is_refused(refine: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(RunConfig, find_config("demo"), [f"make_masks.refine={refine}"])
    assert message in str(caught.value)


def test_another_precision_than_fp32_is_in_the_key_of_what_it_decides(cache: Path) -> None:
    plain = _plan(cache)
    for stage, changed in (
        ("make_attention", {"make_attention", "make_masks", "train_segmenter", "evaluate"}),
        ("evaluate", {"evaluate"}),
    ):
        assert _plan(cache, f"{stage}.precision=fp32").keys == plain.keys
        assert "precision" not in plain.contents[stage]["config"]
        other = _plan(cache, f"{stage}.precision=bf16")
        assert other.contents[stage]["config"]["precision"] == "bf16"
        assert {name for name, key in other.keys.items() if key != plain.keys[name]} == changed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masks_are_told_the_precision_of_attention(cache: Path, precision: str) -> None:
    plan = _plan(cache, f"make_attention.precision={precision}", "make_masks.refine=random_walk")
    inputs = {name: Path(name) for name in plan.inputs("make_masks")}
    arguments = TABLE.spec("make_masks").arguments(StageCall(plan.run, inputs, None, frozenset()))
    assert arguments["precision"] == precision
