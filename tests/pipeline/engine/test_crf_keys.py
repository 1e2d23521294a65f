"""What of a CRF is in a key: its options, and the backend that the stage is then given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.advice import config_warnings
from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.plan import plan_run
from pipeline.engine.stage_table import TABLE, StageCall

DEMO = find_config("demo")
EVALUATE = ("evaluate.crf=true", "evaluate.multi_scale=true")


@pytest.fixture(autouse=True)
def _has_pydensecrf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.ops.crf.dense_crf._has_pydensecrf", lambda: True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / ".digests.json"


def load(*overrides: str) -> RunConfig:
    return load_model(RunConfig, DEMO, overrides)


def contents(cache: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The CRFs of make_masks and of evaluate as the keys hold them."""
    found = plan_run(load(*overrides), cache).contents
    return found["make_masks"]["config"]["crf"], found["evaluate"]["config"]["crf_config"]


def given(run: RunConfig, stage: str) -> Any:
    """The config that the stage is called with."""
    inputs = {name: Path(name) for name in TABLE.names}
    call = StageCall(run=run, inputs=inputs, data_root=None, exclude=frozenset())
    return TABLE.spec(stage).arguments(call)["config"]


@pytest.mark.parametrize("option", ["resolution=half", "tolerance=0.01"])
def test_options_are_in_the_key(cache: Path, option: str) -> None:
    assert contents(cache, f"make_masks.crf.{option}")[0] != contents(cache)[0]
    refined = contents(cache, *EVALUATE, f"evaluate.crf_config.{option}")[1]
    assert refined != contents(cache, *EVALUATE)[1]


@pytest.mark.parametrize(
    ("device", "has_cuda", "backend"),
    [
        ("auto", False, "numba"),
        ("auto", True, "torch"),
        ("cpu", True, "numba"),
        ("cuda:0", True, "torch"),
    ],
)
def test_the_stage_gets_the_backend_of_its_key(
    cache: Path, device: str, has_cuda: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.ops.crf.dense_crf.has_cuda", lambda: has_cuda)
    overrides = (*EVALUATE, f"runtime.device={device}")
    assert [crf["backend"] for crf in contents(cache, *overrides)] == [backend, backend]
    run = load(*overrides)
    assert given(run, "make_masks").crf.backend == backend
    assert given(run, "evaluate").crf_config.backend == backend
    assert given(run, "make_masks") == run.make_masks.model_copy(update={"crf": run.make_masks.crf.resolved(device)})


def test_a_crf_that_does_not_run_needs_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.ops.crf.dense_crf._has_pydensecrf", lambda: False)
    run = load("make_masks.refine=none", "make_masks.crf.backend=pydensecrf")
    assert given(run, "make_masks") == run.make_masks


def test_a_key_that_other_machines_do_not_share_is_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    both = load(*EVALUATE, "runtime.device=auto")
    assert config_warnings(both) == []
    monkeypatch.setattr("stages.ops.crf.dense_crf.has_cuda", lambda: True)
    (warning,) = config_warnings(both)
    assert warning.startswith(
        "make_masks.crf and evaluate.crf_config.backend: auto means torch here (it works on the CUDA device)"
    )
    assert config_warnings(load("runtime.device=cpu")) == []
    assert config_warnings(load("make_masks.crf.backend=torch")) == []
    assert config_warnings(load("make_masks.refine=none")) == []
    assert len(config_warnings(load("make_masks.refine=[par,crf]"))) == 1
    assert config_warnings(load("train_segmenter.supervision=full")) == []


@pytest.mark.parametrize(("has_native", "meant"), [(True, "pydensecrf"), (False, "torch")])
def test_a_missing_numba_is_remarked_on_once(has_native: bool, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.ops.crf.dense_crf._has_numba", lambda: False)
    monkeypatch.setattr("stages.ops.crf.dense_crf._has_pydensecrf", lambda: has_native)
    (warning,) = config_warnings(load(*EVALUATE))
    assert f"auto means {meant} here (numba is not installed or does not import)" in warning


def test_a_pydensecrf_beside_numba_changes_no_key(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert contents(cache)[0]["backend"] == "numba"
    monkeypatch.setattr("stages.ops.crf.dense_crf._has_pydensecrf", lambda: True)
    assert contents(cache)[0]["backend"] == "numba"
    assert contents(cache, "make_masks.crf.backend=pydensecrf")[0]["backend"] == "pydensecrf"
