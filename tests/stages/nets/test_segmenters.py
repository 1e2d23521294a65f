"""Every segmenter keeps the same promises; configs that cannot be built are refused early."""

import math
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from stages.contracts import SilentProgress
from stages.errors import ConfigError, WeightsError
from stages.nets.backbones.config import BACKBONES, BackboneConfig
from stages.nets.backbones.network import renormalise_half
from stages.nets.downloads import COCO_WEIGHTS
from stages.nets.segmenters.build import build_segmenter
from stages.nets.segmenters.config import (
    DILATABLE_ENCODERS,
    AnySegmenterConfig,
    DeepLabConfig,
    LargeFovConfig,
    SegmenterConfig,
    check_encoder,
    init_problems,
    pretrained_name,
)
from stages.nets.segmenters.deeplab_config import OUR_ENCODERS
from stages.nets.segmenters.largefov import move_to_centres
from stages.nets.weights import build_backbone, weights_identity

SMALL = {"name": "largefov", "backbone": {"name": "small"}}
SQUEEZENET = {"name": "largefov", "backbone": {"name": "squeezenet1_1"}}
VGG = {"name": "largefov", "backbone": {"name": "vgg16"}}
V3 = {"name": "deeplabv3", "encoder": "resnet18", "output_stride": 8, "decoder_channels": 32}
V3PLUS = {"name": "deeplabv3plus", "encoder": "resnet18", "output_stride": 16, "decoder_channels": 32}
V3PLUS_MOBILE = {"name": "deeplabv3plus", "encoder": "mobilenet_v2", "output_stride": 8, "decoder_channels": 16}
V3PLUS_LITE = {"name": "deeplabv3plus", "encoder": "tf_efficientnet_lite0", "decoder_channels": 16}
V2 = {"name": "deeplabv2", "backbone": {"name": "small"}, "dilations": (2, 4)}
LIGHT = [SMALL, SQUEEZENET, V2, V3, V3PLUS, V3PLUS_MOBILE, V3PLUS_LITE]


def parse(fields):
    return TypeAdapter(SegmenterConfig).validate_python(fields)


def make(fields, num_classes=4, init="random", **kwargs):
    return build_segmenter(parse(fields), num_classes, init=init, weights=kwargs.pop("weights", {}), **kwargs)


# --- configs -------------------------------------------------------------------------------------------------


def test_the_head_on_vgg_is_the_papers_and_light_elsewhere():
    vgg, squeezenet, small, resnet = (
        parse({"name": "largefov", "backbone": {"name": name}})
        for name in ("vgg16", "squeezenet1_1", "small", "resnet50")
    )
    assert (vgg.dilation, vgg.channels, vgg.fc7, vgg.batch_norm, vgg.dropout) == (12, 1024, True, False, 0.5)
    assert (squeezenet.dilation, squeezenet.channels, squeezenet.fc7, squeezenet.batch_norm) == (6, 256, False, True)
    assert (small.dilation, small.channels, small.backbone.output_stride) == (6, 96, 4)
    assert (resnet.dilation, resnet.fc7, resnet.batch_norm) == (12, True, True)
    assert parse({**SQUEEZENET, "dilation": 12, "batch_norm": False}).dilation == 12


def test_head_defaults_also_follow_a_ready_backbone_config():
    assert LargeFovConfig(backbone=BackboneConfig(name="squeezenet1_1")).dilation == 6


def test_dilations_double_when_the_stride_is_halved():
    assert parse({"name": "deeplabv3", "output_stride": 8}).aspp_dilations == (12, 24, 36)
    assert parse({"name": "deeplabv3"}).aspp_dilations == (6, 12, 18)
    assert parse({"name": "deeplabv3", "output_stride": 8, "aspp_dilations": (1, 2, 3)}).aspp_dilations == (1, 2, 3)


def test_the_light_nets_are_of_every_segmenter():
    assert {type(parse(fields)) for fields in LIGHT} == set(get_args(AnySegmenterConfig))


