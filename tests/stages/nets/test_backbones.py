"""Every backbone keeps the same promises: stride, names, numbers of the plain net, save and load."""

import math
import subprocess
import sys

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn
from torchvision import models

from stages.errors import WeightsError
from stages.nets.backbones.config import BACKBONES, BackboneConfig
from stages.nets.backbones.network import (
    Backbone,
    freeze_batch_norm,
    limit_stride,
    renormalise_half,
)
from stages.nets.weights import build_backbone, load_weights, save_weights

HEIGHT, WIDTH = 65, 97  # neither square nor a multiple of any stride


def make(name, output_stride=None, **fields) -> Backbone:
    stride = output_stride or BACKBONES[name].output_strides[-1]
    return BackboneConfig(name=name, output_stride=stride, pretrained=False, **fields).build()


def plain_net(name) -> nn.Module:
    """The network whose public weight files exist, on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        if name == "inception_v3":
            return models.inception_v3(weights=None, init_weights=False)
        if hasattr(models, name):
            return getattr(models, name)(weights=None)
        return timm.create_model(name, pretrained=False)


def test_every_backbone_has_strides_that_a_config_can_name_and_a_name_of_its_own():
    for name, spec in BACKBONES.items():
        assert spec.name == name
        assert set(spec.output_strides) <= {4, 8, 16, 32}
        assert list(spec.output_strides) == sorted(spec.output_strides)


def test_an_unknown_backbone_is_refused_with_the_menu():
    with pytest.raises(ValidationError, match="Input should be 'small', 'vgg16', 'resnet50'"):
        BackboneConfig(name="resnet5")


@pytest.mark.parametrize(
    ("name", "stride"), [(name, stride) for name in BACKBONES for stride in BACKBONES[name].output_strides]
)
def test_feature_size_is_the_image_size_over_the_declared_stride(name, stride):
    with torch.device("meta"):  # shapes without numbers
        backbone = make(name, stride).eval()
        features = backbone(torch.empty(1, 3, HEIGHT, WIDTH))
    assert features.shape[:2] == (1, backbone.num_channels)
    assert backbone.output_stride == stride
    for cells, pixels in zip(features.shape[2:], (HEIGHT, WIDTH), strict=True):
        assert abs(cells - math.ceil(pixels / stride)) <= 1


def test_inception_at_stride_8_dilates_by_what_each_reduction_lost_along_the_kernel_only():
    with torch.device("meta"):
        backbone = make("inception_v3", 8)
    dilations = {
        "Mixed_5d.branch5x5_2": (1, 1),
        "Mixed_6a.branch3x3": (1, 1),  # the layer that loses its stride keeps the dilation reached so far
        "Mixed_6b.branch7x7_2": (1, 2),
        "Mixed_6e.branch7x7_3": (2, 1),
        "Mixed_7a.branch3x3_2": (2, 2),
        "Mixed_7c.branch3x3dbl_2": (4, 4),
        "Mixed_7c.branch1x1": (1, 1),
    }
    assert {name: backbone.get_submodule(name).conv.dilation for name in dilations} == dilations


def test_inception_computes_finite_features_of_small_images():
    with torch.no_grad():
        features = make("inception_v3", 16).eval()(torch.randn(1, 3, HEIGHT, WIDTH))
    assert torch.isfinite(features).all()
    assert features.std() > 0


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "small"])
def test_tensor_names_and_shapes_are_those_of_the_plain_net_without_its_classifier(name):
    with torch.device("meta"):
        ours = make(name, 8).state_dict()
    heads = ("classifier.", "fc.", "AuxLogits.")
    plain = {key: value.shape for key, value in plain_net(name).state_dict().items() if not key.startswith(heads)}
    assert {key: value.shape for key, value in ours.items()} == plain


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2", "mobilenetv1_100", "resnet50"])
def test_at_its_own_stride_a_backbone_computes_what_the_plain_net_computes(name):
    plain = timm.create_model(name) if name.startswith("mobilenetv1") else getattr(models, name)(weights=None)
    plain.eval()
    backbone = make(name).eval()
    backbone.load_state_dict({key: plain.state_dict()[key] for key in backbone.state_dict()})
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        if name == "resnet50":
            expected = nn.Sequential(*list(plain.children())[:-2])(images)
        elif name == "mobilenetv1_100":
            expected = plain.forward_features(renormalise_half(images))
        else:
            expected = plain.features(images)
        assert torch.equal(backbone(images), expected)


def test_mean_and_deviation_of_half_are_reached_from_imagenets():
    pixel = torch.tensor([0.2, 0.5, 1.0]).view(1, 3, 1, 1)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    expected = torch.tensor([-0.6, 0.0, 1.0]).view(1, 3, 1, 1)
    assert torch.allclose(renormalise_half((pixel - mean) / std), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["small", "squeezenet1_1", "mobilenet_v2"])
def test_saved_tensors_load_into_a_new_backbone_bit_for_bit(name, tmp_path):
    first, second = make(name), make(name)
    save_weights(first, tmp_path / "a.safetensors")
    save_weights(first, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    load_weights(second, tmp_path / "a.safetensors")
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value)


def test_a_dilated_chain_samples_the_plain_chains_outputs():
    """Without pools and padding effects, the dense map holds the strided map at every second cell."""
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    dense = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    dense.load_state_dict(plain.state_dict())
    limit_stride(dense, 1)
    images = torch.randn(1, 3, 12, 16)
    assert dense[1].dilation == (2, 2)
    assert torch.allclose(dense(images)[..., ::2, ::2], plain(images), atol=1e-6)


def test_vgg16_at_stride_8_is_deeplabs_plan():
    features = make("vgg16", 8).features
    convs = [layer for layer in features if isinstance(layer, nn.Conv2d)]
    pools = [layer for layer in features if isinstance(layer, nn.MaxPool2d)]
    assert [conv.dilation[0] for conv in convs] == [1] * 10 + [2] * 3
    assert [(pool.kernel_size, pool.stride) for pool in pools] == [(2, 2), (2, 2), (2, 2), (3, 1)]


def test_squeezenet_at_stride_8_dilates_the_fires_behind_the_last_pool_only():
    convs = {name: layer for name, layer in make("squeezenet1_1", 8).named_modules() if isinstance(layer, nn.Conv2d)}
    dilated = {name for name, conv in convs.items() if conv.dilation != (1, 1)}
    assert dilated == {f"features.{number}.expand3x3" for number in (9, 10, 11, 12)}


def test_frozen_batch_norm_keeps_its_statistics_in_training_and_free_one_moves():
    for freeze in (True, False):
        backbone = make("small", freeze_bn=freeze).train()
        before = backbone.features[1].running_mean.clone()
        backbone(torch.randn(2, 3, 16, 16))
        assert torch.equal(before, backbone.features[1].running_mean) == freeze
        assert backbone.features[0].training


def test_freezing_touches_only_batch_norm():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    freeze_batch_norm(net)
    assert [layer.training for layer in net] == [False, True]


def test_layer_names_can_be_looked_up():
    backbone = make("small")
    assert "features.3" in backbone.named_layers()
    assert backbone.get_submodule("features.3") is backbone.features[3]


def test_small_needs_nothing_but_its_name():
    assert BackboneConfig.model_validate({"name": "small"}) == BackboneConfig(
        name="small", output_stride=4, pretrained=False
    )
    assert build_backbone(BackboneConfig.model_validate({"name": "small"}), {}).num_channels == 64


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": "vgg16", "output_stride": 32}, "vgg16 has no output_stride 32; choose one of: 4, 8, 16"),
        ({"name": "small", "pretrained": True}, "small has no public weights; write pretrained: false"),
        ({"name": "small", "output_stride": 8}, "small has no output_stride 8; choose one of: 4"),
        ({"name": "resnet18"}, "Input should be 'small', 'vgg16'"),
    ],
)
def test_an_impossible_backbone_is_refused_with_the_way_out(fields, text):
    with pytest.raises(ValidationError, match=text):
        BackboneConfig.model_validate(fields)


def test_a_pretrained_backbone_names_the_missing_file(tmp_path):
    with pytest.raises(WeightsError, match=r"weights\.squeezenet1_1: there is no file .*none\.pth"):
        build_backbone(BackboneConfig(name="squeezenet1_1"), {"squeezenet1_1": tmp_path / "none.pth"})


def test_config_modules_leave_torch_alone():
    code = (
        "import sys, stages.nets.backbones.config, stages.nets.segmenters.config, stages.nets.weights\n"
        "import stages.nets.segmenters.files\n"
        "from stages.nets.segmenters.config import DeepLabConfig, check_encoder\n"
        "DeepLabConfig(name='deeplabv3plus'); check_encoder('resnet50')\n"
        "print([name for name in ('torch', 'timm', 'torchvision', 'safetensors') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
