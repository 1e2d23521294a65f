"""DeepLab-LargeFOV on any of our backbones.

Network code; reads VGG16's weight file where fc6 and fc7 start at its own, writes nothing.
Shapes: B images, C classes with background, D feature channels, H W pixels, h w cells.
Source: Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", 2015;
layer numbers as in the SEC release (Kolesnikov and Lampert, "Seed, Expand and Constrain", ECCV 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stages.contracts import Progress
from stages.errors import WeightsError
from stages.nets.backbones.network import Backbone
from stages.nets.layers import parameter_groups
from stages.nets.segmenters.segmenter import Segmenter
from stages.nets.weights import WeightsReport, fetch_weights, non_finite, read_tensors
from stages.ops.cells import CellAxis, CellGrid, resample_maps


class LargeFov(Segmenter):
    """backbone → fc6 (3×3, dilated) → [fc7 (1×1)] → classifier (1×1); ReLU and dropout behind fc6 and fc7."""

    def __init__(
        self,
        backbone: Backbone,
        pool5: nn.Module,
        num_classes: int,
        *,
        dilation: int,
        channels: int,
        has_fc7: bool,
        batch_norm: bool,
        dropout: float,
        is_decimated: bool,
        align_corners: bool,
    ) -> None:
        """Put a head at a random start behind ``pool5`` behind ``backbone``; options as in ``LargeFovConfig``."""
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.pool5 = pool5
        self.fc6 = _stage(backbone.num_channels, channels, 3, dilation, batch_norm=batch_norm, dropout=dropout)
        self.fc7 = nn.Identity()
        if has_fc7:
            self.fc7 = _stage(channels, channels, 1, 1, batch_norm=batch_norm, dropout=dropout)
        self.is_decimated = is_decimated
        self.align_corners = align_corners
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type] - a Conv2d made with a bias has one

    @property
    def trunk(self) -> Backbone:
        """The backbone."""
        return self.backbone

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, h, w) at the backbone's stride."""
        logits = self.classifier(self.fc7(self.fc6(self.pool5(self.backbone(images)))))
        return move_to_centres(logits, images.shape[-2:], self.backbone.output_stride) if self.align_corners else logits

    def parameter_groups(self, head_lr_factor: float = 10.0) -> list[dict[str, Any]]:
        """As every segmenter's; decimated fc6 and fc7 are no new layers and learn as fast as the backbone."""
        if not self.is_decimated:
            return super().parameter_groups(head_lr_factor)
        plain = nn.ModuleList([self.backbone, self.fc6, self.fc7])
        return parameter_groups(self, plain, head_lr_factor)

    def load_imagenet(self, name: str, path: Path | None, progress: Progress | None) -> list[WeightsReport]:
        """As every segmenter's, and fc6 and fc7 where they start decimated."""
        reports = super().load_imagenet(name, path, progress)
        return [*reports, load_decimated(self, path, progress=progress)] if self.is_decimated else reports


def _stage(
    in_channels: int, channels: int, kernel_size: int, dilation: int, *, batch_norm: bool, dropout: float
) -> nn.Sequential:
    """Convolution, [BatchNorm], ReLU, dropout of whole channels' cells; the convolution starts at He's scale."""
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=padding, dilation=dilation, bias=not batch_norm)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    norm = [nn.BatchNorm2d(channels)] if batch_norm else []
    return nn.Sequential(conv, *norm, nn.ReLU(inplace=True), nn.Dropout(dropout))


def move_to_centres(logits: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Scores at the centres of the cells, where everybody takes them to be, from those at pixels 0, stride, 2·stride ….

    Args:
        logits: (B, C, h, w).
        size: (H, W) of the images in pixels.
        stride: Pixels between two cells.
    """
    corners = CellAxis(0.0, stride)
    return resample_maps(logits, size=logits.shape[-2:], image_size=size, cells=CellGrid(corners, corners))


# ---------------------------------------------------------------------------------------------------------------------
# fc6 and fc7 of VGG16
# ---------------------------------------------------------------------------------------------------------------------

FC_NAMES = {"fc6": "classifier.0", "fc7": "classifier.3"}
"""Torchvision's names of VGG16's fully connected layers."""

FC_STEP = 3
"""Of fc6's 7 × 7 cells each third is kept; at stride 8 instead of 32 those lie 3 × 4 = 12 cells apart: dilation 12."""


def load_decimated(segmenter: LargeFov, path: Path | None = None, *, progress: Progress | None = None) -> WeightsReport:
    """Start fc6 and fc7 at every so many channels and cells of VGG16's own fully connected layers.

    fc6 (4096, 512 · 7 · 7) becomes (channels, 512, 3, 3), fc7 (4096, 4096) becomes (channels, channels, 1, 1); kept are
    output channel 0, n, 2n … for n = 4096 / channels, in fc7 those of its input too, and rows and columns 0, 3 and 6.

    Args:
        segmenter: On vgg16, without BatchNorm in the head.
        path: The user's file of the whole vgg16 of torchvision; None fetches the public one.
        progress: Counts the download.

    Returns:
        What was used, by the file's names.

    Raises:
        WeightsError: no file, not readable, or its fully connected layers are not there or not VGG16's.

    Source:
        Chen et al., 2015, §3.1 (fc6 subsampled to 3 × 3, 1,024 channels).
    """
    file = fetch_weights("vgg16", path, progress=progress)
    tensors = read_tensors(file, [f"{name}.{kind}" for name in FC_NAMES.values() for kind in ("weight", "bias")])
    layers = {"fc6": segmenter.fc6[0]}
    if isinstance(segmenter.fc7, nn.Sequential):
        layers["fc7"] = segmenter.fc7[0]
    used = []
    for name, conv in layers.items():
        weight, bias = (tensors.get(f"{FC_NAMES[name]}.{kind}") for kind in ("weight", "bias"))
        sides = (4096, 512 * 7 * 7) if name == "fc6" else (4096, 4096)
        if weight is None or bias is None or weight.shape != sides:
            found = "there is none" if weight is None or bias is None else f"found {tuple(weight.shape)}"
            raise WeightsError(
                f"vgg16 from {file.name}: fc_init: decimated needs {FC_NAMES[name]} of {sides}, {found}; give the "
                "whole vgg16 file of torchvision, or write net.fc_init: random"
            )
        if problems := non_finite({f"{FC_NAMES[name]}.weight": weight, f"{FC_NAMES[name]}.bias": bias}):
            raise WeightsError(f"vgg16 from {file.name}: values are no numbers; get the file again", problems)
        _copy_decimated(conv, weight, bias, is_spatial=name == "fc6")
        used += [f"{FC_NAMES[name]}.weight", f"{FC_NAMES[name]}.bias"]
    return WeightsReport(f"{' and '.join(layers)} decimated from {file.name}", tuple(used), (), ())


def _copy_decimated(conv: nn.Module, weight: Tensor, bias: Tensor, *, is_spatial: bool) -> None:
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    step = len(weight) // conv.out_channels
    kernel = weight.view(len(weight), -1, 7, 7) if is_spatial else weight.view(*weight.shape, 1, 1)
    kernel = kernel[::step, :, ::FC_STEP, ::FC_STEP] if is_spatial else kernel[::step, ::step]
    conv.weight.data.copy_(kernel)
    conv.bias.data.copy_(bias[::step])
