"""HaS hides squares of a grid, each by a draw of its own."""

import pytest
import torch
from pydantic import ValidationError

from stages.contracts import ClassList
from stages.methods.classifier_files import ClassifierDescription, build_classifier
from stages.methods.has import HasConfig, hide_squares
from stages.nets.backbones.config import BackboneConfig
from stages.ops.losses import multilabel_soft_margin
from stages.ops.step import StepInfo

STEP = StepInfo(step=0, num_steps=1, epoch=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _fixed_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_squares_are_hidden_or_kept_whole_and_cut_off_at_the_edges():
    images = torch.ones(3, 3, 10, 7)
    hidden = hide_squares(images, grid_px=4, drop_rate=0.5)
    assert images.min() == 1
    assert set(hidden.unique().tolist()) == {0.0, 1.0}
    for image in hidden:
        for top in (0, 4, 8):
            for left in (0, 4):
                assert len(image[:, top : top + 4, left : left + 4].unique()) == 1


def test_each_square_is_that_of_the_generators_number():
    torch.manual_seed(3)
    draws = torch.rand(2, 1, 2, 3)
    torch.manual_seed(3)
    hidden = hide_squares(torch.ones(2, 3, 16, 24), grid_px=8, drop_rate=0.4)
    assert torch.equal(hidden[:, :, ::8, ::8], (draws >= 0.4).float().expand(2, 3, 2, 3))


def test_the_rate_is_kept_by_cell_and_images_differ():
    hidden = hide_squares(torch.ones(4, 3, 200, 200), grid_px=4, drop_rate=0.3)
    assert hidden.mean().item() == pytest.approx(0.7, abs=0.02)  # 10,000 squares: a deviation is 0.005
    assert not torch.equal(hidden[0], hidden[1])


def test_rate_0_hides_nothing_and_rate_1_everything():
    images = torch.randn(2, 3, 9, 11)
    assert torch.equal(hide_squares(images, grid_px=4, drop_rate=0.0), images)
    assert hide_squares(images, grid_px=4, drop_rate=1.0).abs().max() == 0


def test_the_classifier_learns_from_the_hidden_images():
    config = HasConfig(grid_px=8)
    description = ClassifierDescription(
        backbone=BackboneConfig(name="small"), method=config, classes=ClassList(names=("red", "green"))
    )
    classifier, method = build_classifier(description, {})
    images, labels = torch.randn(2, 3, 32, 48), torch.eye(2)
    torch.manual_seed(7)
    losses = method.objective(classifier.train(), images, labels, STEP)
    torch.manual_seed(7)
    by_hand = classifier(hide_squares(images, grid_px=8, drop_rate=0.5)).logits
    assert losses.keys() == {"loss"}
    torch.testing.assert_close(losses["loss"], multilabel_soft_margin(by_hand, labels))
    classifier.eval()
    asked = torch.ones(2, 2)
    torch.testing.assert_close(method.attention(classifier, images, asked), classifier(images).scores.relu())


def test_defaults_are_wsolevaluations_and_bounds_hold():
    assert (HasConfig().grid_px, HasConfig().drop_rate) == (4, 0.5)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        HasConfig(grid_px=0)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        HasConfig(drop_rate=1.5)
