"""VGG16's own head computes what torchvision's vgg16 computes, and starts at its weights."""

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d
from torchvision import models

from stages.contracts import ClassList, SilentProgress
from stages.errors import WeightsError
from stages.methods.classifier_files import ClassifierDescription, build_classifier, load_classifier, save_classifier
from stages.methods.gradcam import GradCamConfig
from stages.nets import heads
from stages.nets.backbones.config import BackboneConfig
from stages.nets.classifier import Classifier
from stages.nets.heads import FcHead, average_to_grid, load_vgg16

CLASSES = ClassList(names=("auk", "bee", "cat"))


@pytest.fixture
def narrow(monkeypatch):
    """fc6 and fc7 of 8 channels: the same code in a hundredth of the memory."""
    monkeypatch.setattr(heads, "FC_CHANNELS", 8)


def describe(output_stride=16, *, pretrained=False):
    backbone = BackboneConfig(name="vgg16", output_stride=output_stride, pretrained=pretrained)
    return ClassifierDescription(backbone=backbone, head="fc", method=GradCamConfig(), classes=CLASSES)


def test_with_torchvisions_weights_it_is_torchvisions_vgg16(monkeypatch, tmp_path):
    plain = models.vgg16(weights=None, init_weights=False).eval()
    tensors = plain.state_dict()
    monkeypatch.setattr(heads, "read_tensors", lambda path, wanted: tensors)
    backbone = BackboneConfig(name="vgg16", output_stride=16, pretrained=False).build()
    classifier = Classifier(backbone, 1000, "fc").eval()
    report = load_vgg16(classifier.backbone, classifier.head, tmp_path / "vgg16.pth")
    assert report.describe() == (
        "vgg16 with fc6 and fc7 from vgg16.pth: 30 tensors loaded, 2 not used (classifier.6.bias, classifier.6.weight)"
    )
    classifier.head.fc8.load_state_dict(plain.classifier[6].state_dict())
    seen = []
    classifier.head.fc8.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        for size in ((224, 224), (192, 301)):  # the second leaves 6 × 9 cells behind pool5
            images = torch.randn(1, 3, *size)
            output = classifier(images)
            fc7 = plain.classifier[:5](plain.avgpool(plain.features(images)).flatten(1))
            assert fc7.std() > 1e-3
            torch.testing.assert_close(seen.pop(), fc7, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(output.logits, plain(images), rtol=1e-5, atol=1e-5)
            seen.clear()
            assert output.scores.shape == (1, 1000, 1, 1)


@pytest.mark.parametrize("size", [(7, 7), (6, 9), (1, 1), (20, 7), (14, 3)])
def test_averages_are_torchs_adaptive_pooling(size):
    features = torch.randn(2, 3, *size)
    pooled = average_to_grid(features)
    torch.testing.assert_close(pooled, adaptive_avg_pool2d(features, 7))
    assert (pooled is features) == (size == (7, 7))


@pytest.mark.parametrize(("output_stride", "side"), [(16, 14), (8, 28), (4, 56)])
def test_pool5_takes_the_same_pixels_at_every_stride(output_stride, side, narrow, monkeypatch):
    head = FcHead(2, output_stride, 3).eval()
    seen = []
    monkeypatch.setattr(heads, "average_to_grid", lambda cells: seen.append(cells) or average_to_grid(cells))
    features = torch.zeros(1, 2, side, side)
    features[0, 1, -1, 0] = 5  # the lower left corner
    assert head(features).shape == (1, 3, 1, 1)
    assert seen[0].shape == (1, 2, 7, 7)
    assert seen[0].nonzero().tolist() == [[0, 1, 6, 0]]


def test_less_than_32_pixels_are_one_cell(narrow):
    assert FcHead(2, 16, 3)(torch.randn(2, 2, 1, 3)).shape == (2, 3, 1, 1)


def test_scores_by_hand(narrow):
    head = FcHead(1, 16, 2).eval()
    for layer in (head.fc6, head.fc7, head.fc8):
        torch.nn.init.zeros_(layer.weight)
    with torch.no_grad():
        head.fc6.weight[0] = 1.0  # the sum of 49 cells
        head.fc6.bias[:2] = torch.tensor([-40.0, -1.0])
        head.fc7.weight[3, 0] = 2.0
        head.fc8.weight[1, 3] = -0.5
        head.fc8.bias[0] = 0.25
    scores = head(torch.ones(1, 1, 14, 14))
    # fc6: 49 - 40 = 9 and relu(-1) = 0; fc7: 2 x 9 = 18; fc8: 0.25 and -0.5 x 18
    assert scores.flatten().tolist() == pytest.approx([0.25, -9.0])


def test_dropout_draws_from_torchs_generator_and_only_in_training(narrow):
    head, features = FcHead(2, 16, 3), torch.rand(4, 2, 14, 14)
    torch.nn.init.normal_(head.fc8.weight)
    torch.nn.init.normal_(head.fc7.weight)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(head(features))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(head.eval()(features), head(features))


def test_names_start_and_learning_rates(narrow):
    classifier, _ = build_classifier(describe(), {})
    names = [name for name in classifier.state_dict() if name.startswith("head.")]
    assert names == [f"head.fc{number}.{kind}" for number in (6, 7, 8) for kind in ("weight", "bias")]
    assert classifier.head.fc6.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert all(layer.bias.abs().max() == 0 for layer in (classifier.head.fc6, classifier.head.fc8))
    trunk, fresh = classifier.parameter_groups(5.0)
    assert (trunk["lr_factor"], fresh["lr_factor"]) == (1.0, 5.0)
    assert [id(p) for p in fresh["params"]] == [id(p) for p in classifier.head.fc8.parameters()]
    assert {id(p) for p in trunk["params"] + fresh["params"]} == {id(p) for p in classifier.parameters()}
    assert len(trunk["params"]) == 26 + 4


@pytest.mark.parametrize("output_stride", [16, 8])
def test_it_comes_back_from_disk_without_public_weights(output_stride, narrow, tmp_path, monkeypatch):
    classifier, _ = build_classifier(describe(output_stride), {})
    torch.nn.init.normal_(classifier.head.fc8.weight)
    save_classifier(tmp_path, describe(output_stride, pretrained=True), classifier)
    monkeypatch.setattr(heads, "load_vgg16", None)  # would be called with a TypeError
    again, method = load_classifier(tmp_path, torch.device("cpu"))
    images = torch.randn(2, 3, 64, 96)  # not square
    with torch.inference_mode():
        assert torch.equal(again(images).logits, classifier.eval()(images).logits)
    attention = method.attention(again, images, torch.ones(2, 3))
    assert attention.shape == (2, 3, 64 // output_stride, 96 // output_stride)


# -- public weights ---------------------------------------------------------------------------------------------------


@pytest.fixture
def public(narrow, tmp_path):
    """Writes a file in torchvision's layout that fits the narrow head, after ``change`` of its tensors."""
    features = describe().backbone.build().state_dict()
    sizes = {"0": (8, 25088), "3": (8, 8), "6": (1000, 8)}
    layers = {f"classifier.{n}.weight": torch.rand(size) for n, size in sizes.items()}
    layers |= {f"classifier.{n}.bias": torch.rand(size[0]) for n, size in sizes.items()}

    def write(change=lambda tensors: None):
        tensors = {**features, **layers}
        change(tensors)
        torch.save(tensors, tmp_path / "vgg16.pth")
        return {"vgg16": tmp_path / "vgg16.pth"}

    return write


def test_fc6_and_fc7_start_at_the_public_weights_and_a_line_says_so(public):
    weights, progress, said = public(), SilentProgress(), []
    progress.info = said.append
    classifier, _ = build_classifier(describe(pretrained=True), weights, progress)
    tensors = torch.load(weights["vgg16"], weights_only=True)
    assert torch.equal(classifier.head.fc6.weight, tensors["classifier.0.weight"])
    assert torch.equal(classifier.head.fc7.bias, tensors["classifier.3.bias"])
    assert torch.equal(classifier.backbone.state_dict()["features.28.bias"], tensors["features.28.bias"])
    assert said == [
        "vgg16 with fc6 and fc7 from vgg16.pth: 30 tensors loaded, 2 not used (classifier.6.bias, classifier.6.weight)"
    ]


def test_a_file_without_fc6_and_fc7_names_the_tensors_and_the_way_out(public):
    def drop(tensors):
        for name in ("classifier.0.bias", "classifier.3.weight"):
            del tensors[name]

    with pytest.raises(
        WeightsError, match=r"lacks 2 tensors; give the whole vgg16 file .* or write head: gap"
    ) as caught:
        build_classifier(describe(pretrained=True), public(drop))
    assert caught.value.problems == (
        "classifier.0.bias: missing in the file",
        "classifier.3.weight: missing in the file",
    )


def test_tensors_of_another_shape_are_named_by_the_files_names(public):
    weights = public(lambda tensors: tensors.update({"classifier.0.weight": torch.zeros(8, 512)}))
    with pytest.raises(WeightsError, match="of another net") as caught:
        build_classifier(describe(pretrained=True), weights)
    assert caught.value.problems == ("classifier.0.weight: the net has shape (8, 25088), the file (8, 512)",)


def test_a_file_that_is_not_there_is_named(narrow, tmp_path):
    with pytest.raises(WeightsError, match=r"weights\.vgg16: there is no file"):
        build_classifier(describe(pretrained=True), {"vgg16": tmp_path / "none.pth"})
