"""The contract that every method in METHODS keeps."""

import copy
import functools
import subprocess
import sys
from typing import Literal

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from stages.contracts import option_texts
from stages.methods import METHODS, MethodConfig, build_method, method_union
from stages.methods.classifier_files import ClassifierDescription, build_classifier, load_classifier, save_classifier
from stages.nets.backbones.config import BackboneConfig
from stages.nets.weights import build_backbone
from stages.ops.losses import softmax_cross_entropy
from stages.ops.step import StepInfo
from tests.stages.methods.tiny_data import CLASSES

STEP = StepInfo(step=0, num_steps=2, epoch=0, device=torch.device("cpu"))
BACKBONES = [
    BackboneConfig(name="small"),
    BackboneConfig(name="squeezenet1_1", output_stride=8, pretrained=False),
    BackboneConfig(name="vgg16", output_stride=16, pretrained=False),
]
OTHER_BACKBONES = [
    BackboneConfig(name="resnet50", output_stride=32, pretrained=False),
    BackboneConfig(name="mobilenetv1_100", output_stride=32, pretrained=False),
    BackboneConfig(name="mobilenet_v2", output_stride=32, pretrained=False),
    BackboneConfig(name="inception_v3", output_stride=32, pretrained=False),
    BackboneConfig(name="seresnet50", output_stride=32, pretrained=False),
]
LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
every_method = pytest.mark.parametrize("name", sorted(METHODS))
every_net = pytest.mark.parametrize("backbone", BACKBONES, ids=lambda config: config.name)
other_nets = pytest.mark.parametrize("backbone", OTHER_BACKBONES, ids=lambda config: config.name)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _describe(name: str, backbone: BackboneConfig) -> ClassifierDescription:
    return ClassifierDescription(backbone=backbone, method=METHODS[name](), classes=CLASSES)


def _images(height: int, width: int) -> torch.Tensor:
    """Noise (2, 3, height, width) that grows from left to right: ADL drops all of a flat map, and nothing is left."""
    return torch.randn(2, 3, height, width) * torch.linspace(0, 3, width)


@functools.cache
def _plain_keys(backbone: BackboneConfig) -> set[str]:
    return set(build_backbone(backbone, {}).state_dict())


