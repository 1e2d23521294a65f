"""DeepLabV3 and DeepLabV3+ with encoders of segmentation-models-pytorch (SMP), or with its decoders on our backbones.

Pure network code; reads and writes nothing, downloads nothing: encoders start at random and get their weights from
``stages.nets.weights``.
Shapes: B images, C classes with background, D channels, H W pixels, h w cells.
Source: Chen et al., 2017 (V3) and ECCV 2018 (V3+); code of segmentation-models-pytorch (MIT).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from stages.nets.backbones.network import Backbone, freeze_batch_norm
from stages.nets.layers import capture_output
from stages.nets.segmenters.segmenter import Segmenter


class DeepLab(Segmenter):
    """An encoder and a decoder without SMP's final upsampling, for images of any size."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        classifier: nn.Module,
        num_classes: int,
        *,
        output_stride: int,
        freeze_bn: bool,
        decoder_layer: str | None = None,
    ) -> None:
        """Join the parts; ``decoder_layer`` is the layer of our backbone that the decoder reads too, None on SMP's."""
        super().__init__()
        self.num_classes = num_classes
        self.output_stride = output_stride
        self.freeze_bn = freeze_bn
        self.encoder = encoder
        self.decoder = decoder
        self.classifier = classifier
        self.decoder_layer = decoder_layer

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
        return self.classifier(self.decoder(self._encode(images)))

    def _encode(self, images: Tensor) -> list[Tensor]:
        """Features as SMP's decoders take them, who read the last ones and those at index 2."""
        if self.decoder_layer is None:
            return self.encoder(images)
        with capture_output(self.encoder, self.decoder_layer) as captured:
            features = self.encoder(images)
        return [images, images, captured.output, features]


def decoder_of(
    backbone: Backbone,
    low_channels: int,
    *,
    is_plus: bool,
    channels: int,
    dilations: tuple[int, int, int],
    dropout: float,
) -> nn.Module:
    """SMP's decoder for one of our backbones, with the numbers that it has behind an encoder of SMP.

    Args:
        backbone: At stride 8 or 16.
        low_channels: D of the features at stride 4, which V3+ reads.
        is_plus: Whether it is V3+'s, whose ASPP is separable, or V3's.
        channels: Of the ASPP branches and of the result.
        dilations: Of the three 3×3 branches in cells.
        dropout: Dropped share behind the ASPP projection.
    """
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder, DeepLabV3PlusDecoder

    if is_plus:
        decoder = DeepLabV3PlusDecoder(
            encoder_channels=(3, 3, low_channels, backbone.num_channels),
            encoder_depth=5,
            out_channels=channels,
            atrous_rates=dilations,
            output_stride=16 if backbone.output_stride == 16 else 8,
            aspp_separable=True,
            aspp_dropout=dropout,
        )
    else:
        decoder = DeepLabV3Decoder(
            backbone.num_channels, channels, dilations, aspp_separable=False, aspp_dropout=dropout
        )
    return decoder
