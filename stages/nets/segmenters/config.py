"""Which segmenters there are, and how a config asks for one; torch-free (torch is imported inside functions).

Reads and writes nothing.  ``largefov`` and ``deeplabv2`` are ours (``stages.nets.segmenters.largefov``,
``stages.nets.segmenters.deeplab_v2``) and stand on any of our backbones; ``deeplabv3`` and ``deeplabv3plus`` come from
segmentation-models-pytorch (``stages.nets.segmenters.deeplab``).
Shapes: B images, C classes with background, h w cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stages.contracts import StageConfig
from stages.errors import ConfigError
from stages.nets.backbones.config import UNTRAINED, BackboneConfig
from stages.nets.downloads import COCO_WEIGHTS, coco_name

Init = Literal["imagenet", "coco", "classifier", "random"]
"""Where the segmenter's backbone starts: public weights, this run's classifier, or chance.

``coco`` is the backbone of a DeepLabV3 that torchvision trained on COCO's pixel masks, of VOC's classes alone: worth
points that no run on ImageNet weights has."""

FC_CHANNELS = 4096
"""Channels of VGG16's own fc6 and fc7."""

LIGHT_HEAD: Mapping[str, Any] = {"dilation": 6, "batch_norm": True, "fc7": False}

HEAD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "small": {**LIGHT_HEAD, "channels": 96, "dropout": 0.1},
    "squeezenet1_1": {**LIGHT_HEAD, "channels": 256, "dropout": 0.1},
    "vgg16": {},
}
"""Head fields that differ from the fields' defaults (DeepLab-LargeFOV's on VGG16); not listed: OTHER_HEAD."""

OTHER_HEAD: Mapping[str, Any] = {"batch_norm": True}

CORNER_BACKBONES: tuple[str, ...] = ("vgg16", "resnet50", "resnet101")
"""Backbones whose cell (i, j) looks at pixel (stride · i, stride · j); VGG16 with LargeFOV's 3×3 pools."""

DILATABLE_ENCODERS: tuple[str, ...] = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_32x16d",
    "resnext101_32x32d",
    "resnext101_32x48d",
    "se_resnet50",
    "se_resnet101",
    "se_resnet152",
    "se_resnext50_32x4d",
    "se_resnext101_32x4d",
    "senet154",
    "dpn68",
    "dpn68b",
    "dpn92",
    "dpn98",
    "dpn107",
    "dpn131",
    "efficientnet-b0",
    "efficientnet-b1",
    "efficientnet-b2",
    "efficientnet-b3",
    "efficientnet-b4",
    "efficientnet-b5",
    "efficientnet-b6",
    "efficientnet-b7",
    "mobilenet_v2",
    "mobileone_s0",
    "mobileone_s1",
    "mobileone_s2",
    "mobileone_s3",
    "mobileone_s4",
)
"""Encoders of segmentation-models-pytorch 0.6 that can be dilated to output stride 8 and 16 (a test builds them all).

Left out: the deprecated ``timm-…`` names (``tu-…`` serves), and MiT, whose attention loses its key reduction when SMP
dilates it."""


REFUSALS = (ValueError, TypeError, KeyError, AssertionError, RuntimeError, NotImplementedError, AttributeError)
"""What segmentation-models-pytorch and timm raise for a name they do not know or a net that they cannot dilate."""


