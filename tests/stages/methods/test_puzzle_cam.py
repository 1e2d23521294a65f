"""Puzzle-CAM cuts images into quarters, and their maps have to agree with the whole image's."""

import copy

import pytest
import torch
from pydantic import ValidationError

from stages.contracts import ClassList
from stages.methods.classifier_files import ClassifierDescription, build_classifier
from stages.methods.puzzle_cam import PuzzleCamConfig, cut_quarters, merge_quarters
from stages.nets.backbones.config import BackboneConfig
from stages.nets.classifier import ClassifierOutput
from stages.ops.cells import PIXELS
from stages.ops.losses import multilabel_soft_margin
from stages.ops.step import StepInfo

LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.fixture(autouse=True)
def _fixed_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _at(step: int, num_steps: int = 100) -> StepInfo:
    return StepInfo(step=step, num_steps=num_steps, epoch=0, device=torch.device("cpu"))


def _build(**options):
    description = ClassifierDescription(
        backbone=BackboneConfig(name="small"),
        method=PuzzleCamConfig(**options),
        classes=ClassList(names=("red", "green", "blue")),
    )
    return build_classifier(description, {})


class _Contrast:
    """A classifier of two classes whose cells are pixels: each channel without its mean over what is seen."""

    is_exclusive = False
    classification_loss = staticmethod(multilabel_soft_margin)

    def __init__(self):
        self.backbone = self

    def __call__(self, images):
        scores = images[:, :2] - images[:, :2].mean(dim=(2, 3), keepdim=True)
        return ClassifierOutput(scores.mean(dim=(2, 3)), scores, images)

    @staticmethod
    def cells(map_size, image_size):
        assert tuple(map_size) == tuple(image_size)
        return PIXELS


# --- the arithmetic -----------------------------------------------------------------------------------------


