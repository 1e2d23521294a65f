"""ADL's layer by hand, and where it stands in every backbone."""

import math

import pytest
import timm
import torch
from pydantic import ValidationError
from torchvision import models
from torchvision.models import vgg

from stages.contracts import ClassList
from stages.errors import ConfigError
from stages.methods.adl import PRESETS, AdlConfig, attention_dropout, drop_mask
from stages.methods.cam import CamConfig
from stages.methods.classifier_files import ClassifierDescription, build_classifier
from stages.nets.backbones.config import BACKBONES, BackboneConfig
from stages.nets.classifier import Classifier
from stages.nets.layers import capture_output, find_layer
from stages.nets.weights import load_pretrained

CLASSES = ClassList(names=("red", "green"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _backbone(name: str, **options):
    stride = {} if name == "small" else {"output_stride": 16, "pretrained": False}
    return BackboneConfig(name=name, **stride, **options)


def _classifier(name: str, **options):
    description = ClassifierDescription(backbone=_backbone(name), method=AdlConfig(**options), classes=CLASSES)
    return build_classifier(description, {})[0]


# --- the layer ----------------------------------------------------------------------------------------------

FEATURES = torch.tensor([[[[1.0, 8.0], [9.0, 10.0]], [[3.0, 8.0], [5.0, 10.0]]]])
"""One image of two channels whose mean is [[2, 8], [7, 10]]."""


def test_cells_at_gamma_times_the_peak_or_above_are_dropped_and_others_keep_their_value():
    dropped = attention_dropout(FEATURES, gamma=0.8, drop_rate=1.0)
    expected = torch.tensor([[[[1.0, 0.0], [9.0, 0.0]], [[3.0, 0.0], [5.0, 0.0]]]])
    torch.testing.assert_close(dropped, expected)


def test_each_image_has_a_threshold_of_its_own():
    attention = torch.tensor([[[[2.0, 8.0], [7.0, 10.0]]], [[[0.2, 0.8], [0.7, 1.0]]]])
    expected = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]], [[[1.0, 1.0], [1.0, 0.0]]]])
    torch.testing.assert_close(drop_mask(attention, 0.9), expected)
    assert drop_mask(torch.zeros(1, 1, 2, 2), 0.9).sum() == 0  # nothing is below the peak of an empty map


def test_the_importance_map_is_the_sigmoid_of_the_channel_mean():
    weighted = attention_dropout(FEATURES, gamma=0.8, drop_rate=0.0)
    sigmoid = [[1 / (1 + math.exp(-mean)) for mean in row] for row in ([2, 8], [7, 10])]
    torch.testing.assert_close(weighted, FEATURES * torch.tensor(sigmoid))


def test_the_drop_mask_comes_as_often_as_its_rate():
    drops = 0
    for seed in range(400):
        torch.manual_seed(seed)
        drops += int(attention_dropout(FEATURES, gamma=0.8, drop_rate=0.75)[0, 0, 1, 1] == 0)
    assert 270 <= drops <= 330  # 300 ± 3.5 standard deviations of 8.7


def test_one_draw_decides_for_the_whole_batch():
    batch = FEATURES.expand(16, -1, -1, -1)
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        is_dropped = attention_dropout(batch, gamma=0.8, drop_rate=0.5)[:, 0, 1, 1] == 0
        assert is_dropped.all() or not is_dropped.any()
        seen.add(bool(is_dropped[0]))
    assert seen == {True, False}


def test_the_gradient_is_none_where_dropped():
    features = FEATURES.clone().requires_grad_()
    attention_dropout(features, gamma=0.8, drop_rate=1.0).sum().backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad, torch.tensor([[1.0, 0.0], [1.0, 0.0]]).expand(1, 2, 2, 2))


# --- in the network -----------------------------------------------------------------------------------------


def test_in_evaluation_the_network_is_the_plain_one():
    classifier = _classifier("small").eval()
    plain = Classifier(_backbone("small").build(), 2).eval()
    plain.load_state_dict(classifier.state_dict())
    images = torch.randn(2, 3, 32, 48)
    assert torch.equal(classifier(images).scores, plain(images).scores)


@pytest.mark.parametrize(("drop_rate", "expected"), [(1.0, 0.0), (0.0, 1.0)])
def test_in_training_the_layers_behind_see_what_is_left(drop_rate, expected):
    classifier = _classifier("small", layers=("features.8",), gamma=0.5, drop_rate=drop_rate).train()
    plain = find_layer(classifier.backbone, "features.8")
    before = []
    handle = plain.register_forward_hook(lambda layer, inputs, output: before.append(output.clone()), prepend=True)
    with capture_output(classifier.backbone, "features.8") as captured:
        classifier(torch.randn(2, 3, 32, 48))
    handle.remove()
    attention = before[0].mean(dim=1, keepdim=True)
    strongest = attention >= 0.5 * attention.amax(dim=(2, 3), keepdim=True)
    assert strongest.any()
    left = torch.sigmoid(attention) * expected
    torch.testing.assert_close(captured.output * strongest, before[0] * left * strongest)


def test_every_layer_draws_for_itself():
    classifier = _classifier("small", drop_rate=0.5).train()
    patterns = set()
    for seed in range(30):
        torch.manual_seed(seed)
        expected = tuple(bool(torch.rand(()) < 0.5) for _ in range(3))
        torch.manual_seed(seed)
        with (
            capture_output(classifier.backbone, "features.8") as a,
            capture_output(classifier.backbone, "features.17") as b,
        ):
            classifier(torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)))
        holes = tuple(bool((found.output == 0).all(dim=1).any()) for found in (a, b))
        assert holes == (expected[0], expected[2])
        patterns.add(expected)
    assert len(patterns) == 8