class LargeFovConfig(StageConfig):
    """DeepLab-LargeFOV: one wide dilated 3×3 convolution on a backbone, then 1×1 convolutions.

    Source: Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", 2015;
    numbers as in the SEC release (Kolesnikov and Lampert, 2016).
    Differs: fc6 and fc7 start at random unless ``fc_init: decimated`` (the release decimates VGG16's), and scores are
    taken for those of the cells' centres unless ``align_corners`` (the release aligns corners).
    """

    name: Literal["largefov"] = "largefov"
    backbone: BackboneConfig
    """The backbone; ``output_stride: 8`` is the paper's."""
    dilation: int = Field(default=12, ge=1, le=64)
    """Dilation of the 3×3 convolution fc6 in cells; 12 on VGG16, by default 6 on squeezenet1_1 and small."""
    channels: int = Field(default=1024, ge=8, le=4096)
    """Channels of fc6 and fc7; by default 256 on squeezenet1_1 and 96 on small."""
    fc7: bool = True
    """Whether a 1×1 convolution stands between fc6 and the classifier; by default not on squeezenet1_1 and small."""
    batch_norm: bool = False
    """BatchNorm behind fc6 and fc7; by default on for every backbone but vgg16."""
    dropout: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Dropped share of the head's channels in training; by default 0.1 on squeezenet1_1 and small."""
    fc_init: Literal["random", "decimated"] = "random"
    """decimated: fc6 and fc7 start at every fourth channel and third cell of VGG16's own (4096 × 7 × 7), as DeepLab's
    release does, and then learn as fast as the backbone; needs vgg16, ``init: imagenet`` and no ``batch_norm``.
    VGG16's cells, 96 px apart, are so at ``dilation`` 12 with ``output_stride: 8``, at 6 with 16, at 24 with 4."""
    align_corners: bool = False
    """Take the scores for those of pixels 0, 8, 16 …, where padded 3×3 kernels of stride 2 look, as DeepLab's release
    does; else outlines are up to half a cell off, in crops otherwise than in whole images.  vgg16 and ResNets."""

    @model_validator(mode="after")
    def _check_backbone(self) -> LargeFovConfig:
        if self.align_corners and self.backbone.name not in CORNER_BACKBONES:
            raise ValueError(
                f"align_corners goes with {', '.join(CORNER_BACKBONES)}, whose cells lie at pixels 0, 8, 16 …; those "
                f"of {self.backbone.name} lie elsewhere: leave it out"
            )
        if self.fc_init == "decimated":
            if self.backbone.name != "vgg16" or self.batch_norm:
                raise ValueError(
                    "fc_init: decimated needs backbone vgg16 without batch_norm: whose fc6 and fc7 they are"
                )
            if FC_CHANNELS % self.channels:
                raise ValueError(f"fc_init: decimated needs channels that divide {FC_CHANNELS}, found {self.channels}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_head(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the user wrote
        """Head defaults that depend on the backbone."""
        if not isinstance(values, dict):
            return values
        backbone = values.get("backbone")
        name = backbone.get("name") if isinstance(backbone, dict) else getattr(backbone, "name", None)
        if not isinstance(name, str):
            return values
        return {**HEAD_DEFAULTS.get(name, OTHER_HEAD), **values}


class DeepLabV2Config(StageConfig):
    """DeepLab v2: atrous spatial pyramid pooling, a sum of dilated 3×3 classifiers, on a backbone, over several scales.

    Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
    Fully Connected CRFs", 2017; numbers and scales as in deeplab-pytorch (4219467).
    """

    name: Literal["deeplabv2"]
    backbone: BackboneConfig
    """The backbone; the paper's is resnet101 with ``output_stride: 8`` and ``freeze_bn: true``, which here also keeps
    BatchNorm's scales and offsets."""
    dilations: tuple[int, ...] = Field(default=(6, 12, 18, 24), min_length=1, max_length=8)
    """Dilations of the classifiers in cells."""
    scales: tuple[float, ...] = Field(default=(0.5, 0.75), max_length=4)
    """Scales at which the net sees an image beside its own size.  In training each has a loss of its own and so has the
    maximum of all (MSC); in use the maximum is what counts.  ``[]`` sees one size alone."""

    @field_validator("dilations")
    @classmethod
    def _check_dilations(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError(f"dilations are at least 1 cell, found {value}")
        return value

    @field_validator("scales")
    @classmethod
    def _check_scales(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0.25 <= scale <= 2 or scale == 1 for scale in value):
            raise ValueError(f"scales lie within 0.25 … 2 and are not 1, which is always there, found {value}")
        return value


class DeepLabConfig(StageConfig):
    """DeepLabV3 or DeepLabV3+ on an encoder of segmentation-models-pytorch.

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017 (V3);
    "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018 (V3+).
    """

    name: Literal["deeplabv3", "deeplabv3plus"]
    encoder: str = "resnet50"
    """An encoder of segmentation-models-pytorch that can be dilated, or a timm model as ``tu-<name>``."""
    output_stride: Literal[8, 16] = 16
    """Pixels per cell of the encoder's last features."""
    aspp_dilations: tuple[int, int, int] = (6, 12, 18)
    """Dilations of the three 3×3 branches in cells; by default (6, 12, 18) at stride 16, (12, 24, 36) at stride 8."""
    decoder_channels: int = Field(default=256, ge=8, le=1024)
    """Channels of the ASPP branches and of the decoder."""
    aspp_dropout: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Dropped share behind the ASPP projection in training."""
    pretrained: bool = True
    """Whether ``init: imagenet`` may load ImageNet weights into the encoder."""
    freeze_bn: bool = False
    """Keep the running statistics of the encoder's BatchNorm as they were loaded."""

    @model_validator(mode="before")
    @classmethod
    def _fill_dilations(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the user wrote
        """The papers double the dilations when the stride is halved."""
        if isinstance(values, dict) and values.get("output_stride") == 8:
            return {"aspp_dilations": (12, 24, 36), **values}
        return values

    @field_validator("aspp_dilations")
    @classmethod
    def _check_dilations(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if min(value) < 1:
            raise ValueError(f"dilations are at least 1 cell, found {value}")
        return value

    @field_validator("encoder")
    @classmethod
    def _check_encoder(cls, value: str) -> str:
        if not value.startswith("tu-"):
            try:
                check_encoder(value)
            except ConfigError as error:
                raise ValueError(error.message) from None
        return value


AnySegmenterConfig = LargeFovConfig | DeepLabV2Config | DeepLabConfig

SegmenterConfig = Annotated[AnySegmenterConfig, Field(discriminator="name")]
"""Any segmenter, told apart by ``name``."""


def check_encoder(name: str, output_stride: int = 16) -> None:
    """Refuse an encoder that segmentation-models-pytorch cannot dilate; torch-free but for ``tu-`` names.

    Raises:
        ConfigError: there is no such encoder, or it has no dilated mode; the message lists those that have one.
    """
    if name.startswith("tu-"):
        _probe_encoder(name, output_stride)
    elif name not in DILATABLE_ENCODERS:
        raise ConfigError(
            f"encoder '{name}' cannot be dilated to output stride 8 or 16 (or does not exist); choose one of: "
            + ", ".join(DILATABLE_ENCODERS)
            + "; or a timm model as tu-<name>.  VGG16 and SqueezeNet are served by the segmenter 'largefov'"
        )


def _probe_encoder(name: str, output_stride: int) -> None:
    """Build an encoder on torch's meta device (no memory, no numbers) to see whether it can be dilated.

    Raises:
        ConfigError: it cannot; the reason that the library gives is in the message.
    """
    import torch
    from segmentation_models_pytorch.encoders import get_encoder

    try:
        with torch.device("meta"):
            get_encoder(name, weights=None, output_stride=output_stride)
    except REFUSALS as error:
        raise encoder_refusal(name, output_stride, error) from error


def encoder_refusal(name: str, output_stride: int, error: Exception) -> ConfigError:
    """What to raise where a library refuses an encoder; its reason is in the message."""
    return ConfigError(
        f"encoder '{name}' cannot be built at output stride {output_stride} ({error}); choose one of: "
        + ", ".join(DILATABLE_ENCODERS)
    )


def backbone_name(config: AnySegmenterConfig) -> str:
    """The name under which ``weights:`` lists this segmenter's backbone (the classifier's name for the same net)."""
    return config.encoder if isinstance(config, DeepLabConfig) else config.backbone.name


def pretrained_name(config: AnySegmenterConfig, init: Init) -> str | None:
    """The entry of ``weights:`` whose public weights enter this segmenter, or None: what a cache key has to know."""
    if init == "coco":
        return coco_name(backbone_name(config))
    return backbone_name(config) if init == "imagenet" else None


def init_problems(config: AnySegmenterConfig, init: Init, classifier: BackboneConfig | None) -> list[str]:
    """Why this segmenter cannot start from ``init``; empty when it can.  Torch-free, for the check before a run.

    Args:
        config: The segmenter.
        init: Where its backbone starts.
        classifier: The backbone of the run's classifier, where there is one.
    """
    name = backbone_name(config)
    pretrained = config.pretrained if isinstance(config, DeepLabConfig) else config.backbone.pretrained
    if init == "imagenet" and name in UNTRAINED:
        return [f"init: imagenet, but {name} has no public weights; write init: classifier or init: random"]
    if init == "coco" and coco_name(name) not in COCO_WEIGHTS:
        known = ", ".join(known.removesuffix("_coco") for known in COCO_WEIGHTS)
        return [f"init: coco, but no public weights of {name} on COCO are known, only of {known}; write init: imagenet"]
    if init in ("imagenet", "coco") and not pretrained:
        return [f"init: {init} contradicts the net's pretrained: false; change one of them"]
    if isinstance(config, LargeFovConfig) and config.fc_init == "decimated" and init != "imagenet":
        return [f"init: {init} has no fc6 and fc7 for net.fc_init: decimated; write init: imagenet or fc_init: random"]
    if init == "classifier" and (classifier is None or classifier.name != name):
        found = "there is no classifier" if classifier is None else f"the classifier's backbone is {classifier.name}"
        return [f"init: classifier needs a classifier on {name}, but {found}; use one backbone or init: imagenet"]
    return []
