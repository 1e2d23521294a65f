"""What the parameters of a flow mean."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.config.run_config import RunConfig, find_config, load_config, shipped_configs
from pipeline.engine.stage_table import STAGES
from pipeline.flows.parameters import Config, FlowCall, Part, StageName
from stages.errors import ConfigError


def test_the_forms_menu_has_the_stages_of_the_table():
    assert get_args(StageName) == STAGES


def test_the_forms_menu_has_the_shipped_configs_beside_a_path_and_a_whole_config():
    choices = TypeAdapter(Config).json_schema()["anyOf"]
    assert choices[0]["enum"] == [path.stem for path in shipped_configs()]
    assert choices[1]["type"] == "string"
    assert choices[2]["$ref"].endswith("/RunConfig")


def test_a_part_is_any_or_one_of_so_many():
    part = TypeAdapter(Part)
    assert [part.validate_python(text) for text in ("any", "3/8")] == ["any", "3/8"]
    for text in ("0/8", "3", "all", "3/8 "):
        with pytest.raises(ValidationError):
            part.validate_python(text)


def test_the_store_is_where_the_worker_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WSSS_ARTIFACTS", "/shared")
    assert FlowCall.of("demo").artifacts == "/shared"
    assert FlowCall.of("demo", None, "here").artifacts == "here"
    monkeypatch.delenv("WSSS_ARTIFACTS")
    assert FlowCall.of("demo").artifacts == "artifacts"


def test_splits_and_parts_are_overrides():
    call = FlowCall.of("demo", ["make_masks.threshold=0.2"], "artifacts", splits=["val", "test"], parts=8)
    run = call.load()
    assert (run.make_masks.threshold, run.evaluate.splits, run.runtime.parts) == (0.2, ("val", "test"), 8)
    assert call.invocation == (
        "demo --set make_masks.threshold=0.2 --set 'evaluate.splits=[val, test]' --set runtime.parts=8"
    )


def test_without_splits_and_parts_the_config_decides():
    assert FlowCall.of("demo", None, "artifacts").load() == load_config(find_config("demo"))


@pytest.mark.parametrize("name", [path.stem for path in shipped_configs()])
def test_a_shipped_config_typed_into_the_form_is_the_same_run(name: str):
    run = load_config(find_config(name))
    typed = RunConfig.model_validate(run.model_dump(mode="json"))
    assert FlowCall.of(typed, None, "artifacts").load() == run


def test_a_wrong_override_of_a_typed_config_names_its_path():
    call = FlowCall.of(load_config(find_config("demo")), ["make_masks.thresold=0.2"], "elsewhere")
    with pytest.raises(ConfigError) as caught:
        call.load()
    assert "the config of the form is not a valid config: 1 problem" in caught.value.message
    assert "make_masks.thresold" in caught.value.problems[0]
    assert "threshold" in caught.value.problems[0]
    assert call.invocation.endswith("--artifacts elsewhere")


def test_a_bomb_among_the_overrides_of_a_typed_config_is_refused_before_it_is_built():
    rungs = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    call = FlowCall.of(load_config(find_config("demo")), [f"name={{a0: &a0 [x, x], {', '.join(rungs)}}}"])
    with pytest.raises(ConfigError) as caught:
        call.load()
    assert "more than 5,000 values" in caught.value.problems[0]


def test_home_and_variables_mean_the_same_in_a_form_as_on_the_command_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    values = load_config(find_config("voc12_gain")).model_dump(mode="json", exclude_unset=True)
    typed = RunConfig.model_validate({**values, "weights": {"vgg16": "~/vgg16.pth"}})
    run = FlowCall.of(typed, ["weights.resnet50=$DISK/resnet50.pth"]).load()
    assert run.weights == {"vgg16": Path("/home/me/vgg16.pth"), "resnet50": Path("/disk/resnet50.pth")}
