"""ACoL: what the second classifier does not see, and how both maps become one."""

import pytest
import torch
from pydantic import ValidationError

from stages.contracts import ClassList
from stages.errors import ConfigError
from stages.methods.acol import AcolConfig, class_branch, erase_features
from stages.methods.classifier_files import ClassifierDescription, build_classifier
from stages.nets.backbones.config import BackboneConfig
from stages.ops.attention import fuse_maps, labelled_attention, minmax_attention
from stages.ops.losses import multilabel_soft_margin
from stages.ops.step import StepInfo

STEP = StepInfo(step=0, num_steps=1, epoch=0, device=torch.device("cpu"))
SCORES = torch.tensor([[[[-1.0, 1.0], [3.0, 0.0]], [[5.0, 5.0], [5.0, 5.0]], [[0.0, 8.0], [2.0, 10.0]]]])
"""One image, three classes; min-max normalised: [[0, .5], [1, .25]], nothing, [[0, .8], [.2, 1]]."""


@pytest.fixture(autouse=True)
def _fixed_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _build(**options):
    description = ClassifierDescription(
        backbone=BackboneConfig(name="small"),
        method=AcolConfig(**{"head_channels": 8, **options}),
        classes=ClassList(names=("red", "green", "blue")),
    )
    return build_classifier(description, {})


# --- the arithmetic -----------------------------------------------------------------------------------------


def test_maps_are_brought_to_0_1_and_a_constant_one_becomes_zero():
    expected = [[[[0.0, 0.5], [1.0, 0.25]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.8], [0.2, 1.0]]]]
    torch.testing.assert_close(minmax_attention(SCORES), torch.tensor(expected))


def test_the_map_of_an_image_is_the_largest_of_its_classes():
    both = labelled_attention(SCORES, torch.tensor([[1.0, 1.0, 1.0]]))
    torch.testing.assert_close(both, torch.tensor([[[[0.0, 0.8], [1.0, 1.0]]]]))
    assert labelled_attention(SCORES, torch.zeros(1, 3)).abs().max() == 0


@pytest.mark.parametrize(
    ("labels", "threshold", "left"),
    [
        ([1.0, 0.0, 0.0], 0.5, [[1.0, 0.0], [0.0, 1.0]]),  # a cell at the threshold goes
        ([1.0, 0.0, 0.0], 0.6, [[1.0, 1.0], [0.0, 1.0]]),
        ([1.0, 0.0, 1.0], 0.8, [[1.0, 0.0], [0.0, 0.0]]),  # of either class
        ([0.0, 1.0, 0.0], 0.7, [[1.0, 1.0], [1.0, 1.0]]),
        ([0.0, 0.0, 0.0], 0.7, [[1.0, 1.0], [1.0, 1.0]]),
    ],
)
def test_features_are_erased_where_a_present_class_is_seen(labels, threshold, left):
    features = torch.tensor([[[[2.0, 3.0], [4.0, 5.0]], [[-6.0, 7.0], [8.0, 9.0]]]])
    erased = erase_features(features, SCORES, torch.tensor([labels]), threshold)
    torch.testing.assert_close(erased, features * torch.tensor(left))


def test_the_erasing_gives_no_gradient_to_the_first_scores():
    features, scores = torch.ones(1, 2, 2, 2, requires_grad=True), SCORES.clone().requires_grad_()
    erase_features(features, scores, torch.ones(1, 3), 0.7).sum().backward()
    assert scores.grad is None
    assert features.grad is not None


def test_the_larger_map_counts_at_the_mean_of_both_peaks():
    first = torch.tensor([[[[4.0, 1.0], [-2.0, 0.0]]]])  # peak 4: 1, .25, 0, 0
    second = torch.tensor([[[[1.0, -1.0], [2.0, 0.0]]]])  # peak 2: .5, 0, 1, 0
    expected = torch.tensor([[[[3.0, 0.75], [3.0, 0.0]]]])
    torch.testing.assert_close(fuse_maps(first, second), expected)
    torch.testing.assert_close(fuse_maps(first, -second.abs()), torch.tensor([[[[2.0, 0.5], [0.0, 0.0]]]]))
    assert fuse_maps(-first.abs(), -second.abs()).abs().max() == 0


# --- in the network -----------------------------------------------------------------------------------------


def test_both_branches_are_two_3x3_convolutions_and_a_1x1_without_bias():
    branch = class_branch(512, 1024, 20)
    shapes = {key: tuple(value.shape) for key, value in branch.state_dict().items()}
    assert shapes == {
        "0.weight": (1024, 512, 3, 3),
        "0.bias": (1024,),
        "2.weight": (1024, 1024, 3, 3),
        "2.bias": (1024,),
        "4.weight": (20, 1024, 1, 1),
    }
    classifier, _ = _build()
    assert {key.partition(".")[0] for key in classifier.state_dict()} == {"backbone", "head", "second_head"}


def test_the_loss_is_that_of_both_and_the_logits_are_the_firsts():
    classifier, method = _build()
    images, labels = torch.randn(2, 3, 32, 48), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    losses = method.objective(classifier.train(), images, labels, STEP)
    features = classifier.backbone(images)
    scores = classifier.head(features)
    erased = erase_features(features, scores, labels, 0.7)
    first = multilabel_soft_margin(scores.mean(dim=(2, 3)), labels)
    second = multilabel_soft_margin(classifier.get_submodule("second_head")(erased).mean(dim=(2, 3)), labels)
    torch.testing.assert_close(losses, {"loss": first + second, "first": first, "second": second})
    torch.testing.assert_close(classifier(images).logits, scores.mean(dim=(2, 3)))


def test_attention_fuses_both_maps_of_the_asked_classes():
    classifier, method = _build(erase_threshold=0.5)
    images, labels = torch.randn(2, 3, 32, 48), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    output = classifier.eval()(images)
    erased = erase_features(output.features, output.scores, labels, 0.5)
    second = classifier.get_submodule("second_head")(erased)
    attention = method.attention(classifier, images, labels)
    torch.testing.assert_close(attention, fuse_maps(output.scores, second) * labels[:, :, None, None])
    assert attention[0, 1].abs().max() == 0
    assert attention.max() > 0


def test_a_head_that_is_not_the_plain_one_is_refused():
    classifier, method = _build()
    with pytest.raises(ConfigError, match="acol puts its own head in place of head: gap, found Sequential"):
        method.prepare(classifier)


def test_defaults_are_the_papers_and_bounds_hold():
    assert (AcolConfig().erase_threshold, AcolConfig().head_channels) == (0.7, 1024)
    with pytest.raises(ValidationError, match="greater than 0"):
        AcolConfig(erase_threshold=0)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        AcolConfig(head_channels=0)
