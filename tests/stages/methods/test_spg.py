"""SPG: which pixels are sure, what guides what, and where the branches stand."""

import math

import pytest
import torch
from pydantic import ValidationError

from stages.contracts import ClassList
from stages.errors import ConfigError
from stages.methods.classifier_files import ClassifierDescription, build_classifier
from stages.methods.spg import LAYERS, SpgConfig, num_layer_channels
from stages.nets.backbones.config import BACKBONES, BackboneConfig
from stages.nets.classifier import Classifier
from stages.ops.attention import sure_pixels
from stages.ops.losses import multilabel_soft_margin, object_cross_entropy
from stages.ops.step import StepInfo

STEP = StepInfo(step=0, num_steps=1, epoch=0, device=torch.device("cpu"))
LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.fixture(autouse=True)
def _fixed_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _build(**options):
    description = ClassifierDescription(
        backbone=BackboneConfig(name="small"),
        method=SpgConfig(**{"head_channels": 8, "guide_channels": 4, **options}),
        classes=ClassList(names=("red", "green", "blue")),
    )
    return build_classifier(description, {})


# --- sure pixels --------------------------------------------------------------------------------------------


def test_pixels_are_object_above_high_background_below_low_and_255_between():
    attention = torch.tensor([[[0.9, 0.7, 0.5], [0.1, 0.05, 0.0]]])
    mask = sure_pixels(attention, high=0.7, low=0.1, min_object_px=1)
    assert mask.tolist() == [[[1, 255, 255], [255, 0, 0]]]  # both borders are not sure


def test_an_image_with_too_few_object_pixels_takes_those_near_its_peak():
    attention = torch.tensor([[[0.4, 0.3, 0.2, 0.0]], [[0.9, 0.8, 0.6, 0.0]]])
    mask = sure_pixels(attention, high=0.7, low=0.05, min_object_px=2, fallback_ratio=0.7)
    assert mask.tolist() == [[[1, 1, 255, 0]], [[1, 1, 255, 0]]]  # above 0.28; the second image has two above 0.7


def test_low_has_the_last_word():
    attention = torch.tensor([[[0.04, 0.03, 0.0]]])
    assert sure_pixels(attention, high=0.5, low=0.05).tolist() == [[[0, 0, 0]]]


def test_the_cross_entropy_is_over_sure_pixels_only():
    logits = torch.tensor([[[0.0, 2.0, 50.0]]], requires_grad=True)
    mask = torch.tensor([[[1.0, 0.0, 255.0]]])
    loss = object_cross_entropy(logits, mask)
    assert loss.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(2))) / 2)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, 2] == 0


def test_without_a_sure_pixel_the_cross_entropy_is_zero_not_nan():
    logits = torch.randn(1, 2, 2, requires_grad=True)
    loss = object_cross_entropy(logits, torch.full((1, 2, 2), 255.0))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


# --- in the network -----------------------------------------------------------------------------------------


def test_the_branches_have_the_channels_of_their_layers():
    classifier, _ = _build(layers=("features.2", "features.8"))  # 16 and 48 channels
    shapes = {key: tuple(value.shape) for key, value in classifier.state_dict().items() if key.endswith("weight")}
    guides = {key.removeprefix("guides."): shape for key, shape in shapes.items() if key.startswith("guides.")}
    assert guides == {
        "b1.0.weight": (4, 16, 3, 3),
        "b2.0.weight": (4, 48, 3, 3),
        "shared.0.weight": (4, 4, 3, 3),
        "shared.2.weight": (1, 4, 1, 1),
        "c.0.weight": (4, 8, 3, 3),
        "c.2.weight": (1, 4, 1, 1),
    }
    assert shapes["head.0.weight"] == (8, 64, 3, 3)
    assert shapes["head.4.weight"] == (3, 8, 1, 1)


def test_attention_guides_b2_which_guides_b1_and_both_guide_c():
    _, method = _build(min_object_px=0)
    attention = torch.tensor([[[0.8, 0.6, 0.005]]])  # .7/.01: object, unsure, background
    b2 = torch.tensor([[[0.6, 0.2, 0.01]]]).logit()  # .5/.05: object, unsure, background
    b1 = torch.tensor([[[0.9, 0.1, 0.09]]]).logit()  # the mean of both .75, .15, .05; .7/.1: object, unsure, background
    c = torch.tensor([[[0.3, 0.3, 0.3]]]).logit()
    losses = method._guidance_losses(attention, b1, b2, c)
    expected = {
        "b2": -(math.log(0.6) + math.log(0.99)) / 2,
        "b1": -(math.log(0.9) + math.log(0.91)) / 2,
        "c": -(math.log(0.3) + math.log(0.7)) / 2,
    }
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(expected, rel=1e-5)