@pytest.mark.parametrize("fields", [*LIGHT, VGG])
def test_a_config_survives_json(fields):
    config = parse(fields)
    assert TypeAdapter(SegmenterConfig).validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("name", ["vgg16", "inceptionv4", "densenet121", "xception", "mit_b0", "nonsense"])
def test_encoders_that_cannot_dilate_are_refused_with_those_that_can(name):
    with pytest.raises(ConfigError, match=rf"encoder '{name}' cannot be dilated .*resnet50.*largefov"):
        check_encoder(name)
    with pytest.raises(ValidationError, match="choose one of: resnet18"):
        DeepLabConfig(name="deeplabv3plus", encoder=name)


@pytest.mark.parametrize("name", ["vgg16", "inceptionv4", "densenet121", "xception"])
def test_segmentation_models_refuses_what_we_refuse(name):
    from segmentation_models_pytorch.encoders import get_encoder

    with torch.device("meta"), pytest.raises(ValueError, match="dilated mode"):
        get_encoder(name, weights=None, output_stride=16)


def test_an_encoder_of_timm_is_probed():
    check_encoder("tu-mobilenetv1_100", 8)
    with pytest.raises(ConfigError, match=r"encoder 'tu-vgg11' cannot be built at output stride 16"):
        check_encoder("tu-vgg11", 16)
    with pytest.raises(ConfigError, match="encoder 'tu-nonsense' cannot be built"):
        check_encoder("tu-nonsense")


def encoder_maps(name, stride):
    from segmentation_models_pytorch.encoders import get_encoder

    with torch.device("meta"):
        features = get_encoder(name, weights=None, output_stride=stride).eval()(torch.empty(1, 3, 64, 96))
    return [tuple(map_.shape[2:]) for map_ in (features[2], features[-1])]


@pytest.mark.parametrize(
    "name", ["resnet50", "se_resnet50", "efficientnet-b0", "mobilenet_v2", "dpn68", "mobileone_s0"]
)
def test_one_encoder_of_each_listed_family_dilates(name):
    assert encoder_maps(name, 8) == [(16, 24), (8, 12)]


