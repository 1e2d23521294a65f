"""The options of DeepLab-LargeFOV; torch-free, the net is in ``stages.nets.segmenters.largefov``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.nets.backbones.config import BACKBONES, BackboneConfig
from stages.nets.segmenters.base import Init, SegmenterBase

if TYPE_CHECKING:
    from stages.nets.segmenters.largefov import LargeFov

FC_CHANNELS = 4096
"""Channels of VGG16's own fc6 and fc7."""


class LargeFovConfig(SegmenterBase):
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
    does; else outlines are up to half a cell off, in crops otherwise than in whole images.  Not where cells lie
    elsewhere (squeezenet1_1, EfficientNets)."""

    @model_validator(mode="after")
    def _check_backbone(self) -> LargeFovConfig:
        if self.align_corners and not self.backbone.spec.has_corner_cells:
            known = ", ".join(name for name, spec in BACKBONES.items() if spec.has_corner_cells)
            raise ValueError(
                f"align_corners goes with {known}, whose cells lie at pixels 0, 8, 16 …; those "
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
        spec = BACKBONES.get(str(name))
        return values if spec is None else {**spec.largefov_head, **values}

    @property
    def backbone_name(self) -> str:
        """The backbone's name."""
        return self.backbone.name

    @property
    def may_be_pretrained(self) -> bool:
        """What the backbone says."""
        return self.backbone.pretrained

    def build(self, num_classes: int) -> LargeFov:
        """The net at a random start."""
        from stages.nets.segmenters.largefov import LargeFov
        from stages.nets.segmenters.segmenter import deeplab_backbone

        return LargeFov(
            *deeplab_backbone(self.backbone),
            num_classes,
            dilation=self.dilation,
            channels=self.channels,
            has_fc7=self.fc7,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            is_decimated=self.fc_init == "decimated",
            align_corners=self.align_corners,
        )

    def init_problems(self, init: Init) -> list[str]:
        """Only ImageNet's VGG16 has layers to decimate."""
        if self.fc_init == "decimated" and init != "imagenet":
            return [
                f"init: {init} has no fc6 and fc7 for net.fc_init: decimated; write init: imagenet or fc_init: random"
            ]
        return []
