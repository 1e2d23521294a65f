"""A key changes when, and only when, something changes that decides the result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.plan import STAGES, plan_run, stage_key
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.synthetic_images import generate_synthetic

DEMO = find_config("demo")


def keys(cache: Path, *overrides: str) -> dict[str, str]:
    return dict(plan_run(load_model(RunConfig, DEMO, overrides), cache).keys)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / ".digests.json"


def test_stage_names_are_the_modules_and_the_sections() -> None:
    assert STAGES == (
        "prepare_data",
        "train_classifier",
        "make_attention",
        "make_masks",
        "train_segmenter",
        "evaluate",
    )
    assert set(STAGES) < set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("override", "first_changed"),
    [
        ("name=other", None),
        ("runtime.device=cpu", None),
        ("runtime.workers=0", None),
        ("runtime.processes=3", None),
        ("runtime.threads=2", None),
        ("weights.vgg16=not/needed/here.pth", None),
        ("seed=1", "train_classifier"),
        ("data.size_px=64", "prepare_data"),
        ("train_classifier.training.precision=bf16", "train_classifier"),
        ("make_attention.flip=false", "make_attention"),
        ("make_masks.crf.iterations=5", "make_masks"),
        ("make_masks.refine=none", "make_masks"),
        ("train_segmenter.training.learning_rate=0.03", "train_segmenter"),
        ("evaluate.flip=false", "evaluate"),
    ],
)
def test_a_change_reaches_its_stage_and_what_follows(cache: Path, override: str, first_changed: str | None) -> None:
    before = keys(cache)
    after = keys(cache, override)
    first = len(STAGES) if first_changed is None else STAGES.index(first_changed)
    assert [name for name in STAGES if before[name] != after[name]] == list(STAGES[first:])


def test_a_sweep_is_in_the_key_by_what_it_chooses_and_not_the_threshold_that_it_replaces(
    cache: Path, tmp_path: Path
) -> None:
    def content(*overrides: str) -> dict[str, Any]:
        contents = plan_run(load_model(RunConfig, DEMO, overrides), cache).contents
        return dict(contents["make_masks"]["config"])

    plain = content()
    swept = {name: value for name, value in plain.items() if name != "threshold"}
    assert content("make_masks.sweep={}") == {**swept, "sweep": {"num_images": 100, "seed": 0}}
    assert content("make_masks.sweep={}", "make_masks.threshold=0.9") == content("make_masks.sweep={}")
    (tmp_path / "ids.txt").write_text("train_00002\ntrain_00001")
    listed = content(f"make_masks.sweep={{image_list: {tmp_path}/ids.txt}}")
    assert listed == {**swept, "sweep": {"ids": ["train_00001", "train_00002"]}}


def test_numbers_of_a_crf_that_does_not_run_are_in_no_key(cache: Path) -> None:
    before = keys(cache, "make_masks.refine=none")
    assert keys(cache, "make_masks.refine=none", "make_masks.crf.iterations=5") == before
    assert keys(cache, "evaluate.crf_config.iterations=5")["evaluate"] == keys(cache)["evaluate"]


def test_the_backend_that_really_runs_is_in_the_key(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.ops.crf.dense_crf._has_pydensecrf", lambda: True)
    quick = keys(cache)
    assert quick == keys(cache, "make_masks.crf.backend=numba")
    monkeypatch.setattr("stages.ops.crf.dense_crf._has_numba", lambda: False)
    assert keys(cache)["make_masks"] != quick["make_masks"]
    assert keys(cache) == keys(cache, "make_masks.crf.backend=pydensecrf")


def test_full_supervision_skips_what_it_does_not_need(cache: Path) -> None:
    overrides = ["train_segmenter.supervision=full"]
    plan = plan_run(load_model(RunConfig, DEMO, overrides), cache)
    assert plan.skipped == ("make_attention", "make_masks")
    assert plan.inputs("train_segmenter") == ("prepare_data", "train_classifier")
    plan = plan_run(load_model(RunConfig, DEMO, [*overrides, "train_segmenter.init=random"]), cache)
    assert plan.skipped == ("train_classifier", "make_attention", "make_masks")
    assert plan.inputs("evaluate") == ("prepare_data", "train_segmenter")
    assert plan.upstream("evaluate") == ("prepare_data", "train_segmenter")
    weak = plan_run(load_model(RunConfig, DEMO), cache)
    assert weak.skipped == ()
    assert weak.upstream("evaluate") == STAGES[:-1]
    # the mask stages can still be asked for by themselves, and have the keys of the weak run
    alone = plan_run(load_model(RunConfig, DEMO, overrides), cache, last="make_masks")
    assert alone.keys["make_masks"] == weak.keys["make_masks"]


def test_pretrained_weights_enter_by_content(cache: Path, tmp_path: Path) -> None:
    backbone = ["train_classifier.backbone={name: squeezenet1_1}", "train_segmenter.init=random"]
    public = keys(cache, *backbone)
    files = {}
    for name, content in (("a.pth", b"one"), ("b.pth", b"one"), ("c.pth", b"two")):
        (tmp_path / name).write_bytes(b"PK\x03\x04" + content)  # begins as torch's files do
        files[name] = keys(cache, *backbone, f"weights.squeezenet1_1={tmp_path / name}")
    assert files["a.pth"] == files["b.pth"]
    assert files["a.pth"]["train_classifier"] != files["c.pth"]["train_classifier"]
    assert public["train_classifier"] not in {found["train_classifier"] for found in files.values()}
    assert files["c.pth"]["prepare_data"] == public["prepare_data"]


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "VOC"
    generate_synthetic(SyntheticConfig(num_train=6, num_val=3, size_px=64), root)
    return root


def test_data_enters_by_content_and_not_by_place(cache: Path, voc: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "data"
    shutil.copytree(voc, moved)

    def data(root: Path) -> str:
        return f"data={{format: custom, root: {root}, images: JPEGImages, masks: SegmentationClass}}"

    before = keys(cache, data(voc))
    assert keys(cache, data(moved)) == before
    image = next((moved / "JPEGImages").iterdir())
    image.write_bytes(image.read_bytes() + b"\0")
    after = keys(cache, data(moved))
    assert before["prepare_data"] != after["prepare_data"]


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_order_of_writing_is_in_no_key(content: dict[str, Any]) -> None:
    assert stage_key(dict(reversed(content.items()))) == stage_key(content)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(), JSON, max_size=4), st.text(), JSON, JSON)
def test_any_change_of_content_changes_the_key(content: dict[str, Any], name: str, one: object, two: object) -> None:
    first, second = {**content, name: one}, {**content, name: two}
    is_same = repr(one) == repr(two)
    if is_same:
        assert stage_key(first) == stage_key(second)
    elif one != two:
        assert stage_key(first) != stage_key(second)
