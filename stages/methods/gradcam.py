"""Grad-CAM: attention from the gradient of a class score by the features of any layer, without a hook left behind.

Shapes: B images, K foreground classes, P (image, class) pairs, D channels, h w cells.
Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from stages.methods.base import Method, MethodConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.nets.classifier import Classifier, ClassifierOutput
    from stages.ops.cells import CellGrid
    from stages.ops.step import StepInfo

ChannelWeights = Literal["auto", "gradient", "closed_form"]


class GradCamOptions(MethodConfig):
    """Which features a Grad-CAM weights, and how; GAIN has these options too."""

    needs_score_maps: ClassVar[bool] = False

    layer: str | None = Field(default=None, min_length=1)
    """Layer of the backbone whose features are weighted (``features.29``, ``layer3``); null: the last one.
    Source: GAIN §3.1 and §4 take the last convolutional layer."""
    channel_weights: ChannelWeights = "auto"
    """gradient: by automatic differentiation; closed_form: the weights of a linear head behind a spatial mean, for the
    last layer only; auto: closed_form where it holds."""

    @model_validator(mode="after")
    def _check_closed_form(self) -> GradCamOptions:
        check_closed_form(self.channel_weights, self.layer)
        return self

    @property
    def names_layers(self) -> bool:
        """Whether a layer has to be looked up before the training."""
        return self.layer is not None


class GradCamConfig(GradCamOptions):
    """Grad-CAM on a plainly trained classifier."""

    name: Literal["gradcam"] = "gradcam"
    """The method's key in METHODS."""

    def build(self) -> Method:
        """The Grad-CAM method."""
        return GradCam(self)


def check_closed_form(channel_weights: ChannelWeights, layer: str | None) -> None:
    """Refuse the closed form for a layer that is not the last.

    Raises:
        ValueError: the two contradict each other.
    """
    if channel_weights == "closed_form" and layer is not None:
        raise ValueError(
            f"channel_weights closed_form holds for the last layer only, found layer '{layer}'; "
            "remove layer or write channel_weights: gradient"
        )


class Evidence(NamedTuple):
    """One forward pass with the Grad-CAM maps of the asked classes."""

    logits: Tensor
    """(B, K)."""
    maps: Tensor
    """(P, h, w) ≥ 0, on the scale of the logits."""
    image: Tensor
    """(P,) image of each map."""
    label: Tensor
    """(P,) class of each map."""
    cells: CellGrid
    """Where the cells of the maps look in the images."""


class GradCam:
    """Plain classification training; attention is Grad-CAM of the present classes.

    Differs: the gradient is summed over the cells instead of averaged (``stages.ops.gradient_maps``).
    """

    def __init__(self, config: GradCamOptions) -> None:
        self.config = config
        self.attention_needs_gradient = True

    def prepare(self, classifier: Classifier) -> None:
        """Look the layer up; nothing is inserted."""
        config = self.config
        self.attention_needs_gradient = not check_layer(classifier, config.layer, config.channel_weights)

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classification loss of the logits."""
        del step, masks
        return {"loss": classifier.classification_loss(classifier(images).logits, labels)}

    def attention(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Grad-CAM of the asked classes, zero for the others; (B, K, h, w)."""
        return grad_cam(
            classifier, images, labels, layer=self.config.layer, channel_weights=self.config.channel_weights
        )


def check_layer(classifier: Classifier, layer: str | None, channel_weights: ChannelWeights) -> bool:
    """Refuse a layer that the backbone lacks, and the closed form for a head that has none.

    Returns:
        Whether the channel weights have a closed form, so that attention takes no backward pass.

    Raises:
        ConfigError: naming the nearest layers, or what to do.
    """
    from stages.errors import ConfigError
    from stages.nets.layers import find_layer

    if layer is not None:
        find_layer(classifier.backbone, layer)
    is_linear = linear_head(classifier) is not None
    if channel_weights == "closed_form" and not is_linear:
        raise ConfigError(
            "channel_weights closed_form needs a linear head behind a spatial mean (head: gap); "
            "use channel_weights: auto"
        )
    return is_linear and layer is None and channel_weights != "gradient"


def grad_cam(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    layer: str | None = None,
    channel_weights: ChannelWeights = "auto",
) -> Tensor:
    """Grad-CAM maps (B, K, h, w) of the asked classes, zero for the others; holds no graph afterwards.

    Args:
        classifier: In evaluation mode; its parameters receive no gradient.
        images: (B, 3, H, W) normalised network input.
        labels: (B, K), above 0 for the classes that are asked for.
        layer: Layer of the backbone; None for its output.
        channel_weights: See ``GradCamConfig``.
    """
    from stages.ops.gradient_maps import scatter_maps

    found = find_evidence(classifier, images, labels, layer=layer, channel_weights=channel_weights, cut=True)
    return scatter_maps(found.maps, found.image, found.label, (labels.shape[0], labels.shape[1])).detach()


def find_evidence(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    layer: str | None = None,
    channel_weights: ChannelWeights = "auto",
    second_order: bool = False,
    cut: bool = False,
) -> Evidence:
    """One forward pass with differentiable Grad-CAM maps of all (image, class) pairs in ``labels``.

    Args:
        classifier: In either mode.
        images: (B, 3, H, W) normalised network input.
        labels: (B, K), above 0 for the pairs that are asked for.
        layer: Layer of the backbone; None for its output.
        channel_weights: See ``GradCamConfig``.
        second_order: Whether a loss of the maps also differentiates the channel weights.
        cut: Keep no graph before the layer: for maps that are looked at, not trained.
    """
    from stages.ops.gradient_maps import gradient_weights, label_pairs, linear_weights, weighted_maps

    output, features = _forward(classifier, images, layer, cut=cut)
    image, label = label_pairs(labels)
    head = linear_head(classifier) if layer is None and channel_weights != "gradient" else None
    if head is not None:
        weights = linear_weights(head.weight, label, second_order=second_order)
    else:
        # float16 has no gradient below 6e-8, and that of a mean is divided by the number of cells
        scale = min(features[0, 0].numel(), 1 << 15) if cut and features.element_size() == 2 else 1
        weights = gradient_weights(
            output.logits, features, image, label, second_order=second_order, loss_scale=float(scale)
        )
    cells = classifier.backbone.cells(features.shape[2:], images.shape[2:])
    return Evidence(output.logits, weighted_maps(features, weights, image), image, label, cells)


def _forward(
    classifier: Classifier, images: Tensor, layer: str | None, *, cut: bool
) -> tuple[ClassifierOutput, Tensor]:
    """The classifier's output, and the features of ``layer`` that it was computed from."""
    import torch

    from stages.nets.layers import capture_output

    if layer is not None:
        with capture_output(classifier.backbone, layer, cut=cut) as captured:
            output = classifier(images)
        return output, captured.output
    if not cut:
        output = classifier(images)
        return output, output.features
    with torch.no_grad():
        features = classifier.backbone(images)
    if torch.is_grad_enabled():
        features.requires_grad_()
    return classifier.classify_features(features), features


def linear_head(classifier: Classifier) -> nn.Conv2d | None:
    """The head, where it is a 1×1 convolution, whose Grad-CAM has a closed form; else None."""
    from torch import nn

    head = classifier.head
    return head if isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1) else None
