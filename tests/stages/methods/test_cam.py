import math

import pytest
import torch

from stages.methods.cam import Cam, CamConfig
from stages.nets.backbones.config import BackboneConfig
from stages.nets.classifier import Classifier
from stages.nets.weights import build_backbone
from stages.ops.step import StepInfo


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(build_backbone(BackboneConfig(name="small"), {}), 2).eval()


def test_attention_is_the_weighted_sum_of_features_cut_at_zero(classifier):
    images = torch.randn(1, 3, 32, 48)
    features = classifier.backbone(images)
    by_hand = torch.einsum("kd,bdhw->bkhw", classifier.head.weight[:, :, 0, 0], features).clamp(min=0)
    attention = Cam().attention(classifier, images, torch.ones(1, 2))
    torch.testing.assert_close(attention, by_hand)
    assert attention.max() > 0


def test_only_asked_classes_have_attention(classifier):
    images = torch.randn(2, 3, 32, 32)
    attention = Cam().attention(classifier, images, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert attention[0, 1].abs().max() == 0
    assert attention[1, 0].abs().max() == 0


def test_the_loss_is_that_of_a_guess_when_every_logit_is_zero(classifier):
    with torch.no_grad():
        classifier.head.weight.zero_()
    step = StepInfo(step=0, num_steps=1, epoch=0, device=torch.device("cpu"))
    losses = CamConfig().build().objective(classifier, torch.randn(2, 3, 32, 32), torch.eye(2), step)
    assert losses.keys() == {"loss"}
    assert losses["loss"].item() == pytest.approx(math.log(2))