def test_quarters_are_cut_row_by_row():
    image = torch.arange(24.0).reshape(1, 1, 4, 6)
    top = [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]
    bottom = [[[12, 13, 14], [18, 19, 20]], [[15, 16, 17], [21, 22, 23]]]
    assert cut_quarters(image)[:, 0].tolist() == top + bottom


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (5, 7), (1, 1)])
def test_merged_quarters_are_the_whole_also_at_odd_sides(size):
    images = torch.randn(2, 3, *size)
    quarters = cut_quarters(images)
    assert quarters.shape == (8, 3, -(-size[0] // 2), -(-size[1] // 2))
    assert torch.equal(merge_quarters(quarters.unflatten(0, (4, 2)), size), images)


def test_the_difference_is_the_mean_of_a_small_image_worked_out_by_hand():
    """Whole: 4 in one pixel of four, less the mean 1; each quarter is a pixel, less itself; one class is absent."""
    image = torch.tensor([[[[0.0, 4.0], [0.0, 0.0]], [[9.0, 0.0], [0.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    method = PuzzleCamConfig(alpha=4, ramp_ratio=0).build()
    losses = method.objective(_Contrast(), image, torch.tensor([[1.0, 0.0]]), _at(0))
    assert losses["difference"].item() == pytest.approx((1 + 3 + 1 + 1) / (4 * 2))
    half = torch.log(torch.tensor(2.0))  # of every logit, which is 0
    torch.testing.assert_close(losses["classification"], half)
    torch.testing.assert_close(losses["quarters"], half)
    torch.testing.assert_close(losses["loss"], 2 * half + 4 * 0.75)


def test_a_softmax_s_difference_is_not_divided_by_the_classes():
    image = torch.tensor([[[[0.0, 4.0], [0.0, 0.0]], [[9.0, 0.0], [0.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    classifier = _Contrast()
    classifier.is_exclusive = True
    losses = PuzzleCamConfig().build().objective(classifier, image, torch.tensor([[1.0, 0.0]]), _at(0))
    assert losses["difference"].item() == pytest.approx((1 + 3 + 1 + 1) / 4)


def test_the_quarters_loss_is_that_of_their_mean():
    classifier, method = _build()
    classifier.eval()
    images = torch.randn(2, 3, 48, 64)
    losses = method.objective(classifier, images, LABELS, _at(0))
    logits = torch.stack([classifier(quarter).logits for quarter in cut_quarters(images).split(2)])
    torch.testing.assert_close(losses["quarters"], multilabel_soft_margin(logits.mean(dim=0), LABELS))
    torch.testing.assert_close(losses["classification"], multilabel_soft_margin(classifier(images).logits, LABELS))


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (10, 0.8), (25, 2.0), (50, 4.0), (99, 4.0)])
def test_the_weight_grows_over_the_first_half(step, weight):
    classifier, method = _build()
    losses = method.objective(classifier.train(), torch.randn(2, 3, 48, 64), LABELS, _at(step))
    expected = losses["classification"] + losses["quarters"] + weight * losses["difference"]
    torch.testing.assert_close(losses["loss"], expected)


# --- in the network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet50", "squeezenet1_1", "tf_efficientnet_lite0", "vgg16"])
def test_where_a_map_stands_makes_no_difference(name):
    """A map that says where its cells look, whichever network's: whole and quarters say the same of every pixel.

    Squeezenet's quarters have 13 cells a side and the whole has 27; Lite's cells stand 15 pixels off in either.
    """
    backbone = BackboneConfig(name=name, output_stride=8, pretrained=False).build()

    class _Places(_Contrast):
        def __call__(self, images):
            size = (images.shape[2], images.shape[3])
            cells = [backbone.cell_rule.num_cells(backbone.output_stride, side) for side in size]
            rows, _ = backbone.cells(cells, size)
            # what each cell sees is the first column's value at its row: the ramp in the image
            places = (rows.first_px + rows.stride_px * torch.arange(cells[0])).round().long()
            scores = images[:, :2, places, 0][..., None].expand(-1, -1, -1, cells[1])
            return ClassifierOutput(scores.mean(dim=(2, 3)), scores, images)

        cells = staticmethod(backbone.cells)

    ramp = torch.arange(224.0)[None, None, :, None].expand(1, 3, 224, 224)
    losses = PuzzleCamConfig().build().objective(_Places(), ramp, torch.tensor([[1.0, 1.0]]), _at(0))
    # only beyond the outermost cells' centres, at the seam, do the quarters repeat their last value
    assert losses["difference"].item() < 0.5


def test_the_difference_alone_reaches_the_backbone_from_both_sides():
    classifier, method = _build()
    method.objective(classifier.train(), torch.randn(2, 3, 48, 64), LABELS, _at(0))["difference"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in classifier.backbone.parameters() if p.ndim == 4)


def test_training_with_the_difference_makes_maps_agree():
    """Without the weight the maps grow apart as the scores grow; the test fails if the difference is not minimised."""
    found = {}
    images = torch.randn(4, 3, 48, 64)
    labels = torch.eye(3)[[0, 1, 2, 0]]
    start, _ = _build()
    for alpha in (0, 4):
        classifier = copy.deepcopy(start).train()
        method = PuzzleCamConfig(alpha=alpha, ramp_ratio=0).build()
        optimiser = torch.optim.SGD(classifier.parameters(), lr=0.05, momentum=0.9)
        for step in range(25):
            losses = method.objective(classifier, images, labels, _at(step))
            optimiser.zero_grad()
            losses["loss"].backward()
            optimiser.step()
        scale = classifier(images).scores.abs().mean().item()
        found[alpha] = losses["difference"].item() / scale
    assert found[4] < 0.7 * found[0]


def test_bf16_gives_nearly_the_losses_of_fp32():
    classifier, method = _build()
    images = torch.randn(2, 3, 48, 64)
    plain = method.objective(classifier.eval(), images, LABELS, _at(50))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method.objective(classifier, images, LABELS, _at(50))
    assert half["difference"].dtype == torch.float32
    for name, value in plain.items():
        torch.testing.assert_close(half[name].float(), value, rtol=0.05, atol=0.01)


def test_defaults_are_the_papers_and_bounds_hold():
    assert (PuzzleCamConfig().alpha, PuzzleCamConfig().ramp_ratio) == (4.0, 0.5)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        PuzzleCamConfig(alpha=-1)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        PuzzleCamConfig(ramp_ratio=1.5)
