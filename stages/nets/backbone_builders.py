"""Build the backbones: the plain networks of torchvision and timm at a chosen output stride, and a small one of ours.

Reads weight files only through ``stages.nets.weights``; writes nothing.
Every backbone keeps the plain network's tensor names (``features.0.weight``, ``layer4.2.conv3.weight`` …) without its
ImageNet classifier, and takes images normalised with ImageNet's mean and deviation, whatever its own weights expect.
Shapes: B images, D feature channels, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional
from torchvision import models
from torchvision.models import inception

from stages.contracts import Progress
from stages.nets.backbones import BackboneConfig
from stages.nets.weights import load_pretrained

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

HEADS = frozenset({"classifier", "avgpool", "global_pool", "dropout", "fc", "AuxLogits"})
"""Children of the plain networks that stand behind the features."""


class Backbone(nn.Module):
    """The feature part of a plain network: its children, called one after the other.

    Attributes:
        num_channels: D.
        output_stride: Pixels per cell.
    """

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


def limit_stride(layers: Iterable[nn.Module], output_stride: int) -> None:
    """Lower the stride of a chain of layers in place: late strides become 1, later kernels are dilated.

    The layer that loses its stride keeps the dilation reached so far, the layers behind it are dilated by the stride
    lost, so that each weight still sees the neighbours that it was trained for.  A pool that loses its stride becomes
    3×3 with padding, the paper's way to keep the size of the map.

    Args:
        layers: Modules in the order of execution; convolutions of stride 2 keep their padding "same".
        output_stride: Pixels per cell that are wanted.
    Source: Chen et al., 2015, §3.1.
    """
    stride = dilation = 1
    for layer in layers:
        if not isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            continue
        step = _first(layer.stride)
        loses_stride = step > 1 and stride * step > output_stride
        if isinstance(layer, nn.MaxPool2d):
            if loses_stride:
                layer.kernel_size, layer.padding, layer.ceil_mode = 3, dilation, False
                layer.stride, layer.dilation = 1, dilation
        else:
            if loses_stride:
                layer.stride = (1, 1)
            if dilation > 1:
                dilate(layer, dilation)
        if loses_stride:
            dilation *= step
        else:
            stride *= step


def dilate(conv: nn.Conv2d, dilation: int) -> None:
    """Dilate the kernel of ``conv`` and pad so that the map keeps its size; 1-wide kernel sides stay as they are."""
    height, width = conv.kernel_size
    conv.dilation = (dilation if height > 1 else 1, dilation if width > 1 else 1)
    conv.padding = ((height // 2) * conv.dilation[0], (width // 2) * conv.dilation[1])


def _first(value: int | tuple[int, ...]) -> int:
    return value[0] if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------------------------------
# One function per network
# ---------------------------------------------------------------------------------------------------------------------


class SmallNet(nn.Module):
    """Six 3×3 convolutions with BatchNorm, 24 to 96 channels, at stride 4: trains from scratch on a CPU in a minute.

    For the embedded synthetic images of about 96 px.  The receptive field is 41 px.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 32, 48, 64, 96, 96)) -> None:
        """Make the layers; the first and the third convolution halve the map."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number, width in enumerate(widths):
            stride = 2 if number in {0, 2} else 1
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
    return Backbone(SmallNet(), num_channels=96, output_stride=config.output_stride)


def _vgg16(config: BackboneConfig) -> Backbone:
    """VGG16 without its final pool, so that the plain stride is 16; at 8 conv5 has dilation 2, at 4 conv4 has too."""
    plain = models.vgg16(weights=None, init_weights=False)
    _initialise_vgg(plain.features)
    plain.features = plain.features[:-1]
    limit_stride(plain.features, config.output_stride)
    return Backbone(plain, num_channels=512, output_stride=config.output_stride)


def _initialise_vgg(features: nn.Module) -> None:
    """Torchvision's own initialisation, without the 120 million numbers of the classifier."""
    for layer in features.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


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


class _PaddedReduction(nn.Module):
    """Mixin of Inception's two reduction blocks: the pooled branch padded as the convolutions, at a free stride."""

    reduction_stride = 2

    def pool(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(x, kernel_size=3, stride=self.reduction_stride, padding=1)


class _ReductionB(_PaddedReduction, inception.InceptionB):
    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch3x3(x), double, self.pool(x)]


class _ReductionD(_PaddedReduction, inception.InceptionD):
    def _forward(self, x: Tensor) -> list[Tensor]:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return [branch3x3, branch7x7, self.pool(x)]


def _inception_v3(config: BackboneConfig) -> Backbone:
    """Inception-v3 to Mixed_7c.

    Differs from torchvision: its unpadded convolutions and pools are padded, so that maps align with the image and
    small images pass; the tensors are the same.
    """
    parts = inception
    blocks: list[Callable[..., nn.Module]] = [
        parts.BasicConv2d, parts.InceptionA, _ReductionB, parts.InceptionC, _ReductionD, parts.InceptionE,
        parts.InceptionAux,
    ]  # fmt: skip
    plain = models.Inception3(aux_logits=False, inception_blocks=blocks, init_weights=False)
    _initialise_vgg(plain)
    _align_inception(plain, config.output_stride)
    return Backbone(plain, num_channels=2048, output_stride=config.output_stride, half_normalised=True)


def _align_inception(plain: nn.Module, output_stride: int) -> None:
    """Pad everything "same"; take the stride from Mixed_7a (below 32) and Mixed_6a (below 16) and dilate what follows."""
    for layer in plain.modules():
        if isinstance(layer, nn.Conv2d):
            dilate(layer, 1)
        elif isinstance(layer, nn.MaxPool2d):
            layer.padding = 1
    dilation = 1
    for name, block in plain.named_children():
        if not name.startswith(("Mixed_6", "Mixed_7")):
            continue
        loses_stride = isinstance(block, _PaddedReduction) and output_stride < (16 if name == "Mixed_6a" else 32)
        for layer in block.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1) if loses_stride else layer.stride
                dilate(layer, dilation)
        if isinstance(block, _PaddedReduction) and loses_stride:
            block.reduction_stride = 1
            dilation *= 2


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
