"""Where the cells of every backbone look: what its spec states is what a gradient shows."""

import copy

import pytest
import torch

from stages.nets.backbones.cell_rules import CellRule
from stages.nets.backbones.config import BACKBONES, BackboneConfig
from stages.nets.segmenters.segmenter import deeplab_backbone
from stages.ops.cells import PIXELS, CellAxis, CellGrid
from tests.stages.linear_nets import linear_backbone

EVERYWHERE = [(name, stride) for name, spec in BACKBONES.items() for stride in spec.output_strides]
LARGE = ("resnet101", "seresnet50", "inception_v3", "tf_efficientnet_lite2")


def _seen_px(backbone, size, axis):
    """Number of the middle cell along an axis, and the pixel that it looks at: centre of mass of its gradient."""
    images = torch.ones(1, 3, *size, requires_grad=True)
    features = backbone(images)
    middle = [count // 2 for count in features.shape[2:]]
    (gradient,) = torch.autograd.grad(features[0, :, middle[0], middle[1]].sum(), images)
    mass = gradient[0].double().sum(0).sum(1 - axis)
    assert mass.min() >= 0
    return middle[axis], float((mass * torch.arange(len(mass))).sum() / mass.sum()), features.shape[2:]


@pytest.mark.parametrize(
    ("name", "stride"),
    [pytest.param(*case, marks=pytest.mark.slow) if case[0] in LARGE else case for case in EVERYWHERE],
)
def test_a_cell_looks_where_the_spec_says(name, stride, monkeypatch):
    """Exact but for what of the receptive field the image's border cuts off: a tenth of a pixel.

    Sides: a multiple of every stride, one more than that, and one that is halved to odd and even numbers.
    """
    backbone = linear_backbone(name, stride, monkeypatch)
    for size, axis in (((2 * stride, 320), 1), ((321, 2 * stride), 0), ((2 * stride, 330), 1)):
        number, found, map_size = _seen_px(backbone, size, axis)
        stated = backbone.cells(map_size, size)[axis]
        assert stated.stride_px == stride
        assert stated.first_px == backbone.cell_rule.first_px(stride, size[axis])
        assert found == pytest.approx(stated.first_px + number * stride, abs=0.1)


def test_the_numbers_by_hand():
    """First pixels at stride 16 of a side of 320, 321 and 330 pixels."""
    first = {rule: [rule.first_px(16, side) for side in (320, 321, 330)] for rule in CellRule}
    assert first == {
        CellRule.PADDED_KERNELS: [0, 0, 0],
        CellRule.EVEN_POOLS: [7.5, 7.5, 7.5],
        CellRule.UNPADDED_KERNELS: [15, 15, 15],
        CellRule.TENSORFLOW_SAME: [15, 0, 9],
    }


@pytest.mark.parametrize(
    ("name", "layer", "stride", "first_px"),
    [("vgg16", "features.16", 8, 3.5), ("resnet50", "layer1", 4, 0), ("squeezenet1_1", "features.5", 8, 7)],
)
def test_a_layer_before_the_last_has_a_stride_of_its_own(name, layer, stride, first_px):
    from stages.nets.layers import capture_output

    with torch.device("meta"):
        backbone = BackboneConfig(name=name, output_stride=16, pretrained=False).build().eval()
        with capture_output(backbone, layer) as captured:
            backbone(torch.empty(1, 3, 97, 128))
    axis = CellAxis(first_px, stride)
    assert backbone.cells(captured.output.shape[2:], (97, 128)) == CellGrid(axis, axis)


def test_other_maps_are_pixels_or_span_the_image_evenly():
    backbone = BackboneConfig.model_validate({"name": "small"}).build()
    assert backbone.cells((40, 60), (40, 60)) == PIXELS
    assert backbone.cells((7, 7), (70, 140)) == CellGrid(CellAxis(4.5, 10), CellAxis(9.5, 20))


def test_deeplabs_vgg_has_cells_at_corners_and_rules_survive_copies():
    config = BackboneConfig(name="vgg16", pretrained=False)
    assert config.build().cell_rule is CellRule.EVEN_POOLS
    backbone, _ = deeplab_backbone(config)
    assert backbone.cell_rule is CellRule.PADDED_KERNELS
    small = BackboneConfig.model_validate({"name": "small"}).build()
    assert copy.deepcopy(small).cell_rule is CellRule.PADDED_KERNELS
