"""The classifier: a backbone and a head whose scores per cell and class are averaged to the logits.

Pure network code; reads and writes nothing.  Attention methods insert their own layers around it.
Shapes: B images, K foreground classes, D feature channels, H W pixels, h w cells.
Head ``gap``, a 1×1 convolution.
Source: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, §2.
Differs: no bias, and the linear layer stands before the mean (the same logits, but the class maps come for free).
Head ``fc`` is VGG16's own (``stages.nets.heads``); having no maps, it scores one cell.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from stages.nets.backbones.config import ClassificationLoss, HeadName
from stages.nets.backbones.network import Backbone
from stages.nets.heads import FcHead
from stages.nets.layers import parameter_groups
from stages.ops.losses import multilabel_soft_margin, softmax_cross_entropy


class ClassifierOutput(NamedTuple):
    """What one forward pass of the classifier makes."""

    logits: Tensor
    """(B, K), before sigmoid or softmax."""
    scores: Tensor
    """(B, K, h, w) class scores per cell, their mean over the map is the logit; (B, K, 1, 1) from head ``fc``."""
    features: Tensor
    """(B, D, h, w) of the backbone."""


class Classifier(nn.Module):
    """An image classifier for one or several labels an image; with head ``gap`` its class scores are maps."""

    def __init__(
        self,
        backbone: Backbone,
        num_foreground: int,
        head: HeadName = "gap",
        loss: ClassificationLoss = "multilabel_soft_margin",
    ) -> None:
        """Put a fresh head for K = ``num_foreground`` classes on ``backbone``; ``fc`` fits VGG16."""
        super().__init__()
        self.is_exclusive = loss == "cross_entropy"
        """Whether the classes compete: an image is of the class of the highest logit, and of no other."""
        self.backbone = backbone
        self.head: nn.Conv2d | FcHead
        if head == "fc":
            self.head = FcHead(backbone.num_channels, backbone.output_stride, num_foreground)
        else:
            self.head = nn.Conv2d(backbone.num_channels, num_foreground, kernel_size=1, bias=False)
            nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Classify normalised images (B, 3, H, W)."""
        return self.classify_features(self.backbone(images))

    def classify_features(self, features: Tensor) -> ClassifierOutput:
        """The head alone, on features (B, D, h, w) that a method made or changed."""
        scores = self.head(features)
        return ClassifierOutput(scores.mean(dim=(2, 3)), scores, features)

    def classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What every method's training asks of class scores: the one place that knows which loss that is.

        Args:
            logits: (B, K); also those of a second head.
            labels: (B, K) float, 1 where the image has the class; shares that sum to 1 where images are mixed.

        Returns:
            Scalar, float32: softmax cross-entropy where the classes exclude each other, else multi-label soft margin.
        """
        return (softmax_cross_entropy if self.is_exclusive else multilabel_soft_margin)(logits, labels)

    def parameter_groups(self, head_lr_factor: float = 10.0) -> list[dict[str, Any]]:
        """All parameters for the optimiser, each once: the plain network at factor 1, everything else faster.

        VGG16's fc6 and fc7 belong to the plain network.
        """
        layers = self.head.plain_layers if isinstance(self.head, FcHead) else ()
        return parameter_groups(self, nn.ModuleList([self.backbone, *layers]), head_lr_factor)
