"""The example of docs/methods.md is a method that keeps the contract."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from stages.methods import METHODS, build_method, method_union
from stages.nets.backbones.config import BackboneConfig
from stages.nets.classifier import Classifier
from stages.nets.weights import build_backbone
from stages.ops.step import StepInfo

DOCS = Path(__file__).parents[3] / "docs" / "methods.md"


@pytest.fixture
def example(monkeypatch):
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    module = types.ModuleType("stages.methods.small_cam")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, str(DOCS), "exec"), module.__dict__)
    return module


def test_the_documented_example_works(example):
    union = TypeAdapter(method_union({**METHODS, "small_cam": example.SmallCamConfig}))
    method = build_method(union.validate_python({"name": "small_cam", "area_weight": 0.5}))
    torch.manual_seed(0)
    classifier = Classifier(build_backbone(BackboneConfig(name="small"), {}), 2)
    method.prepare(classifier)
    step = StepInfo(step=0, num_steps=1, epoch=0, device=torch.device("cpu"))
    images, labels = torch.randn(2, 3, 32, 48), torch.eye(2)
    losses = method.objective(classifier, images, labels, step)
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(losses["classification"].item() + 0.5 * losses["area"].item())
    assert 0 < losses["area"].item() < 1
    assert method.attention(classifier.eval(), images, labels).min() >= 0
