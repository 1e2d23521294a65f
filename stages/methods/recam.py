"""ReCAM: a second head learns to tell an image's classes apart on the features that each class's map points at.

Shapes: B images, K foreground classes, D feature channels, P (image, class) pairs, h w cells.
Source: Chen et al., "Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation", CVPR 2022 (arXiv
2203.00962); zhaozhengChen/ReCAM (032166f) step/train_recam.py, step/make_recam.py, net/resnet50_cam.py.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig
from stages.methods.cam import Cam

if TYPE_CHECKING:
    from torch import Tensor

    from stages.nets.classifier import Classifier
    from stages.ops.step import StepInfo


class RecamConfig(MethodConfig):
    """CAM with a second head, for classes that come together."""

    name: Literal["recam"] = "recam"
    """The method's key in METHODS."""
    softmax_weight: float = Field(default=1.0, ge=0, le=100)
    """λ, the weight of the second head's loss.  Source: run_sample.py, recam_loss_weight 1."""
    maps_from: Literal["both", "second"] = "both"
    """Whose weights make the maps.  both: the heads' weights multiplied, channel by channel; second: the second head's
    alone.  Source: both, make_recam.py with net/resnet50_cam.py ``forward2``."""

    def build(self) -> Method:
        """The ReCAM method."""
        return Recam(self)


class Recam(Cam):
    """L_bce + λ · L_sce; attention comes from the weights of both heads, the logits from the first.

    Differs: both heads learn at one rate, where the published second stage gives backbone and first head a tenth of the
    second's; a channel that speaks against a class in both heads counts against it, where the published product of two
    negative weights counts for it; maps are divided by their peak exactly.
    """

    def __init__(self, config: RecamConfig) -> None:
        self.config = config

    def prepare(self, classifier: Classifier) -> None:
        """Put a second 1×1 convolution beside the head, as ``second_head``, with a fresh start."""
        from torch import nn

        second = copy.deepcopy(classifier.head)
        for weight in second.parameters():
            nn.init.normal_(weight, std=0.01)
        classifier.add_module("second_head", second)

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classification loss of the first head, and the softmax loss of the second."""
        from torch.nn import functional

        from stages.ops.mining import mean_over_images

        del step, masks
        output = classifier(images)
        seen, image, label = class_features(output.features, output.scores, labels)
        logits = classifier.get_submodule("second_head")(seen[:, :, None, None])[:, :, 0, 0]
        errors = functional.cross_entropy(logits.float(), label, reduction="none")
        losses = {
            "classification": classifier.classification_loss(output.logits, labels),
            "softmax": mean_over_images(errors, image, len(images)),
        }
        return {"loss": losses["classification"] + self.config.softmax_weight * losses["softmax"], **losses}

    def score_maps(self, classifier: Classifier, images: Tensor) -> Tensor:
        """The maps of the heads' weights with their sign; (B, K, h, w)."""
        from torch.nn import functional

        weight = second = classifier.get_parameter("second_head.weight")
        if self.config.maps_from == "both":
            weight = multiply_weights(classifier.get_parameter("head.weight"), second)
        return functional.conv2d(classifier.backbone(images), weight)


def class_features(features: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each class of each image sees: the mean over the cells of the features, weighed by the class's map.

    Args:
        features: (B, D, h, w).
        scores: (B, K, h, w); their positive part, divided by its peak, is the weight, and learns from the features.
        labels: (B, K), above 0 for the image's classes.

    Returns:
        float32 (P, D); the image and the class of each pair, (P,) each.

    Source:
        net/resnet50_cam.py ``Net_CAM_Feature``.
    """
    import torch

    from stages.ops.attention import normalise_attention

    image, label = (labels > 0).nonzero(as_tuple=True)
    with torch.autocast(features.device.type, enabled=False):
        maps = normalise_attention(scores.float())[image, label].flatten(1)
        seen = (features.float()[image].flatten(2) @ maps[:, :, None])[:, :, 0]
    return seen / maps.shape[1], image, label


def multiply_weights(first: Tensor, second: Tensor) -> Tensor:
    """The product, negative where either weight is: two heads that speak against a class do not speak for it."""
    import torch

    return torch.minimum(first, second).sign() * (first * second).abs()
