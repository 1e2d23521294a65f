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

from stages.nets.backbones.network import freeze_batch_norm
from stages.nets.segmenters.segmenter import Segmenter


class DeepLab(Segmenter):
    """An SMP model without its final upsampling, for images of any size."""

    def __init__(self, model: Any, num_classes: int, *, output_stride: int, freeze_bn: bool) -> None:  # noqa: ANN401
        """Adopt encoder, decoder and classifier of ``model``, whose class of SMP has no types."""
        super().__init__()
        self.num_classes = num_classes
        self.output_stride = output_stride
        self.freeze_bn = freeze_bn
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
