"""ReCAM: what each class sees, what the second head learns from it, and how both heads make a map."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from stages.contracts import ClassList
from stages.methods.classifier_files import ClassifierDescription, build_classifier
from stages.methods.recam import RecamConfig, class_features
from stages.nets.backbones.config import BackboneConfig
from stages.ops.losses import multilabel_soft_margin
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
        method=RecamConfig(**options),
        classes=ClassList(names=("red", "green", "blue")),
    )
    return build_classifier(description, {})


# --- the arithmetic -----------------------------------------------------------------------------------------


def test_a_class_sees_the_features_that_its_map_points_at():
    features = torch.tensor([[[[8.0, 4.0]], [[0.0, 2.0]]]])  # two channels, two cells
    scores = torch.tensor([[[[5.0, -1.0]], [[3.0, 3.0]], [[1.0, 4.0]]]])  # maps 1 0, absent, ¼ 1
    seen, image, label = class_features(features, scores, torch.tensor([[1.0, 0.0, 1.0]]))
    torch.testing.assert_close(seen, torch.tensor([[4.0, 0.0], [3.0, 1.0]]))
    assert image.tolist() == [0, 0]
    assert label.tolist() == [0, 2]


# --- in the network -----------------------------------------------------------------------------------------


def test_the_loss_is_the_first_heads_and_the_mean_softmax_loss_of_the_images_classes():
    classifier, method = _build(softmax_weight=3)
    classifier.eval()
    images = torch.randn(2, 3, 32, 48)
    losses = method.objective(classifier, images, LABELS, STEP)
    output = classifier(images)
    errors = []
    for image, label in [(0, 0), (0, 2), (1, 1)]:
        peak = output.scores[image, label].relu() / output.scores[image, label].max().clamp(min=1e-12)
        seen = (output.features[image] * peak).mean(dim=(1, 2))
        logits = classifier.get_submodule("second_head")(seen[None, :, None, None]).flatten(1)
        errors.append(functional.cross_entropy(logits, torch.tensor([label])))
    softmax = ((errors[0] + errors[1]) / 2 + errors[2]) / 2
    torch.testing.assert_close(losses["softmax"], softmax)
    torch.testing.assert_close(losses["classification"], multilabel_soft_margin(output.logits, LABELS))
    torch.testing.assert_close(losses["loss"], losses["classification"] + 3 * softmax)


def test_the_softmax_loss_alone_reaches_backbone_and_both_heads():
    """Of the first head, through the map that weighs the features."""
    classifier, method = _build()
    method.objective(classifier.train(), torch.randn(2, 3, 32, 48), LABELS, STEP)["softmax"].backward()
    missing = [name for name, p in classifier.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert [name for name in missing if name.endswith("weight")] == []


def test_the_second_head_learns_to_tell_the_classes_apart():
    classifier, method = _build()
    images = torch.randn(6, 3, 32, 48) * 0.1
    labels = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    for image, label in enumerate([0, 1, 2, 0, 1, 2]):
        images[image, label] += 2
    optimiser = torch.optim.SGD(classifier.parameters(), lr=0.05, momentum=0.9)
    found = []
    for _ in range(40):
        losses = method.objective(classifier.train(), images, labels, STEP)
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        found.append(losses["softmax"].item())
    assert found[0] == pytest.approx(torch.tensor(3.0).log().item(), abs=0.1)
    assert found[-1] < 0.3


def test_attention_is_that_of_both_heads_weights_multiplied_and_the_logits_are_the_firsts():
    classifier, method = _build()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        classifier.get_parameter("head.weight")[2].abs_()
    output = classifier.eval()(images)
    first, second = (classifier.get_parameter(name) for name in ("head.weight", "second_head.weight"))
    expected = functional.conv2d(output.features, first * second)
    torch.testing.assert_close(method.score_maps(classifier, images), expected)
    attention = method.attention(classifier, images, LABELS)
    assert (output.scores[0, 2] > 0).any()
    torch.testing.assert_close(attention[0, 2], expected[0, 2].relu())
    assert attention[0, 2].max() > 0
    assert attention[0, 1].max() == 0, "not asked for"
    torch.testing.assert_close(output.logits, classifier.head(output.features).mean(dim=(2, 3)))


def test_two_negative_weights_are_no_evidence_of_a_class_that_the_first_head_sees_nowhere():
    classifier, method = _build()
    with torch.no_grad():
        for name in ("head.weight", "second_head.weight"):
            classifier.get_parameter(name)[0].abs_().neg_()
            classifier.get_parameter(name)[1].abs_()
    images = torch.randn(1, 3, 32, 48)
    assert method.score_maps(classifier.eval(), images)[0, 0].max() > 0
    attention = method.attention(classifier, images, torch.ones(1, 3))
    assert attention[0, 0].max() == 0
    assert attention[0, 1].max() > 0


def test_the_warm_up_is_plain_classification():
    classifier, method = _build(softmax_warmup_epochs=2)
    assert method.config.warmup_epochs == 2
    images = torch.randn(2, 3, 32, 48)
    for epoch in range(3):
        losses = method.objective(classifier.train(), images, LABELS, replace(STEP, epoch=epoch))
        assert (losses["softmax"] > 0) == (epoch == 2)
        assert (losses["loss"] > losses["classification"]) == (epoch == 2)


def test_the_second_head_is_a_fresh_1x1_convolution_of_its_own():
    classifier, _ = _build()
    second = classifier.get_parameter("second_head.weight")
    assert second.shape == classifier.get_parameter("head.weight").shape
    assert not torch.equal(second, classifier.get_parameter("head.weight"))
    assert {key.partition(".")[0] for key in classifier.state_dict()} == {"backbone", "head", "second_head"}


def test_bf16_gives_nearly_the_losses_of_fp32():
    classifier, method = _build()
    images = torch.randn(2, 3, 32, 48)
    plain = method.objective(classifier.eval(), images, LABELS, STEP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method.objective(classifier, images, LABELS, STEP)
    assert half["softmax"].dtype == torch.float32
    for name, value in plain.items():
        torch.testing.assert_close(half[name].float(), value, rtol=0.05, atol=0.01)


def test_defaults_are_the_published_ones_and_bounds_hold():
    assert (RecamConfig().softmax_weight, RecamConfig().softmax_warmup_epochs) == (1.0, 0)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        RecamConfig(softmax_weight=-1)
