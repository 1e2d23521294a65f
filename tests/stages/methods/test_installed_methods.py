"""Methods of other packages: found by their entry point, checked like ours, and in the key with their version."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.config.run_config import RunConfig, load_config
from pipeline.engine.stage_table import TABLE, DataState
from stages import methods
from stages.contracts import ClassList, read_json
from stages.errors import ConfigError
from stages.methods import METHODS, build_method, method_key
from stages.methods.classifier_files import ClassifierDescription, read_description
from stages.nets.backbones.config import BackboneConfig
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

CODE = """
from typing import Literal

from pydantic import Field

from stages.methods.base import MethodConfig
from stages.methods.cam import Cam


class LoudConfig(MethodConfig):
    name: Literal["loud_cam"] = "loud_cam"
    gain: float = Field(default=2.0, gt=0)

    def build(self):
        return Loud(self.gain)


class Loud(Cam):
    def __init__(self, gain):
        self.gain = gain

    def attention(self, classifier, images, labels):
        return self.gain * super().attention(classifier, images, labels)
"""


def install(
    folder: Path, *, version: str = "1.5", name: str = "loud", points: str = "loud_cam = loud:LoudConfig"
) -> None:
    """What pip leaves of a package: its module and its metadata."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(f"[wsss.methods]\n{points}\n")
    (folder / "loud.py").write_text(CODE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = methods._installed_method
    found.cache_clear()
    yield tmp_path / "site"
    found.cache_clear()
    sys.modules.pop("loud", None)


def write(tmp_path: Path, method: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(tiny_yaml(train_classifier={"method": json.loads(method)}))
    return path


def test_a_config_can_name_it(folder: Path, tmp_path: Path) -> None:
    install(folder)
    run = load_config(write(tmp_path, '{"name": "loud_cam", "gain": 3.0}'))
    method = build_method(run.train_classifier.method)
    assert (type(method).__name__, method.gain) == ("Loud", 3.0)  # type: ignore[attr-defined]
    # a child process gets the config as JSON, with its options
    again = RunConfig.model_validate(run.model_dump(mode="json"))
    assert again.train_classifier.method == run.train_classifier.method
    assert "loud_cam" not in METHODS


def test_its_options_and_its_version_are_in_the_key(folder: Path, tmp_path: Path) -> None:
    install(folder)
    run = load_config(write(tmp_path, '{"name": "loud_cam", "gain": 3.0}'))
    content = TABLE.spec("train_classifier").key_parts(run, DataState())
    assert content["config"]["method"] == {"name": "loud_cam", "gain": 3.0, "package": "loud 1.5"}
    # ours are as they were
    assert method_key(METHODS["cam"]()) == {"name": "cam"}


def test_a_trained_classifier_finds_it_again(folder: Path, tmp_path: Path) -> None:
    install(folder)
    method = load_config(write(tmp_path, '{"name": "loud_cam"}')).train_classifier.method
    description = ClassifierDescription(
        backbone=BackboneConfig(name="small"), method=method, classes=ClassList(names=("a", "b"))
    )
    from stages.contracts import write_json
    from stages.methods.classifier_files import _as_json

    write_json(tmp_path / "classifier.json", _as_json(description))
    assert read_json(tmp_path / "classifier.json")["method"] == {"name": "loud_cam", "gain": 2.0}
    assert read_description(tmp_path) == description


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ('{"name": "loud_cam", "gain": -1}', "train_classifier.method.gain: expected greater than 0, found -1"),
        ('{"name": "loud_cam", "loud": 1}', "train_classifier.method.loud: unknown key"),
        ('{"name": "loud_cma"}', "train_classifier.method.name: expected one of cam, gradcam"),
    ],
)
def test_its_options_are_checked(folder: Path, tmp_path: Path, method: str, text: str) -> None:
    install(folder)
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, method))
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(text)


def test_broken_packages_are_named(folder: Path, tmp_path: Path) -> None:
    install(folder, points="gone = nowhere:Config\nodd = loud:Loud\nloud_cam = loud:LoudConfig")
    install(tmp_path / "site", name="louder", version="2")
    for name, text in {
        "gone": "method 'gone' of loud 1.5 cannot be imported (ModuleNotFoundError: No module named 'nowhere')",
        "odd": "method 'odd' of loud 1.5: expected a subclass of MethodConfig, found loud:Loud",
        "loud_cam": "method 'loud_cam' is offered by loud 1.5 and louder 2; uninstall all but one",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path, f'{{"name": "{name}"}}'))
        assert caught.value.problems[0].startswith(f"train_classifier.method: {text}")


def test_our_own_methods_look_nothing_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(folder, points="cam = loud:LoudConfig")
    monkeypatch.setattr(methods, "_installed_method", lambda name: pytest.fail("looked up"))
    assert type(load_config(write(tmp_path, '{"name": "cam"}')).train_classifier.method) is METHODS["cam"]
