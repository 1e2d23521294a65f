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
    softmax_warmup_epochs: int = Field(default=0, ge=0, le=10_000)
    """Epochs of plain classification before the second head learns: the maps of an untrained network point anywhere.
    0 for a training that goes on from a trained classifier (``weights.classifier``).
    Source: run_sample.py trains CAM for 5 epochs, then ReCAM for 4."""

    @property
    def warmup_epochs(self) -> int:
        """Epochs before the second head learns."""
        return self.softmax_warmup_epochs

    def build(self) -> Method:
        """The ReCAM method."""
        return Recam(self)


class Recam(Cam):
    """L_bce + λ · L_sce; the maps are those of both heads' weights multiplied, the logits the first head's.

    Differs: both heads learn at one rate, where the published second stage gives backbone and first head a tenth of the
    second's.  A class whose map of the first head is nowhere positive has no attention: two negative weights make a
    positive product.  Maps are divided by their peak exactly.
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

        del masks
        output = classifier(images)
        classification = classifier.classification_loss(output.logits, labels)
        if step.epoch < self.config.softmax_warmup_epochs:
            return {"loss": classification, "classification": classification, "softmax": images.new_zeros(())}
        seen, image, label = class_features(output.features, output.scores, labels)
        logits = classifier.get_submodule("second_head")(seen[:, :, None, None])[:, :, 0, 0]
        errors = functional.cross_entropy(logits.float(), label, reduction="none")
        softmax = mean_over_images(errors, image, len(images))
        loss = classification + self.config.softmax_weight * softmax
        return {"loss": loss, "classification": classification, "softmax": softmax}

    def attention(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """The positive part of the maps of the asked classes that the first head sees anywhere; (B, K, h, w)."""
        output = classifier(images)
        is_seen = (output.scores > 0).any(dim=(2, 3), keepdim=True)
        return _product_maps(classifier, output.features).relu() * (is_seen * labels[:, :, None, None])

    def score_maps(self, classifier: Classifier, images: Tensor) -> Tensor:
        """The maps of the multiplied weights with their sign; (B, K, h, w)."""
        return _product_maps(classifier, classifier.backbone(images))


def _product_maps(classifier: Classifier, features: Tensor) -> Tensor:
    """Maps of the heads' weights multiplied, as of one 1×1 convolution (net/resnet50_cam.py ``forward2``)."""
    from torch.nn import functional

    first, second = (classifier.get_parameter(name) for name in ("head.weight", "second_head.weight"))
    return functional.conv2d(features, first * second)


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
