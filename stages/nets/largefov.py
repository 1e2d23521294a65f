"""DeepLab-LargeFOV on any of our backbones, and what all segmenters have in common.

Pure network code; reads and writes nothing.
Shapes: B images, C classes with background, D feature channels, H W pixels, h w cells.
Source: Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", 2015;
layer numbers as in the SEC release (Kolesnikov and Lampert, "Seed, Expand and Constrain", ECCV 2016).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stages.nets.backbone_builders import Backbone, build_plain_backbone
from stages.nets.segmenters import LargeFovConfig


class Segmenter(nn.Module):
    """A network that scores C classes per cell; ``trunk`` is the part that pretrained weights go into."""

    num_classes: int

    @property
    def trunk(self) -> nn.Module:
        """The backbone or encoder, with the plain network's tensor names."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, h, w) of normalised images (B, 3, H, W); the caller resizes them to (H, W)."""
        raise NotImplementedError

    def parameter_groups(self, head_lr_factor: float = 10.0) -> list[dict[str, Any]]:
        """All parameters for the optimiser, each once: the trunk at factor 1, the head faster.

        Args:
            head_lr_factor: The head's learning rate as a multiple of the trunk's.

        Returns:
            Dicts with ``params`` and ``lr_factor``.
        """
        return parameter_groups(self, self.trunk, head_lr_factor)


def parameter_groups(module: nn.Module, trunk: nn.Module, head_lr_factor: float) -> list[dict[str, Any]]:
    """Parameters of ``trunk`` at factor 1, the others of ``module`` at ``head_lr_factor``; none twice."""
    trunk_ids = {id(parameter) for parameter in trunk.parameters()}
    head = [parameter for parameter in module.parameters() if id(parameter) not in trunk_ids]
    return [
        {"params": list(trunk.parameters()), "lr_factor": 1.0},
        {"params": head, "lr_factor": head_lr_factor},
    ]


class LargeFov(Segmenter):
    """backbone → fc6 (3×3, dilated) → [fc7 (1×1)] → classifier (1×1); ReLU and dropout behind fc6 and fc7."""

    def __init__(self, config: LargeFovConfig, num_classes: int) -> None:
        """Build the net at a random start.

        Args:
            config: Backbone and head.
            num_classes: C.
        """
        super().__init__()
        self.num_classes = num_classes
        self.backbone = build_plain_backbone(config.backbone)
        if config.backbone.name == "vgg16":
            widen_vgg_pools(self.backbone)
            self.pool5 = vgg_pool5()
        else:
            self.pool5 = nn.Identity()
        self.fc6 = _stage(config, self.backbone.num_channels, kernel_size=3, dilation=config.dilation)
        self.fc7 = _stage(config, config.channels, kernel_size=1) if config.fc7 else nn.Identity()
        self.classifier = nn.Conv2d(config.channels, num_classes, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type] - a Conv2d made with a bias has one

    @property
    def trunk(self) -> Backbone:
        """The backbone."""
        return self.backbone

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, h, w) at the backbone's stride."""
        return self.classifier(self.fc7(self.fc6(self.pool5(self.backbone(images)))))


def _stage(config: LargeFovConfig, in_channels: int, *, kernel_size: int, dilation: int = 1) -> nn.Sequential:
    """Convolution, [BatchNorm], ReLU, dropout of whole channels' cells; the convolution starts at He's scale."""
    conv = nn.Conv2d(
        in_channels,
        config.channels,
        kernel_size,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=not config.batch_norm,
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    norm = [nn.BatchNorm2d(config.channels)] if config.batch_norm else []
    return nn.Sequential(conv, *norm, nn.ReLU(inplace=True), nn.Dropout(config.dropout))


def widen_vgg_pools(backbone: Backbone) -> None:
    """Make VGG's 2×2 pools 3×3 with padding 1, as DeepLab does: 321 px give 161, 81 and 41 cells."""
    for layer in backbone.modules():
        if isinstance(layer, nn.MaxPool2d):
            layer.kernel_size, layer.padding = 3, layer.dilation


def vgg_pool5() -> nn.Sequential:
    """DeepLab's pool5 and pool5a: a 3×3 maximum, then a 3×3 mean, both at stride 1 and the same size."""
    return nn.Sequential(
        nn.MaxPool2d(3, stride=1, padding=1), nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    )
