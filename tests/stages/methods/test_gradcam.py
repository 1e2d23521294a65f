"""Grad-CAM: equal to CAM where it should be, to the derivative worked out by hand, and without a trace afterwards."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stages.errors import ConfigError
from stages.methods.cam import Cam
from stages.methods.gradcam import GradCamConfig, find_evidence, grad_cam
from stages.nets.backbones.config import BackboneConfig
from stages.nets.classifier import Classifier
from stages.nets.layers import capture_output
from stages.nets.weights import build_backbone
from stages.ops.attention import normalise_attention
from stages.ops.gradient_maps import gradient_weights, label_pairs, linear_weights, scatter_maps, weighted_maps

LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(build_backbone(BackboneConfig(name="small"), {}), 3).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 40, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channel_weights", ["gradient", "closed_form", "auto"])
def test_equals_cam_for_a_linear_head_also_before_normalising(classifier, images, channel_weights):
    cam = Cam().attention(classifier, images, LABELS).detach()
    found = grad_cam(classifier, images, LABELS, channel_weights=channel_weights)
    torch.testing.assert_close(found, cam)
    torch.testing.assert_close(normalise_attention(found), normalise_attention(cam))
    assert found.max() > 0


def test_weights_are_the_sum_of_the_gradient_for_a_head_worked_out_by_hand():
    # s = Σ_cells (2 f_0 − 3 f_1²): ∂s/∂f_0 sums to 2 · 4 cells, ∂s/∂f_1 to Σ −6 f_1
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.5, -1.0]]]], requires_grad=True)
    logits = (2 * features[:, 0] - 3 * features[:, 1] ** 2).sum(dim=(1, 2))[:, None]
    image, label = label_pairs(torch.ones(1, 1))
    weights = gradient_weights(logits, features, image, label)
    torch.testing.assert_close(weights, torch.tensor([[8.0, -3.0]]))
    maps = weighted_maps(features, weights, image)
    torch.testing.assert_close(maps, torch.tensor([[[5.0, 16.0], [22.5, 35.0]]]))
    assert not weights.requires_grad
    assert maps.requires_grad, "the maps are differentiable through the features"


def test_pairs_of_rich_and_poor_images_each_get_their_own_gradient(classifier, images):
    output = classifier(images)
    image, label = label_pairs(LABELS)
    assert image.tolist() == [0, 0, 2, 2, 2]
    assert label.tolist() == [0, 2, 0, 1, 2]
    together = gradient_weights(output.logits, output.features, image, label)
    for number, (i, c) in enumerate(zip(image.tolist(), label.tolist(), strict=True)):
        (gradient,) = torch.autograd.grad(output.logits[i, c], output.features, retain_graph=True)
        torch.testing.assert_close(together[number], gradient[i].sum(dim=(1, 2)))


def test_second_order_gradients_equal_those_of_the_differentiable_closed_form(classifier, images):
    gradients = {}
    for way in ("gradient", "closed_form"):
        for second_order in (False, True):
            classifier.zero_grad()
            found = find_evidence(classifier, images, LABELS, channel_weights=way, second_order=second_order)
            (found.maps**2).mean().backward()
            head = classifier.head.weight.grad
            gradients[way, second_order] = (
                torch.zeros_like(classifier.head.weight) if head is None else head.clone(),
                classifier.backbone.features[0].weight.grad.clone(),
            )
    for second_order in (False, True):
        for one, two in zip(gradients["gradient", second_order], gradients["closed_form", second_order], strict=True):
            torch.testing.assert_close(one, two)
    assert gradients["gradient", True][0].abs().max() > 0, "second order reaches the head"
    assert gradients["gradient", False][0].abs().max() == 0, "first order does not: the weights are constants"


class Quadratic(nn.Module):
    """A head that is not linear, so that only the gradient tells its channel weights."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, channels, 1, 1))

    def forward(self, features):
        return nn.functional.conv2d(features**2, self.weight)


def test_second_order_of_a_nonlinear_head_follows_the_chain_rule(classifier, images):
    classifier.head = Quadratic(64)
    found = find_evidence(classifier, images, LABELS, second_order=True)
    got = torch.autograd.grad(found.maps.sum(), classifier.head.weight)[0]
    features = classifier.backbone(images).detach()
    weight = classifier.head.weight
    cells = features.shape[2] * features.shape[3]
    w = torch.stack([2 * weight[c, :, 0, 0] * features[i].sum(dim=(1, 2)) / cells for i, c in _pairs()])
    by_hand = weighted_maps(features, w, torch.tensor([i for i, _ in _pairs()]))
    torch.testing.assert_close(found.maps, by_hand)
    torch.testing.assert_close(got, torch.autograd.grad(by_hand.sum(), weight)[0])


