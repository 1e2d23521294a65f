"""Class activation maps: the class scores of a fully convolutional classifier, before they are averaged over the image.

Shapes: B images, K foreground classes, h w feature-map cells.
Source: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, eq. 1-2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.methods.base import Method, MethodConfig

if TYPE_CHECKING:
    from torch import Tensor

    from stages.nets.classifier import Classifier
    from stages.ops.step import StepInfo


class CamConfig(MethodConfig):
    """CAM has no options."""

    name: Literal["cam"] = "cam"
    """The method's key in METHODS."""

    def build(self) -> Method:
        """The CAM method."""
        return Cam()


class Cam:
    """Plain classification training; attention is the positive part of each class's score map.

    Source:
        Zhou et al. 2016, eq. 2: M_c = Σ_k w_k^c f_k, here a 1×1 convolution without bias whose spatial mean is the
        logit.
        Differs: negative scores are cut off before scales are merged, as in irn (a2ece00) net/resnet50_cam.py.
    """

    attention_needs_gradient = False

    def prepare(self, classifier: Classifier) -> None:
        """CAM needs no layers beside the classifier's own."""

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classification loss of the logits."""
        del step, masks
        return {"loss": classifier.classification_loss(classifier(images).logits, labels)}

    def attention(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """ReLU of the class score maps, zero for classes that were not asked for; (B, K, h, w)."""
        return self.score_maps(classifier, images).relu() * labels[:, :, None, None]

    def score_maps(self, classifier: Classifier, images: Tensor) -> Tensor:
        """The class score maps with their sign; (B, K, h, w)."""
        return classifier(images).scores