def _masks(height: int, width: int) -> torch.Tensor:
    """Class indices 0 … 3 and 255 for the first image; the second is not pixel-labelled."""
    masks = torch.full((2, height, width), 255, dtype=torch.uint8)
    masks[0, : height // 2] = 0
    masks[0, : height // 2, : width // 2] = 1
    masks[0, height // 2 :, : width // 2] = 3
    return masks


def _train_once(classifier, method, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    losses = method.objective(classifier.train(), _images(*size), LABELS, STEP, masks=_masks(*size))
    losses["loss"].backward()
    return losses


def _trains(module: torch.nn.Module) -> bool:
    return any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@every_method
def test_is_listed_under_its_own_name_and_documents_its_options(name):
    fields = METHODS[name].model_fields
    assert fields["name"].default == name
    assert fields.keys() <= option_texts(METHODS[name]).keys()


@every_method
@every_net
def test_objective_trains_backbone_and_head(name, backbone):
    classifier, method = build_classifier(_describe(name, backbone), {})
    losses = _train_once(classifier, method, (48, 80))
    assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values())
    assert _trains(classifier.backbone)
    assert _trains(classifier.head)


@every_method
def test_labels_are_learnt_by_the_classifier_s_own_loss(name, monkeypatch):
    """A softmax where the classes exclude each other: no method has a loss of its own for the labels."""
    update: dict = {"loss": "cross_entropy"}
    if name == "gain":  # its default asks for an image's other labels
        update["method"] = METHODS[name](target="erased")
    classifier, method = build_classifier(_describe(name, BACKBONES[0]).model_copy(update=update), {})
    monkeypatch.setattr("stages.nets.classifier.multilabel_soft_margin", None)  # a call would be a TypeError
    asked = []

    def softmax(logits, labels):
        asked.append((tuple(logits.shape), labels.sum(dim=1).tolist()))
        return softmax_cross_entropy(logits, labels)

    monkeypatch.setattr("stages.nets.classifier.softmax_cross_entropy", softmax)
    labels = torch.eye(3)[:2]
    losses = method.objective(classifier.train(), _images(48, 80), labels, STEP, masks=_masks(48, 80))
    losses["loss"].backward()
    assert asked
    assert set(map(str, asked)) == {str(((2, 3), [1.0, 1.0]))}
    assert _trains(classifier.backbone)


@every_method
@other_nets
def test_trains_and_looks_with_every_kind_of_backbone(name, backbone):
    classifier, method = build_classifier(_describe(name, backbone), {})
    losses = _train_once(classifier, method, (64, 96))
    attention = method.attention(classifier.eval(), _images(64, 96), LABELS).detach()
    assert all(torch.isfinite(value) for value in losses.values())
    assert _trains(classifier.backbone)
    assert attention.shape == (2, 3, 2, 3)
    assert attention.min() >= 0
    assert torch.isfinite(attention).all()
    assert set(classifier.backbone.state_dict()) == _plain_keys(backbone)


@every_method
def test_every_new_parameter_trains(name):
    classifier, method = build_classifier(_describe(name, BACKBONES[0]), {})
    _train_once(classifier, method, (48, 80))
    assert [key for key, parameter in classifier.named_parameters() if parameter.grad is None] == []
    groups = classifier.parameter_groups(7.0)
    assert sum(len(group["params"]) for group in groups) == len(list(classifier.parameters()))
    fast = {id(parameter) for group in groups if group["lr_factor"] == 7.0 for parameter in group["params"]}
    slow = {key for key, parameter in classifier.named_parameters() if id(parameter) not in fast}
    assert slow == {f"backbone.{key}" for key, _ in classifier.backbone.named_parameters()}


@every_method
def test_the_same_seed_gives_the_same_step_and_leaves_its_input_alone(name):
    classifier, method = build_classifier(_describe(name, BACKBONES[0]), {})
    images, labels = _images(48, 80), LABELS.clone()
    images_before, state, losses = images.clone(), copy.deepcopy(classifier.state_dict()), []
    for _ in range(2):
        torch.manual_seed(5)
        classifier.load_state_dict(state)
        losses.append(method.objective(classifier.train(), images, labels, STEP, masks=_masks(48, 80)))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(value, losses[1][key]) for key, value in losses[0].items())
    assert torch.equal(images, images_before)
    assert torch.equal(labels, LABELS)


@every_method
def test_trains_under_autocast(name):
    classifier, method = build_classifier(_describe(name, BACKBONES[0]), {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method.objective(classifier.train(), _images(48, 80), LABELS, STEP, masks=_masks(48, 80))
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert _trains(classifier.backbone)


@every_method
def test_images_without_a_label_cost_a_finite_loss(name):
    classifier, method = build_classifier(_describe(name, BACKBONES[0]), {})
    losses = method.objective(classifier.train(), _images(48, 80), torch.zeros(2, 3), STEP)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    gradients = [parameter.grad for parameter in classifier.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every_method
@every_net
def test_attention_is_nonnegative_and_as_fine_as_the_features(name, backbone):
    classifier, method = build_classifier(_describe(name, backbone), {})
    images = _images(64, 96)
    attention = method.attention(classifier.eval(), images, LABELS).detach()
    assert attention.shape == (2, 3, *classifier(images).features.shape[2:])
    assert attention.min() >= 0
    assert torch.isfinite(attention).all()


@every_method
def test_attention_in_evaluation_repeats_and_is_that_of_each_image_alone(name):
    classifier, method = build_classifier(_describe(name, BACKBONES[0]), {})
    images = _images(32, 48)
    both = method.attention(classifier.eval(), images, LABELS).detach()
    alone = [method.attention(classifier, images[i : i + 1], LABELS[i : i + 1]).detach() for i in range(2)]
    asked = LABELS[:, :, None, None]
    torch.testing.assert_close(both * asked, torch.cat(alone) * asked)


def _last_convolution(part: torch.nn.Module) -> torch.nn.Conv2d:
    return [layer for layer in part.modules() if isinstance(layer, torch.nn.Conv2d)][-1]


@every_method
def test_an_image_without_evidence_gets_a_zero_map(name):
    classifier, method = build_classifier(_describe(name, BACKBONES[0]), {})
    with torch.no_grad():
        for child, part in classifier.named_children():
            if child != "backbone":  # what comes in is ReLU'd, so every score is at most 0
                _last_convolution(part).weight.abs_().neg_()
    attention = method.attention(classifier.eval(), torch.randn(1, 3, 32, 48), torch.ones(1, 3)).detach()
    assert attention.abs().max() == 0


@every_method
@every_net
def test_the_backbone_keeps_its_keys_so_that_public_weights_load(name, backbone):
    classifier, _ = build_classifier(_describe(name, backbone), {})
    assert set(classifier.backbone.state_dict()) == _plain_keys(backbone)


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
        "import sys, stages.methods, stages.methods.classifier_files, stages.train_classifier, stages.make_attention;"
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
    known = ", ".join(f"'{name}'" for name in [*METHODS, "other"])
    with pytest.raises(ValidationError, match=known):
        union.validate_python({"name": "gian"})


def test_an_option_of_another_method_is_refused():
    with pytest.raises(ValidationError, match="strength"):
        TypeAdapter(method_union(METHODS)).validate_python({"name": "cam", "strength": 2})


def test_a_config_that_builds_nothing_says_so():
    with pytest.raises(NotImplementedError, match="_OtherConfig must say which Method it builds"):
        build_method(_OtherConfig())