# --- positions ----------------------------------------------------------------------------------------------


def test_every_backbone_has_a_preset_whose_layers_exist_and_are_rectified():
    assert set(PRESETS) >= set(BACKBONES)
    images = torch.randn(1, 3, 64, 64)
    for name in BACKBONES:
        backbone = _backbone(name).build().eval()
        for layer in PRESETS[name].layers:
            with capture_output(backbone, layer) as captured, torch.no_grad():
                backbone(images)
            assert captured.output.min() >= 0, (name, layer)


def test_vgg16_has_them_after_pool3_pool4_and_conv5_3():
    features = vgg.make_layers(vgg.cfgs["D"])
    assert PRESETS["vgg16"].layers == ("features.16", "features.23", "features.29")
    pools = [number for number, layer in enumerate(features) if isinstance(layer, torch.nn.MaxPool2d)]
    assert pools[2:4] == [16, 23]
    convolutions = [number for number, layer in enumerate(features) if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions[-1] + 1 == 29  # the ReLU of conv5-3, the thirteenth convolution
    assert len(convolutions) == 13
    assert (PRESETS["vgg16"].gamma, PRESETS["vgg16"].published) == (0.8, True)


def test_seresnet50_has_them_after_the_first_blocks_of_the_last_two_groups_and_at_the_end():
    backbone = _backbone("seresnet50").build()
    assert PRESETS["seresnet50"].layers == ("layer3.0", "layer4.0", "layer4.2")
    assert [len(group) for group in (backbone.layer3, backbone.layer4)] == [6, 3]
    assert (PRESETS["seresnet50"].gamma, PRESETS["seresnet50"].published) == (0.9, True)


def test_the_authors_gammas():
    gammas = {name: PRESETS[name].gamma for name in ("vgg16", "seresnet50", "mobilenetv1_100", "inception_v3")}
    assert gammas == {"vgg16": 0.8, "seresnet50": 0.9, "mobilenetv1_100": 0.95, "inception_v3": 0.8}
    assert {name for name, preset in PRESETS.items() if preset.published} == {"vgg16", "seresnet50"}
    assert AdlConfig().drop_rate == 0.75


# --- weights ------------------------------------------------------------------------------------------------


def _public_vgg16():
    """Torchvision's names without its two large fully connected layers."""
    return torch.nn.ModuleDict(
        {
            "features": vgg.make_layers(vgg.cfgs["D"]),
            "classifier": torch.nn.ModuleDict({"6": torch.nn.Linear(8, 1000)}),
        }
    )


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("vgg16", _public_vgg16),
        ("resnet50", lambda: models.resnet50(weights=None)),
        ("inception_v3", lambda: models.inception_v3(weights=None, init_weights=False)),
        ("mobilenetv1_100", lambda: timm.create_model("mobilenetv1_100", pretrained=False)),
        ("seresnet50", lambda: timm.create_model("seresnet50", pretrained=False)),
    ],
)
def test_public_weights_load_with_adl_inserted(name, public, tmp_path):
    tensors = public().state_dict()
    path = tmp_path / "weights.pth"
    torch.save(tensors, path)
    classifier = _classifier(name)
    report = load_pretrained(classifier.backbone, name, path)
    state = classifier.backbone.state_dict()
    assert set(report.matched) == set(state)
    assert report.missing == ()
    assert all(torch.equal(state[key], tensors[key]) for key in state)
    plain = ClassifierDescription(backbone=_backbone(name), method=CamConfig(), classes=CLASSES)
    assert set(classifier.state_dict()) == set(build_classifier(plain, {})[0].state_dict())


# --- options ------------------------------------------------------------------------------------------------


def test_an_unknown_layer_is_refused_with_the_nearest_names():
    with pytest.raises(ConfigError, match=r"no layer 'features.99'; the nearest are: .*features\.9"):
        _classifier("vgg16", layers=("features.16", "features.99"))


def test_a_batch_norm_is_refused():
    with pytest.raises(ConfigError, match=r"cannot stand behind the BatchNorm 'features.7'; name the activation"):
        _classifier("small", layers=("features.7",))


def test_a_backbone_without_a_preset_needs_layers_and_gamma():
    classifier = Classifier(_backbone("small").build(), 2)
    classifier.backbone.name = "other"
    with pytest.raises(ConfigError, match=r"no preset for backbone 'other' \(it has: .*vgg16\); write method.layers"):
        AdlConfig(layers=("features.8",)).build().prepare(classifier)
    AdlConfig(layers=("features.8",), gamma=0.9).build().prepare(classifier)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "greater than 0"),
        ({"gamma": 1.01}, "less than or equal to 1"),
        ({"drop_rate": -0.1}, "greater than or equal to 0"),
        ({"drop_rate": 1.1}, "less than or equal to 1"),
        ({"layers": ()}, "at least 1 item"),
        ({"layers": ("layer4", "layer4")}, "names one layer twice: layer4, layer4"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        AdlConfig(**options)


def test_only_named_layers_have_to_be_looked_up():
    assert AdlConfig(layers=("layer4",)).names_layers
    assert not AdlConfig().names_layers
