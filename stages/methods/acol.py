"""ACoL: two classifiers on one backbone; the second sees the features without what the first already looks at.

Shapes: B images, K foreground classes, D feature channels, h w cells.
Source: Zhang et al., "Adversarial Complementary Learning for Weakly Supervised Object Localization", CVPR 2018, §3.2;
clovaai/wsolevaluation (b5c1e8a) wsol/method/acol.py, vgg.py, resnet.py, inception.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stages.errors import ConfigError
from stages.methods.base import Method, MethodConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.nets.classifier import Classifier
    from stages.ops.step import StepInfo


class AcolConfig(MethodConfig):
    """ACoL's two classifiers."""

    has_own_head: ClassVar[bool] = True

    name: Literal["acol"] = "acol"
    """The method's key in METHODS."""
    erase_threshold: float = Field(default=0.7, gt=0, le=1)
    """δ: cells where the first classifier's normalised map reaches this are hidden from the second.
    Source: wsolevaluation config.py, acol_threshold 0.7; a random search on CUB took 0.57 to 0.89."""
    head_channels: int = Field(default=1024, ge=1, le=8192)
    """Channels of the two 3×3 convolutions of each classifier.  Source: wsolevaluation vgg.py, resnet.py, 1024."""

    def build(self) -> Method:
        """The ACoL method."""
        return Acol(self)


class Acol:
    """Both classifiers learn the labels; attention is the larger of their maps.  Logits are the first classifier's.

    Differs: an image has several labels, so cells are erased where the map of *any* asked class reaches the threshold.
    VGG16's 3×3 mean before the classifiers is left out, and their last convolution has no bias, as our plain head.
    """

    attention_needs_gradient = False

    def __init__(self, config: AcolConfig) -> None:
        self.config = config

    def prepare(self, classifier: Classifier) -> None:
        """Put the first classifier in place of the head, and the second beside it as ``second_head``."""
        num_foreground = num_head_classes(classifier, "acol")
        channels = (classifier.backbone.num_channels, self.config.head_channels)
        classifier.add_module("head", class_branch(*channels, num_foreground))
        classifier.add_module("second_head", class_branch(*channels, num_foreground))

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classification loss of the first classifier plus that of the second."""
        del step, masks
        scores, second_scores = self._score(classifier, images, labels)
        first = classifier.classification_loss(scores.mean(dim=(2, 3)), labels)
        second = classifier.classification_loss(second_scores.mean(dim=(2, 3)), labels)
        return {"loss": first + second, "first": first, "second": second}

    def attention(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """The fused maps of the asked classes, zero for the others; (B, K, h, w)."""
        from stages.ops.attention import fuse_maps

        return fuse_maps(*self._score(classifier, images, labels)) * labels[:, :, None, None]

    def _score(self, classifier: Classifier, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores of both classifiers, each (B, K, h, w)."""
        output = classifier(images)
        erased = erase_features(output.features, output.scores, labels, self.config.erase_threshold)
        return output.scores, classifier.get_submodule("second_head")(erased)


def erase_features(features: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Features that are zero where the map of an asked class, brought to [0, 1], reaches ``threshold``.

    Args:
        features: (B, D, h, w); the gradient passes where nothing is erased.
        scores: (B, K, h, w) of the first classifier; they receive no gradient.
        labels: (B, K), above 0 for the asked classes; an image without one keeps all its features.
        threshold: In (0, 1].

    Source:
        §3.2; wsol/method/acol.py ``_erase_attention``, with its min-max normalisation.
    """
    from stages.ops.attention import labelled_attention

    return features * (labelled_attention(scores.detach(), labels) < threshold)


def class_branch(in_channels: int, hidden_channels: int, num_foreground: int) -> nn.Sequential:
    """Two 3×3 convolutions with ReLU, then a 1×1 convolution to K score maps without bias.

    The 3×3 convolutions start at He's scale, the last one as the plain head's.
    """
    from torch import nn

    scores = nn.Conv2d(hidden_channels, num_foreground, kernel_size=1, bias=False)
    nn.init.normal_(scores.weight, std=0.01)
    return nn.Sequential(*conv_relu(in_channels, hidden_channels), *conv_relu(hidden_channels, hidden_channels), scores)


def conv_relu(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module]:
    """A 3×3 convolution at He's scale, and a ReLU."""
    from torch import nn

    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv, nn.ReLU()


def num_head_classes(classifier: Classifier, method: str) -> int:
    """K of a classifier whose head is still the plain one.

    Raises:
        ConfigError: the head is another.
    """
    from torch import nn

    if not isinstance(classifier.head, nn.Conv2d):
        raise ConfigError(f"{method} puts its own head in place of head: gap, found {type(classifier.head).__name__}")
    return classifier.head.out_channels
