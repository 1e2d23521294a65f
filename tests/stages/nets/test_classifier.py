import torch

from stages.nets.backbones.config import BackboneConfig
from stages.nets.classifier import Classifier


def make(num_foreground=3):
    return Classifier(BackboneConfig(name="small", output_stride=4, pretrained=False).build(), num_foreground)


def test_logits_are_the_mean_of_the_class_maps_of_a_non_square_image():
    classifier = make().eval()
    output = classifier(torch.randn(2, 3, 33, 49))
    assert output.logits.shape == (2, 3)
    assert output.scores.shape == (2, 3, 9, 13)
    assert output.features.shape == (2, 64, 9, 13)
    assert torch.allclose(output.logits, output.scores.flatten(2).mean(2))


def test_the_head_has_no_bias_so_that_empty_features_score_zero():
    classifier = make()
    output = classifier.classify_features(torch.zeros(1, 64, 2, 3))
    assert output.logits.tolist() == [[0.0, 0.0, 0.0]]


def test_each_parameter_is_in_one_group_and_the_head_is_faster():
    classifier = make()
    trunk, head = classifier.parameter_groups(5.0)
    assert (trunk["lr_factor"], head["lr_factor"]) == (1.0, 5.0)
    assert [id(p) for p in head["params"]] == [id(classifier.head.weight)]
    ids = [id(p) for group in (trunk, head) for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in classifier.parameters()}


def test_layers_that_a_method_adds_join_the_head_group():
    classifier = make()
    classifier.extra = torch.nn.Linear(2, 2)
    assert len(classifier.parameter_groups()[1]["params"]) == 3


def test_the_default_head_draws_the_numbers_that_it_always_drew():
    torch.manual_seed(3)
    backbone = BackboneConfig(name="small").build()
    expected = torch.nn.Conv2d(64, 5, 1, bias=False).weight
    torch.nn.init.normal_(expected, std=0.01)
    torch.manual_seed(3)
    classifier = Classifier(BackboneConfig(name="small").build(), 5)
    assert torch.equal(classifier.head.weight, expected)
    assert [name for name in classifier.state_dict() if name.startswith("head")] == ["head.weight"]
    assert torch.equal(
        classifier.backbone.state_dict()["features.0.weight"], backbone.state_dict()["features.0.weight"]
    )
