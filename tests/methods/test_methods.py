"""The contract that every method in METHODS keeps."""

import subprocess
import sys
from typing import Literal

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from stages.methods import METHODS, MethodConfig, build_method, method_union
from stages.methods.trained import ClassifierDescription, build_classifier, load_classifier, save_classifier
from stages.nets.backbone_builders import build_backbone
from stages.nets.backbones import BackboneConfig
from stages.ops.step import StepInfo
from tests.methods.tiny_data import CLASSES

STEP = StepInfo(step=0, num_steps=2, epoch=0, device=torch.device("cpu"))
BACKBONES = [
    BackboneConfig(name="small"),
    BackboneConfig(name="squeezenet1_1", output_stride=8, pretrained=False),
    BackboneConfig(name="vgg16", output_stride=16, pretrained=False),
]
every_method = pytest.mark.parametrize("name", sorted(METHODS))
every_net = pytest.mark.parametrize("backbone", BACKBONES, ids=lambda config: config.name)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _describe(name: str, backbone: BackboneConfig) -> ClassifierDescription:
    return ClassifierDescription(backbone=backbone, method=METHODS[name](), classes=CLASSES)


@every_method
def test_is_listed_under_its_own_name_and_documents_its_options(name):
    fields = METHODS[name].model_fields
    assert fields["name"].default == name
    assert [field for field, info in fields.items() if not info.description] == []


@every_method
@every_net
def test_objective_trains_backbone_and_head(name, backbone):
    classifier, method = build_classifier(_describe(name, backbone), {})
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    losses = method.objective(classifier.train(), torch.randn(2, 3, 48, 80), labels, STEP)
    losses["loss"].backward()
    assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values())
    for part in (classifier.backbone, classifier.head):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


@every_method
@every_net
def test_attention_is_nonnegative_and_as_fine_as_the_features(name, backbone):
    classifier, method = build_classifier(_describe(name, backbone), {})
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    images = torch.randn(2, 3, 64, 96)
    attention = method.attention(classifier.eval(), images, labels).detach()
    assert attention.shape == (2, 3, *classifier(images).features.shape[2:])
    assert attention.min() >= 0
    assert torch.isfinite(attention).all()


@every_method
def test_an_image_without_evidence_gets_a_zero_map(name):
    classifier, method = build_classifier(_describe(name, BACKBONES[0]), {})
    with torch.no_grad():
        classifier.head.weight.abs_().neg_()  # features are ReLU'd, so every score is at most 0
    attention = method.attention(classifier.eval(), torch.randn(1, 3, 32, 48), torch.ones(1, 3)).detach()
    assert attention.abs().max() == 0


@every_method
@every_net
def test_the_backbone_keeps_its_keys_so_that_public_weights_load(name, backbone):
    classifier, _ = build_classifier(_describe(name, backbone), {})
    assert set(classifier.backbone.state_dict()) == set(build_backbone(backbone, {}).state_dict())


@every_method
def test_a_saved_classifier_loads_with_equal_attention(name, tmp_path):
    description = _describe(name, BACKBONES[0])
    classifier, method = build_classifier(description, {})
    save_classifier(tmp_path, description, classifier)
    loaded, loaded_method = load_classifier(tmp_path, torch.device("cpu"))
    images, labels = torch.randn(1, 3, 32, 48), torch.ones(1, 3)
    assert not loaded.training
    torch.testing.assert_close(
        loaded_method.attention(loaded, images, labels), method.attention(classifier.eval(), images, labels)
    )


def test_options_are_read_without_torch():
    code = (
        "import sys, stages.methods, stages.methods.trained, stages.train_classifier, stages.make_attention;"
        "slow = {'torch', 'albumentations', 'cv2', 'scipy', 'prefect', 'matplotlib'} & set(sys.modules);"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class _OtherConfig(MethodConfig):
    name: Literal["other"] = "other"
    strength: float = 1.0


def test_a_second_method_makes_the_config_choose_by_name():
    union = TypeAdapter(method_union({**METHODS, "other": _OtherConfig}))
    assert union.validate_python({"name": "other", "strength": 2}) == _OtherConfig(strength=2)
    assert build_method(union.validate_python({"name": "cam"})).attention_needs_gradient is False
    with pytest.raises(ValidationError, match="'cam', 'other'"):
        union.validate_python({"name": "gian"})


def test_an_option_of_another_method_is_refused():
    with pytest.raises(ValidationError, match="strength"):
        TypeAdapter(method_union(METHODS)).validate_python({"name": "cam", "strength": 2})


def test_a_config_that_builds_nothing_says_so():
    with pytest.raises(NotImplementedError, match="_OtherConfig must say which Method it builds"):
        build_method(_OtherConfig())
