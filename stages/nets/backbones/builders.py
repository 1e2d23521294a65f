"""Build the backbones: the plain networks of torchvision and timm at a chosen output stride, and a small one of ours.

Reads weight files only through ``stages.nets.weights``; writes nothing.
Every backbone keeps the plain network's tensor names (``features.0.weight``, ``layer4.2.conv3.weight`` …) without its
ImageNet classifier, and takes images normalised with ImageNet's mean and deviation, whatever its own weights expect.
Shapes: B images, D feature channels, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor, nn
from torchvision import models
from torchvision.models import vgg

from stages.contracts import Progress
from stages.nets.backbones.config import BackboneConfig
from stages.nets.backbones.dilation import limit_stride
from stages.nets.backbones.inception import InceptionFeatures
from stages.nets.weights import load_pretrained

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

HEADS = frozenset({"classifier", "avgpool", "global_pool", "dropout", "fc", "AuxLogits"})
"""Children of the plain networks that stand behind the features."""


class Backbone(nn.Module):
    """The feature part of a plain network: its children, called one after the other.

    Attributes:
        name: As a config spells it; empty when built without one.
        num_channels: D.
        output_stride: Pixels per cell.
    """

    name: str = ""

    def __init__(
        self,
        plain: nn.Module,
        *,
        num_channels: int,
        output_stride: int,
        half_normalised: bool = False,
        freeze_bn: bool = False,
    ) -> None:
        """Adopt the children of ``plain`` that make features, under their names.

        Args:
            plain: A network whose feature part is the chain of its children.
            num_channels: D.
            output_stride: Pixels per cell.
            half_normalised: The weights expect (x - 0.5) / 0.5 instead of ImageNet's mean and deviation.
            freeze_bn: Leave the BatchNorm layers in evaluation mode always.
        """
        super().__init__()
        for name, child in plain.named_children():
            if name not in HEADS:
                self.add_module(name, child)
        self.num_channels = num_channels
        self.output_stride = output_stride
        self.freeze_bn = freeze_bn
        self.half_normalised = half_normalised

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D, h, w) of images (B, 3, H, W) that are normalised with ImageNet's mean and deviation."""
        features = renormalise_half(images) if self.half_normalised else images
        for child in self.children():
            features = child(features)
        return features

    def train(self, mode: bool = True) -> Backbone:
        """Switch between training and evaluation; frozen BatchNorm layers stay in evaluation."""
        super().train(mode)
        if self.freeze_bn:
            freeze_batch_norm(self)
        return self

    def named_layers(self) -> tuple[str, ...]:
        """Names of all layers, in the order of execution; what a config may name as a position."""
        return tuple(name for name, _ in self.named_modules() if name)


def freeze_batch_norm(module: nn.Module) -> None:
    """Put every BatchNorm under ``module`` into evaluation mode: its running statistics stay as they are."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


def renormalise_half(images: Tensor) -> Tensor:
    """Turn images (B, 3, H, W) normalised with ImageNet's mean and deviation into (x - 0.5) / 0.5."""
    std = images.new_tensor(IMAGENET_STD).view(3, 1, 1)
    mean = images.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    return images * (std / 0.5) + (mean - 0.5) / 0.5


# ---------------------------------------------------------------------------------------------------------------------
# One function per network
# ---------------------------------------------------------------------------------------------------------------------


class SmallNet(nn.Module):
    """Six 3×3 convolutions with BatchNorm, 16 to 64 channels, at stride 4: trains from scratch on a CPU in a minute.

    For the embedded synthetic images of about 96 px: 61 million multiplications an image.  A cell sees 39 px.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 48, 64, 64)) -> None:
        """Make the layers; the first two convolutions halve the map."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number, width in enumerate(widths):
            stride = 2 if number < 2 else 1
            layers += [
                nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _small(config: BackboneConfig) -> Backbone:
    return Backbone(SmallNet(), num_channels=64, output_stride=config.output_stride)


class _Features(nn.Module):
    """A plain network of one chain named ``features``."""

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features


def _vgg16(config: BackboneConfig) -> Backbone:
    """VGG16 without its final pool, so that the plain stride is 16; at 8 conv5 has dilation 2, at 4 conv4 has too."""
    features = vgg.make_layers(vgg.cfgs["D"])[:-1]
    for layer in features:
        if isinstance(layer, nn.Conv2d):  # as torchvision starts it
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(nn.Parameter, layer.bias))
    limit_stride(features, config.output_stride)
    return Backbone(_Features(features), num_channels=512, output_stride=config.output_stride)


def _resnet(config: BackboneConfig) -> Backbone:
    dilations = [config.output_stride < stride for stride in (8, 16, 32)]
    make: Callable[..., models.ResNet] = models.resnet50 if config.name == "resnet50" else models.resnet101
    plain = make(weights=None, replace_stride_with_dilation=dilations)
    return Backbone(plain, num_channels=2048, output_stride=config.output_stride)


def _squeezenet1_1(config: BackboneConfig) -> Backbone:
    """SqueezeNet 1.1; its pools round up (ceil_mode), its first convolution has no padding: maps lose up to a cell."""
    plain = models.squeezenet1_1(weights=None)
    limit_stride(plain.features.modules(), config.output_stride)
    return Backbone(plain, num_channels=512, output_stride=config.output_stride)


def _mobilenet_v2(config: BackboneConfig) -> Backbone:
    plain = models.mobilenet_v2(weights=None)
    limit_stride(plain.features.modules(), config.output_stride)
    return Backbone(plain, num_channels=1280, output_stride=config.output_stride)


def _inception_v3(config: BackboneConfig) -> Backbone:
    plain = InceptionFeatures(config.output_stride)
    return Backbone(plain, num_channels=2048, output_stride=config.output_stride, half_normalised=True)


def _timm(config: BackboneConfig, *, num_channels: int, half_normalised: bool = False) -> Backbone:
    import timm

    plain = timm.create_model(config.name, pretrained=False, num_classes=0, output_stride=config.output_stride)
    return Backbone(
        plain, num_channels=num_channels, output_stride=config.output_stride, half_normalised=half_normalised
    )


BUILDERS: Mapping[str, Callable[[BackboneConfig], Backbone]] = {
    "small": _small,
    "vgg16": _vgg16,
    "resnet50": _resnet,
    "resnet101": _resnet,
    "squeezenet1_1": _squeezenet1_1,
    "inception_v3": _inception_v3,
    "mobilenet_v2": _mobilenet_v2,
    "seresnet50": partial(_timm, num_channels=2048),
    "mobilenetv1_100": partial(_timm, num_channels=1024, half_normalised=True),
}


def build_plain_backbone(config: BackboneConfig) -> Backbone:
    """The backbone at its random start."""
    backbone = BUILDERS[config.name](config)
    backbone.name = config.name
    backbone.freeze_bn = config.freeze_bn
    return backbone.train()


def build_backbone(config: BackboneConfig, weights: Mapping[str, Path], progress: Progress | None = None) -> Backbone:
    """The backbone at its start: ImageNet weights where the config says ``pretrained``, else random.

    Args:
        config: Which backbone.
        weights: Weight files by backbone name; a name that is not there is downloaded.
        progress: Told what was loaded.

    Raises:
        WeightsError: weights are missing or do not fit; the tensors are named.
    """
    backbone = build_plain_backbone(config)
    if config.pretrained:
        report = load_pretrained(backbone, config.name, weights.get(config.name), progress=progress)
        if progress is not None:
            progress.info(report.describe())
    return backbone