def test_guidance_carries_no_gradient_to_the_guide():
    _, method = _build(min_object_px=0)
    b1, b2, c = (torch.randn(1, 4, 4, requires_grad=True) for _ in range(3))
    losses = method._guidance_losses(torch.rand(1, 4, 4), b1, b2, c)
    assert torch.autograd.grad(losses["b1"], [b1, b2, c], allow_unused=True, retain_graph=True)[1:] == (None, None)
    assert torch.autograd.grad(losses["c"], [b1, b2, c], allow_unused=True)[:2] == (None, None)


def test_the_loss_is_the_sum_of_four_and_the_logits_are_as_without_branches():
    classifier, method = _build()
    images = torch.randn(2, 3, 32, 48)
    losses = method.objective(classifier.train(), images, LABELS, STEP)
    assert losses.keys() == {"loss", "classification", "b2", "b1", "c"}
    torch.testing.assert_close(losses["loss"], sum(value for key, value in losses.items() if key != "loss"))
    torch.testing.assert_close(losses["classification"], multilabel_soft_margin(classifier(images).logits, LABELS))
    classifier.eval()
    by_hand = classifier.head(classifier.backbone(images)).relu() * LABELS[:, :, None, None]
    torch.testing.assert_close(method.attention(classifier, images, LABELS), by_hand)
    assert all(not layer._forward_hooks for layer in classifier.modules())


def test_every_branch_learns():
    classifier, method = _build()
    method.objective(classifier.train(), torch.randn(2, 3, 32, 48), LABELS, STEP)["loss"].backward()
    for name in ("guides.b1", "guides.b2", "guides.shared", "guides.c", "head"):
        gradients = [p.grad for p in classifier.get_submodule(name).parameters()]
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients), name


# --- layers -------------------------------------------------------------------------------------------------


def test_every_backbone_has_its_layers():
    assert set(LAYERS) >= set(BACKBONES)
    expected = {"vgg16": [512, 512], "resnet50": [1024, 1024], "inception_v3": [288, 768], "small": [48, 64]}
    for name in BACKBONES:
        options = {} if name == "small" else {"output_stride": 16, "pretrained": False}
        channels = num_layer_channels(BackboneConfig(name=name, **options).build(), LAYERS[name])
        assert channels == expected.get(name, channels)


def test_counting_channels_draws_nothing_and_changes_nothing():
    backbone = BackboneConfig(name="small").build()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    assert num_layer_channels(backbone, ("features.2", "features.5")) == [16, 32]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(layer.training for layer in backbone.modules())


def test_frozen_batch_norm_stays_frozen():
    backbone = BackboneConfig(name="small", freeze_bn=True).build()
    modes = [layer.training for layer in backbone.modules()]
    num_layer_channels(backbone, ("features.2",))
    assert [layer.training for layer in backbone.modules()] == modes
    assert not all(modes)


def test_an_unknown_layer_is_refused_with_the_nearest_names():
    with pytest.raises(ConfigError, match=r"no layer 'features.55'; the nearest are: .*features\.5"):
        _build(layers=("features.5", "features.55"))


def test_a_layer_without_a_map_is_refused():
    backbone = BackboneConfig(name="small").build()
    backbone.add_module("flat", torch.nn.Flatten())
    with pytest.raises(ConfigError, match=r"layer 'flat' puts out \(1, 16384\), not a map"):
        num_layer_channels(backbone, ("features.5", "flat"))


def test_a_backbone_without_a_preset_needs_layers():
    classifier = Classifier(BackboneConfig(name="small").build(), 2)
    classifier.backbone.name = "other"
    with pytest.raises(ConfigError, match=r"spg has no layers for backbone 'other' \(it has: .*vgg16\)"):
        SpgConfig().build().prepare(classifier)


# --- options ------------------------------------------------------------------------------------------------


def test_defaults_are_wsolevaluations():
    config = SpgConfig()
    assert (config.thresholds_b2, config.thresholds_b1, config.thresholds_c) == ((0.7, 0.01), (0.5, 0.05), (0.7, 0.1))
    assert (config.min_object_px, config.fallback_ratio) == (30, 0.7)
    assert (config.head_channels, config.guide_channels) == (1024, 512)
    assert not config.names_layers
    assert SpgConfig(layers=("layer2", "layer3")).names_layers


def test_all_thresholds_in_the_wrong_order_are_named_at_once():
    with pytest.raises(ValidationError, match=r"thresholds_b2: expected \(high, low\).*\(0.1, 0.7\); thresholds_c: "):
        SpgConfig(thresholds_b2=(0.1, 0.7), thresholds_c=(0.2, 0.3))
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        SpgConfig(thresholds_b1=(1.5, 0.1))