@pytest.mark.slow
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", DILATABLE_ENCODERS)
def test_every_listed_encoder_dilates(name, stride):
    assert encoder_maps(name, stride) == [(16, 24), (64 // stride, 96 // stride)]


@pytest.mark.slow
def test_the_list_is_complete():
    """Whatever else SMP offers is deprecated (timm-…), changes its attention (mit_…), or is refused by SMP."""
    from segmentation_models_pytorch.encoders import encoders, get_encoder

    for name in set(encoders) - set(DILATABLE_ENCODERS):
        if name.startswith(("timm-", "mit_")):
            continue
        with torch.device("meta"), pytest.raises(ValueError, match="dilated mode"):
            get_encoder(name, weights=None, output_stride=8)


# --- nets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", LIGHT, ids=lambda fields: fields["name"])
@pytest.mark.parametrize("size", [(65, 97), (64, 96)])
def test_logits_cover_any_image_and_carry_gradients_everywhere(fields, size):
    segmenter = make(fields).train()
    logits = segmenter(torch.randn(2, 3, *size))
    assert logits.shape[:2] == (2, 4)
    for cells, pixels in zip(logits.shape[2:], size, strict=True):
        assert any(abs(cells - math.ceil(pixels / stride)) <= 1 for stride in (1, 4, 8))
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in segmenter.parameters())


def test_deeplab_keeps_its_cells_on_divisible_images_and_pixels_on_others():
    segmenter = make(V3PLUS).eval()
    with torch.no_grad():
        assert segmenter(torch.randn(1, 3, 64, 96)).shape == (1, 4, 16, 24)
        assert segmenter(torch.randn(1, 3, 65, 97)).shape == (1, 4, 65, 97)
        assert make(V3).eval()(torch.randn(1, 3, 64, 96)).shape == (1, 4, 8, 12)


@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("encoder", OUR_ENCODERS)
def test_deeplab_stands_on_our_own_encoders(encoder, stride):
    with torch.device("meta"):
        image = torch.empty(2, 3, 64, 96)
        plus = make({**V3PLUS_LITE, "encoder": encoder, "output_stride": stride})
        plain = make({**V3PLUS_LITE, "name": "deeplabv3", "encoder": encoder, "output_stride": stride})
        assert plus(image).shape == (2, 4, 16, 24), "the decoder works at stride 4"
        assert plain(image).shape == (2, 4, 64 // stride, 96 // stride)
        assert plus.encoder(image).shape == (2, 1280, 64 // stride, 96 // stride)


@pytest.mark.parametrize("fields", [V3, V3PLUS], ids=["v3", "v3plus"])
def test_the_decoder_on_our_encoders_is_that_of_smps_models(fields):
    """But for the layers that read the encoder, whose channels are others."""
    theirs, ours = make(fields), make({**fields, "encoder": "tf_efficientnet_lite0"})
    assert type(ours.decoder) is type(theirs.decoder)
    assert ours.classifier.weight.shape == theirs.classifier.weight.shape
    for mine, other in zip(ours.decoder.modules(), theirs.decoder.modules(), strict=True):
        assert type(mine) is type(other)
        if isinstance(mine, nn.Conv2d):
            assert (mine.kernel_size, mine.dilation) == (other.kernel_size, other.dilation)
        elif not list(mine.children()):
            assert str(mine) == str(other)
    name = "aspp.project.0.weight" if fields is V3 else "aspp.0.project.0.weight"
    starts = [float(net.decoder.state_dict()[name].std()) for net in (ours, theirs)]
    assert starts[0] == pytest.approx(starts[1], rel=0.1), "drawn alike"


def test_deeplab_pads_at_the_bottom_and_right_so_that_the_rest_stays_in_place():
    segmenter = make(V3PLUS).eval()
    image = torch.randn(1, 3, 64, 96)
    image[..., 60:, :] = 0
    with torch.no_grad():
        whole = nn.functional.interpolate(segmenter(image), size=(64, 96), mode="bilinear", align_corners=False)
        assert torch.allclose(segmenter(image[..., :60, :]), whole[..., :60, :], atol=1e-5)


def test_largefov_on_vgg_is_deeplab_v1():
    """DeepLab's own numbers: 321 px give 41 cells; about 20 million parameters for 21 classes (Caffe: vgg16_20M)."""
    with torch.device("meta"):
        segmenter = make(VGG, num_classes=21)
        assert segmenter(torch.empty(1, 3, 321, 321)).shape == (1, 21, 41, 41)
    vgg, fc6, fc7, classifier = 14_714_688, 512 * 1024 * 9 + 1024, 1024 * 1024 + 1024, 1024 * 21 + 21
    assert sum(parameter.numel() for parameter in segmenter.parameters()) == vgg + fc6 + fc7 + classifier
    assert segmenter.fc6[0].dilation == (12, 12)
    pools = [layer.kernel_size for layer in segmenter.backbone.modules() if isinstance(layer, nn.MaxPool2d)]
    assert pools == [3, 3, 3, 3]


# --- where cells lie -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(321, 321), (375, 500), (96, 65)])
def test_scores_at_corners_are_moved_to_where_everybody_takes_them_to_be(size):
    rows, columns = (torch.arange(-(-side // 8)) * 8.0 for side in size)
    at_corners = torch.stack([rows[:, None].expand(-1, len(columns)), columns.expand(len(rows), -1)])[None]
    moved = move_to_centres(at_corners, size, 8)
    whole = nn.functional.interpolate(moved, size=size, mode="bilinear", align_corners=False)[0]
    inside = slice(8, -12)
    for axis, side in enumerate(size):
        true = torch.arange(side, dtype=torch.float32)
        found = whole[axis].transpose(0, 1)[0] if axis == 0 else whole[axis][0]
        assert torch.allclose(found[inside], true[inside], atol=1e-3)
    unmoved = nn.functional.interpolate(at_corners, size=size, mode="bilinear", align_corners=False)[0, 1, 0]
    assert (unmoved - torch.arange(size[1])).abs()[inside].max() > 1, "what it is for"


CORNERS = [
    name if name == "vgg16" else pytest.param(name, marks=pytest.mark.slow)
    for name, spec in BACKBONES.items()
    if spec.has_corner_cells
]


@pytest.mark.parametrize("name", CORNERS)
def test_cells_lie_at_corners(name):
    """Kernels that are their own mirror image see the same in a mirror image, if its cells lie as the image's."""
    torch.manual_seed(0)
    backbone = {"name": name, "pretrained": False}
    segmenter = make({**VGG, "backbone": backbone, "channels": 8, "align_corners": True}).eval()
    for layer in segmenter.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = (layer.weight.data + layer.weight.data.flip(-1)) / 2
    images = torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        logits, mirrored = segmenter(images), segmenter(images.flip(-1)).flip(-1)
    assert logits.shape[2:] == (64 // segmenter.backbone.output_stride + 1,) * 2
    assert torch.allclose(logits, mirrored, atol=1e-3 * float(logits.abs().max()))
    assert not torch.allclose(logits, logits.flip(-1), atol=1e-3 * float(logits.abs().max()))


def test_corners_are_of_backbones_that_have_them_alone():
    with pytest.raises(
        ValidationError, match=r"align_corners goes with small, vgg16, .*; those of squeezenet1_1 lie elsewhere"
    ):
        parse({**SQUEEZENET, "align_corners": True})
    config = parse({**VGG, "align_corners": True})
    assert parse(config.model_dump(mode="json")) == config


def test_largefov_on_squeezenet_is_one_dilated_convolution_with_batch_norm():
    segmenter = make(SQUEEZENET)
    assert [type(layer) for layer in segmenter.fc6] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout]
    assert segmenter.fc6[0].dilation == (6, 6)
    assert isinstance(segmenter.fc7, nn.Identity)


@pytest.mark.parametrize("fields", [*LIGHT, VGG], ids=lambda fields: str(fields.get("encoder", fields.get("backbone"))))
def test_each_parameter_is_in_one_group_and_only_the_head_is_faster(fields):
    with torch.device("meta"):
        segmenter = make(fields)
    trunk, head = segmenter.parameter_groups()
    assert (trunk["lr_factor"], head["lr_factor"]) == (1.0, 10.0)
    assert {id(p) for p in trunk["params"]} == {id(p) for p in segmenter.trunk.parameters()}
    ids = [id(p) for group in (trunk, head) for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in segmenter.parameters()}
    last = segmenter.aspp[0] if fields["name"] == "deeplabv2" else segmenter.classifier
    assert id(last.weight) in {id(p) for p in head["params"]}


def test_a_frozen_encoder_keeps_its_statistics_while_the_decoder_learns():
    segmenter = make({**V3PLUS, "freeze_bn": True}).train()
    encoder_before = segmenter.encoder.bn1.running_mean.clone()
    decoder_before = segmenter.decoder.block1[1].running_mean.clone()
    segmenter(torch.randn(2, 3, 32, 32))
    assert torch.equal(segmenter.encoder.bn1.running_mean, encoder_before)
    assert not torch.equal(segmenter.decoder.block1[1].running_mean, decoder_before)


# --- starts --------------------------------------------------------------------------------------------------


def test_imagenet_weights_of_torchvision_fit_the_encoders_of_smp(tmp_path):
    from torchvision import models

    plain = models.resnet18(weights=None).state_dict()
    torch.save(plain, tmp_path / "w.pth")
    progress, said = SilentProgress(), []
    progress.info = said.append
    segmenter = make(V3PLUS, init="imagenet", weights={"resnet18": tmp_path / "w.pth"}, progress=progress)
    assert torch.equal(segmenter.encoder.layer4[1].conv2.weight, plain["layer4.1.conv2.weight"])
    assert said == ["resnet18 from w.pth: 120 tensors loaded, 2 not used (fc.bias, fc.weight)"]


@pytest.mark.parametrize(("encoder", "stride"), [("tf_efficientnet_lite0", 16), ("tf_efficientnet_lite2", 8)])
def test_a_packages_imagenet_weights_give_the_encoder_the_backbones_own_features(encoder, stride):
    fields = {**V3PLUS_LITE, "encoder": encoder, "output_stride": stride}
    segmenter = make(fields, init="imagenet").eval()
    backbone = build_backbone(BackboneConfig(name=encoder, output_stride=stride), {}).eval()
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(segmenter.encoder(images), backbone(images))
        low, high = segmenter._encode(images)[2:]
        assert torch.equal(high, backbone(images))
        assert torch.equal(low, backbone.blocks[:2](backbone.bn1(backbone.conv_stem(renormalise_half(images)))))
    assert pretrained_name(parse(fields), "imagenet") == encoder
    assert init_problems(parse(fields), "classifier", BackboneConfig(name=encoder)) == []


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "mobilenet_v2"])
def test_our_backbones_and_smps_encoders_share_tensor_names_and_shapes(name):
    from segmentation_models_pytorch.encoders import get_encoder

    with torch.device("meta"):
        ours = BackboneConfig(name=name, pretrained=False).build().state_dict()
        theirs = get_encoder(name, weights=None).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("fields", [SMALL, V3PLUS_MOBILE, V3PLUS_LITE], ids=["largefov", "deeplab", "ours"])
def test_the_classifiers_backbone_is_the_segmenters_start(fields):
    name = parse(fields).backbone_name
    stride = 4 if name == "small" else 16
    classifier = BackboneConfig(name=name, output_stride=stride, pretrained=False).build()
    segmenter = make(fields, init="classifier", classifier_backbone=classifier.state_dict())
    for key, value in classifier.state_dict().items():
        assert torch.equal(segmenter.trunk.state_dict()[key], value)


def test_another_classifier_is_refused_by_tensor_name():
    classifier = BackboneConfig(name="squeezenet1_1", pretrained=False).build()
    with pytest.raises(WeightsError, match=r"this run's classifier into small: .*another net"):
        make(SMALL, init="classifier", classifier_backbone=classifier.state_dict())
    with pytest.raises(WeightsError, match="needs the trained classifier's backbone"):
        make(SMALL, init="classifier")


def test_starts_that_cannot_be_are_known_without_building():
    small, squeezenet, v3plus = parse(SMALL), parse(SQUEEZENET), parse(V3PLUS)
    resnet = BackboneConfig(name="resnet50")
    assert init_problems(squeezenet, "imagenet", None) == []
    assert init_problems(squeezenet, "classifier", squeezenet.backbone) == []
    assert init_problems(small, "random", None) == []
    assert "small has no public weights" in init_problems(small, "imagenet", None)[0]
    assert (
        "contradicts the net's pretrained: false"
        in init_problems(parse({**V3, "pretrained": False}), "imagenet", None)[0]
    )
    assert "the classifier's backbone is resnet50" in init_problems(v3plus, "classifier", resnet)[0]
    assert "there is no classifier" in init_problems(v3plus, "classifier", None)[0]
    with pytest.raises(ConfigError, match="small has no public weights"):
        make(SMALL, init="imagenet")


def test_what_a_key_must_know_of_public_weights():
    assert pretrained_name(parse(SQUEEZENET), "imagenet") == "squeezenet1_1"
    assert pretrained_name(parse(V3), "imagenet") == "resnet18"
    assert pretrained_name(parse(V3), "classifier") is None


@pytest.mark.parametrize("name", ["deeplabv3", "deeplabv3plus"])
def test_nothing_is_downloaded_while_building(name, monkeypatch):
    import huggingface_hub
    import segmentation_models_pytorch.encoders as smp_encoders

    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(smp_encoders, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with torch.device("meta"):
        make({"name": name, "encoder": "resnet18"})


# --- fc6 and fc7 of VGG16 ------------------------------------------------------------------------------------

DECIMATED = {**VGG, "channels": 64, "fc_init": "decimated"}


def vgg_file(path, **changes):
    """A file in the layout of torchvision's vgg16 whose fully connected layers say where a number comes from."""
    tensors = dict(BackboneConfig(name="vgg16", output_stride=16, pretrained=False).build().state_dict())
    channel = torch.arange(4096.0)
    cell = torch.arange(7.0)[:, None] * 10 + torch.arange(7.0)
    fc6 = (channel[:, None, None, None] * 100 + cell).expand(4096, 2, 7, 7)
    # the file has 512 input channels, of which all are alike: an expanded tensor takes no memory until it is saved
    tensors["classifier.0.weight"] = fc6[:, :1].expand(4096, 512, 7, 7).reshape(4096, -1)
    tensors["classifier.0.bias"] = channel
    tensors["classifier.3.weight"] = channel[:, None] * 10_000 + channel
    tensors["classifier.3.bias"] = -channel
    tensors.update(changes)
    torch.save({name: value for name, value in tensors.items() if value is not None}, path)
    return path


@pytest.mark.slow
def test_fc6_and_fc7_are_every_so_many_channels_and_cells_of_vggs(tmp_path):
    said, progress = [], SilentProgress()
    progress.info = said.append
    weights = {"vgg16": vgg_file(tmp_path / "vgg16.pth")}
    segmenter = make(DECIMATED, init="imagenet", weights=weights, progress=progress)
    fc6, fc7 = segmenter.fc6[0], segmenter.fc7[0]
    cells = torch.tensor([[0.0, 3, 6], [30, 33, 36], [60, 63, 66]])
    assert torch.equal(fc6.weight[1, 100], 64 * 100 + cells), "channel 64 of 4096 is the second of 64"
    assert torch.equal(fc6.bias, torch.arange(64.0) * 64)
    assert fc7.weight[2, 3, 0, 0] == 128 * 10_000 + 192
    assert torch.equal(fc7.bias, -torch.arange(64.0) * 64)
    assert said[-1] == "fc6 and fc7 decimated from vgg16.pth: 4 tensors loaded"
    trunk, head = segmenter.parameter_groups()
    assert {id(p) for p in head["params"]} == {id(p) for p in segmenter.classifier.parameters()}, "only fc8 is new"
    assert trunk["lr_factor"] == 1
    vgg_file(tmp_path / "features.pth", **{"classifier.3.weight": None})
    with pytest.raises(WeightsError, match=r"needs classifier.3 of \(4096, 4096\), there is none; give the whole"):
        make(DECIMATED, init="imagenet", weights={"vgg16": tmp_path / "features.pth"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"name": "resnet50"}}, "needs backbone vgg16 without batch_norm"),
        ({"batch_norm": True}, "needs backbone vgg16 without batch_norm"),
        ({"channels": 1000}, "needs channels that divide 4096, found 1000"),
    ],
)
def test_what_has_no_fc6_cannot_start_at_it(changes, message):
    with pytest.raises(ValidationError, match=message):
        parse({**VGG, "fc_init": "decimated", **changes})


def test_a_decimated_head_needs_the_file_that_has_it():
    config = parse({**VGG, "fc_init": "decimated"})
    assert init_problems(config, "imagenet", None) == []
    for init in ("random", "classifier", "coco"):
        (problem,) = init_problems(config, init, BackboneConfig(name="vgg16"))
        assert "vgg16" in problem or "fc_init: decimated" in problem


# --- DeepLab v2 ----------------------------------------------------------------------------------------------


def test_deeplab_v2_on_resnet101_is_the_papers():
    fields = {"name": "deeplabv2", "backbone": {"name": "resnet101", "output_stride": 8, "freeze_bn": True}}
    with torch.device("meta"):
        segmenter = make(fields, num_classes=21)
        assert segmenter(torch.empty(1, 3, 321, 321)).shape == (1, 21, 41, 41)
        sizes = [tuple(view.shape[2:]) for view in segmenter.training_logits(torch.empty(1, 3, 321, 321))]
    assert sizes == [(41, 41), (20, 20), (30, 30), (41, 41)]  # 321 px × 0.75 is rounded down, as by deeplab-pytorch
    assert [conv.dilation[0] for conv in segmenter.aspp] == [6, 12, 18, 24]
    head = segmenter.parameter_groups()[1]["params"]
    assert sum(parameter.numel() for parameter in head) == 4 * (2048 * 9 * 21 + 21)
    learning = sum(parameter.numel() for parameter in segmenter.trunk.parameters() if parameter.requires_grad)
    assert learning == 42_394_816, "ResNet-101's convolutions without BatchNorm's scales and offsets"


def test_deeplab_v2_gives_the_largest_score_over_its_scales():
    torch.manual_seed(0)
    segmenter = make(V2).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        whole, half, three_quarters, largest = segmenter.training_logits(images)
        assert torch.equal(segmenter(images), largest)
        alone = make({**V2, "scales": ()}).eval()
        alone.load_state_dict(segmenter.state_dict())
        assert torch.equal(alone(images), whole)
        smaller = nn.functional.interpolate(images, size=(32, 48), mode="bilinear")
        torch.testing.assert_close(alone(smaller), half)
    same = [nn.functional.interpolate(one, size=(16, 24), mode="bilinear") for one in (half, three_quarters)]
    torch.testing.assert_close(largest, torch.stack([whole, *same]).amax(0))
    assert (largest > whole).any()


def test_a_net_without_scales_of_its_own_has_one_loss():
    segmenter = make(SMALL).eval()
    images = torch.randn(1, 3, 64, 96)
    (logits,) = segmenter.training_logits(images)
    assert torch.equal(logits, segmenter(images))


@pytest.mark.parametrize(
    ("changes", "message"), [({"scales": (1.0,)}, "are not 1"), ({"dilations": (0,)}, "at least 1")]
)
def test_scales_and_dilations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        parse({**V2, **changes})


# --- COCO ----------------------------------------------------------------------------------------------------


def test_our_table_of_coco_weights_is_torchvisions():
    from torchvision.models import segmentation

    enums = {
        "resnet50_coco": segmentation.DeepLabV3_ResNet50_Weights,
        "resnet101_coco": segmentation.DeepLabV3_ResNet101_Weights,
    }
    assert {name: source.url for name, source in COCO_WEIGHTS.items()} == {
        name: weights.COCO_WITH_VOC_LABELS_V1.url for name, weights in enums.items()
    }


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.body.", ""])
@pytest.mark.parametrize(
    "fields",
    [
        {"name": "deeplabv3plus", "encoder": "resnet50", "decoder_channels": 16},
        {"name": "deeplabv2", "backbone": {"name": "resnet50"}},
    ],
    ids=["smp", "ours"],
)
def test_the_backbone_of_a_net_trained_on_coco_is_a_start(tmp_path, prefix, fields):
    from torchvision import models

    torch.manual_seed(3)
    plain = {k: v for k, v in models.resnet50(weights=None).state_dict().items() if not k.startswith("fc.")}
    file = {f"{prefix}{name}": value for name, value in plain.items()}
    torch.save({**file, "classifier.4.weight": torch.zeros(21, 256, 1, 1)}, tmp_path / "coco.pth")
    segmenter = make(fields, init="coco", weights={"resnet50_coco": tmp_path / "coco.pth"})
    assert torch.equal(segmenter.trunk.state_dict()["layer4.2.conv3.weight"], plain["layer4.2.conv3.weight"])


def test_a_start_on_coco_is_named_where_there_is_none_and_in_the_key_where_there_is(tmp_path):
    assert (
        "no public weights of vgg16 on COCO are known, only of resnet50, resnet101"
        in init_problems(parse(VGG), "coco", None)[0]
    )
    resnet = parse({"name": "deeplabv2", "backbone": {"name": "resnet101"}})
    assert init_problems(resnet, "coco", None) == []
    assert pretrained_name(resnet, "coco") == "resnet101_coco"
    assert weights_identity("resnet101_coco", {}) == "public:deeplabv3_resnet101_coco-586e9e4e.pth"
    torch.save({"backbone.conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "w.pth")
    reason = r"resnet101_coco from w\.pth: the weights are of another net"
    with pytest.raises(WeightsError, match=reason), torch.device("meta"):
        make(resnet.model_dump(), init="coco", weights={"resnet101_coco": tmp_path / "w.pth"})
