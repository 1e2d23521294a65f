"""DeepLabV3 and DeepLabV3+ with encoders of segmentation-models-pytorch.

Pure network code; reads and writes nothing, downloads nothing: encoders start at random and get their weights from
``stages.nets.weights``.
Shapes: B images, C classes with background, H W pixels.
Source: Chen et al., 2017 (V3) and ECCV 2018 (V3+); code of segmentation-models-pytorch (MIT).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from stages.nets.backbones.builders import freeze_batch_norm
from stages.nets.segmenters.config import REFUSALS, DeepLabConfig, encoder_refusal
from stages.nets.segmenters.largefov import Segmenter


class DeepLab(Segmenter):
    """An SMP model without its final upsampling, for images of any size."""

    def __init__(self, config: DeepLabConfig, num_classes: int) -> None:
        """Build the net at a random start.

        Args:
            config: Encoder and decoder.
            num_classes: C.

        Raises:
            ConfigError: the encoder cannot be built at this stride.
        """
        super().__init__()
        self.num_classes = num_classes
        self.output_stride = config.output_stride
        self.freeze_bn = config.freeze_bn
        model = _build_model(config, num_classes)
        self.encoder: nn.Module = model.encoder
        self.decoder: nn.Module = model.decoder
        self.classifier: nn.Module = model.segmentation_head[0]

    @property
    def trunk(self) -> nn.Module:
        """The encoder."""
        return self.encoder

    def train(self, mode: bool = True) -> DeepLab:
        """Switch between training and evaluation; a frozen encoder's BatchNorm stays in evaluation."""
        super().train(mode)
        if self.freeze_bn:
            freeze_batch_norm(self.encoder)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, h, w) of normalised images (B, 3, H, W).

        Where H and W are multiples of the output stride, h w are the decoder's cells (stride 8 or 16, V3+: 4).
        Other images are padded at the bottom and on the right, and the logits are resized and cut to (H, W) exactly.
        """
        height, width = images.shape[-2:]
        bottom, right = -height % self.output_stride, -width % self.output_stride
        if bottom == right == 0:
            return self._score(images)
        padded = functional.pad(images, (0, right, 0, bottom))
        logits = functional.interpolate(
            self._score(padded), size=padded.shape[-2:], mode="bilinear", align_corners=False
        )
        return logits[..., :height, :width]

    def _score(self, images: Tensor) -> Tensor:
        return self.classifier(self.decoder(self.encoder(images)))


def _build_model(config: DeepLabConfig, num_classes: int) -> Any:  # noqa: ANN401 - SMP's classes are untyped
    import segmentation_models_pytorch as smp

    make = smp.DeepLabV3 if config.name == "deeplabv3" else smp.DeepLabV3Plus
    try:
        return make(
            encoder_name=config.encoder,
            encoder_weights=None,
            encoder_output_stride=config.output_stride,
            decoder_channels=config.decoder_channels,
            decoder_atrous_rates=config.aspp_dilations,
            decoder_aspp_dropout=config.aspp_dropout,
            classes=num_classes,
        )
    except REFUSALS as error:
        raise encoder_refusal(config.encoder, config.output_stride, error) from error
