"""The options of DeepLabV3 and V3+ and the encoders that they stand on; torch-free but where a ``tu-`` name is probed.

The nets are in ``stages.nets.segmenters.deeplab``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from stages.errors import ConfigError
from stages.nets.backbones.config import BACKBONES, BackboneConfig
from stages.nets.segmenters.base import SegmenterBase

if TYPE_CHECKING:
    from stages.nets.segmenters.deeplab import DeepLab

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

OUR_ENCODERS: tuple[str, ...] = tuple(name for name, spec in BACKBONES.items() if spec.decoder_layer is not None)
"""Backbones of ours that serve as encoders: what the classifier has, with the same weights and tensor names."""

_REFUSALS = (ValueError, TypeError, KeyError, AssertionError, RuntimeError, NotImplementedError, AttributeError)
"""What segmentation-models-pytorch and timm raise for a name they do not know or a net that they cannot dilate."""


class DeepLabConfig(SegmenterBase):
    """DeepLabV3 or DeepLabV3+ on an encoder of segmentation-models-pytorch or one of ``OUR_ENCODERS``.

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017 (V3);
    "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018 (V3+).
    """

    name: Literal["deeplabv3", "deeplabv3plus"]
    encoder: str = "resnet50"
    """An encoder of segmentation-models-pytorch that can be dilated, a timm model as ``tu-<name>``, or a backbone of
    ours: tf_efficientnet_lite0, tf_efficientnet_lite2."""
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

    @property
    def backbone_name(self) -> str:
        """The encoder's name."""
        return self.encoder

    @property
    def may_be_pretrained(self) -> bool:
        """``pretrained``."""
        return self.pretrained

    def build(self, num_classes: int) -> DeepLab:
        """The net at a random start.

        Raises:
            ConfigError: the encoder cannot be built at this stride.
        """
        if self.encoder in OUR_ENCODERS:
            return self._build_on_ours(num_classes)
        import segmentation_models_pytorch as smp

        from stages.nets.segmenters.deeplab import DeepLab

        make = smp.DeepLabV3 if self.name == "deeplabv3" else smp.DeepLabV3Plus
        try:
            model = make(
                encoder_name=self.encoder,
                encoder_weights=None,
                encoder_output_stride=self.output_stride,
                decoder_channels=self.decoder_channels,
                decoder_atrous_rates=self.aspp_dilations,
                decoder_aspp_dropout=self.aspp_dropout,
                classes=num_classes,
            )
        except _REFUSALS as error:
            raise _encoder_refusal(self.encoder, self.output_stride, error) from error
        parts = (model.encoder, model.decoder, model.segmentation_head[0])
        return DeepLab(*parts, num_classes, output_stride=self.output_stride, freeze_bn=self.freeze_bn)

    def _build_on_ours(self, num_classes: int) -> DeepLab:
        from torch import nn

        from stages.nets.segmenters.deeplab import DeepLab, decoder_of

        layer = BACKBONES[self.encoder].decoder_layer
        assert layer is not None
        backbone = BackboneConfig(name=self.encoder, output_stride=self.output_stride).build()
        decoder = decoder_of(
            backbone,
            layer[1],
            is_plus=self.name == "deeplabv3plus",
            channels=self.decoder_channels,
            dilations=self.aspp_dilations,
            dropout=self.aspp_dropout,
        )
        return DeepLab(
            backbone,
            decoder,
            nn.Conv2d(self.decoder_channels, num_classes, kernel_size=1),
            num_classes,
            output_stride=self.output_stride,
            freeze_bn=self.freeze_bn,
            decoder_layer=layer[0],
        )


def check_encoder(name: str, output_stride: int = 16) -> None:
    """Refuse an encoder that nobody can dilate; torch-free but for ``tu-`` names.

    Raises:
        ConfigError: there is no such encoder, or it has no dilated mode; the message lists those that have one.
    """
    if name.startswith("tu-"):
        _probe_encoder(name, output_stride)
    elif name not in (*DILATABLE_ENCODERS, *OUR_ENCODERS):
        raise ConfigError(
            f"encoder '{name}' cannot be dilated to output stride 8 or 16 (or does not exist); choose one of: "
            + ", ".join((*DILATABLE_ENCODERS, *OUR_ENCODERS))
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
    except _REFUSALS as error:
        raise _encoder_refusal(name, output_stride, error) from error


def _encoder_refusal(name: str, output_stride: int, error: Exception) -> ConfigError:
    """What to raise where a library refuses an encoder; its reason is in the message."""
    return ConfigError(
        f"encoder '{name}' cannot be built at output stride {output_stride} ({error}); choose one of: "
        + ", ".join((*DILATABLE_ENCODERS, *OUR_ENCODERS))
    )