def _pairs():
    return [(0, 0), (0, 2), (2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("backbone", "layer"),
    [
        (BackboneConfig(name="small"), "features.8"),
        (BackboneConfig(name="vgg16", output_stride=16, pretrained=False), "features.21"),
        (BackboneConfig(name="resnet50", output_stride=16, pretrained=False), "layer3"),
        (BackboneConfig(name="squeezenet1_1", output_stride=8, pretrained=False), "features.7"),
        (BackboneConfig(name="inception_v3", output_stride=16, pretrained=False), "Mixed_6e"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_any_layer_of_any_backbone_and_no_hook_is_left_behind(backbone, layer):
    torch.manual_seed(0)
    classifier = Classifier(build_backbone(backbone, {}), 2).eval()
    images, labels = torch.randn(1, 3, 64, 96), torch.ones(1, 2)
    maps = grad_cam(classifier, images, labels, layer=layer)
    with torch.no_grad(), capture_output(classifier.backbone, layer) as captured:
        classifier(images)
    assert maps.shape == (1, 2, *captured.output.shape[2:])
    assert maps.min() >= 0
    assert not maps.requires_grad
    assert all(not module._forward_hooks for module in classifier.modules())
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_a_layer_in_the_middle_equals_the_gradient_of_the_layers_behind_it(classifier, images):
    layers = classifier.backbone.features
    features = layers[:9](images).detach().requires_grad_()
    logits = classifier.head(layers[9:](features.clone())).mean(dim=(2, 3))
    for c in range(3):
        (gradient,) = torch.autograd.grad(logits[:, c].sum(), features, retain_graph=True)
        by_hand = torch.einsum("bd,bdhw->bhw", gradient.sum(dim=(2, 3)), features).relu() * LABELS[:, c, None, None]
        torch.testing.assert_close(grad_cam(classifier, images, LABELS, layer="features.8")[:, c], by_hand)


def test_a_convolution_before_an_in_place_relu_is_seen_as_it_left_the_layer(classifier, images):
    before = classifier.backbone.features[:8](images)  # the BatchNorm in front of an in-place ReLU: has negative values
    assert before.min() < 0
    found = find_evidence(classifier, images, LABELS, layer="features.7")
    weights = gradient_weights(*_behind(classifier, before.detach()), *label_pairs(LABELS))
    torch.testing.assert_close(found.maps, weighted_maps(before, weights, label_pairs(LABELS)[0]))


def _behind(classifier, features):
    features.requires_grad_()
    scores = classifier.head(classifier.backbone.features[8:](features.clone()))
    return scores.mean(dim=(2, 3)), features


def test_no_labels_give_no_maps(classifier, images):
    assert grad_cam(classifier, images, torch.zeros(3, 3), channel_weights="gradient").abs().max() == 0


def test_linear_weights_and_scatter():
    head = torch.arange(6.0).view(3, 2, 1, 1)
    torch.testing.assert_close(linear_weights(head, torch.tensor([2, 0])), torch.tensor([[4.0, 5.0], [0.0, 1.0]]))
    maps = scatter_maps(torch.ones(1, 2, 2), torch.tensor([1]), torch.tensor([2]), (2, 3))
    assert maps.sum() == 4
    assert maps[1, 2].sum() == 4


def test_an_unknown_layer_is_refused_with_its_neighbours(classifier):
    with pytest.raises(ConfigError, match=r"no layer 'feature\.8'; the nearest are: features\.8"):
        GradCamConfig(layer="feature.8").build().prepare(classifier)


def test_the_closed_form_is_refused_where_it_does_not_hold(classifier):
    with pytest.raises(ValidationError, match=r"closed_form holds for the last layer only, found layer 'features\.8'"):
        GradCamConfig(layer="features.8", channel_weights="closed_form")
    classifier.head = Quadratic(64)
    with pytest.raises(ConfigError, match="needs a linear head"):
        GradCamConfig(channel_weights="closed_form").build().prepare(classifier)


def test_a_backward_pass_is_taken_only_where_it_is_needed(classifier):
    closed, by_gradient = GradCamConfig().build(), GradCamConfig(channel_weights="gradient").build()
    closed.prepare(classifier)
    by_gradient.prepare(classifier)
    assert (closed.attention_needs_gradient, by_gradient.attention_needs_gradient) == (False, True)
