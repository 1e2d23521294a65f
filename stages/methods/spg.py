"""SPG: the attention's sure pixels train side branches of the backbone, layer by layer, to tell object from background.

Shapes: B images, K foreground classes, D feature channels, H W pixels.
Source: Zhang et al., "Self-produced Guidance for Weakly-supervised Object Localization", ECCV 2018, §3;
clovaai/wsolevaluation (b5c1e8a) wsol/method/spg.py, vgg.py, resnet.py, inception.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from stages.errors import ConfigError
from stages.methods.acol import class_branch, conv_relu, num_head_classes
from stages.methods.base import Method, MethodConfig
from stages.methods.cam import Cam

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.nets.backbones.network import Backbone
    from stages.nets.classifier import Classifier, ClassifierOutput
    from stages.ops.step import StepInfo

LAYERS: Mapping[str, tuple[str, str]] = {
    "vgg16": ("features.23", "features.29"),  # wsolevaluation: pool4, conv5-3
    "resnet50": ("layer3.0", "layer3"),  # wsolevaluation
    "inception_v3": ("Mixed_5d", "Mixed_6e"),  # wsolevaluation, whose network ends at Mixed_6e
    "resnet101": ("layer3.0", "layer3"),  # ours, as resnet50
    "seresnet50": ("layer3.0", "layer3"),  # ours, as resnet50
    "mobilenetv1_100": ("blocks.3.0", "blocks.3"),  # ours, as resnet50: first and last block of stride 16
    "mobilenet_v2": ("features.7", "features.13"),  # ours, as resnet50
    "tf_efficientnet_lite0": ("blocks.3.0", "blocks.4"),  # ours, as resnet50: first and last block of stride 16
    "tf_efficientnet_lite2": ("blocks.3.0", "blocks.4"),
    "squeezenet1_1": ("features.8", "features.12"),  # ours, as vgg16: the last pool and the last layer
    "small": ("features.11", "features.17"),  # ours, as vgg16
}
"""Where B1 and B2 branch off, by backbone, and whose choice it is."""

HEAD_FEATURES = "head.3"
"""What C and the last convolution of ``class_branch`` see: its second ReLU."""

DRY_RUN_PX = 64
"""Side of the image that is sent through the backbone once to see how many channels a layer has."""

Share = Annotated[float, Field(ge=0, le=1)]


class SpgConfig(MethodConfig):
    """SPG's branches and the thresholds of their guidance, each (sure object above, sure background below)."""

    has_own_head: ClassVar[bool] = True

    name: Literal["spg"] = "spg"
    """The method's key in METHODS."""
    layers: tuple[str, str] | None = None
    """Layers of the backbone that B1 and B2 stand on, the earlier one first; null: those of LAYERS."""
    thresholds_b2: tuple[Share, Share] = (0.7, 0.01)
    """Of the attention, which guides B2.  Source: wsolevaluation config.py, spg_threshold_1h and 1l."""
    thresholds_b1: tuple[Share, Share] = (0.5, 0.05)
    """Of B2, which guides B1.  Source: wsolevaluation config.py, spg_threshold_2h and 2l."""
    thresholds_c: tuple[Share, Share] = (0.7, 0.1)
    """Of the mean of B1 and B2, which guides C.  Source: wsolevaluation config.py, spg_threshold_3h and 3l."""
    min_object_px: int = Field(default=30, ge=0, le=1_000_000)
    """Fewer sure object pixels of an image than this, and ``fallback_ratio`` finds them.
    Source: wsolevaluation spg.py ``mask_fg``, 30 for images of 224."""
    fallback_ratio: float = Field(default=0.7, ge=0, le=1)
    """Share of the map's peak that then is sure object.  Source: wsolevaluation spg.py ``mask_fg``, 0.7."""
    head_channels: int = Field(default=1024, ge=1, le=8192)
    """Channels of A's two 3×3 convolutions.  Source: wsolevaluation inception.py, 1024; its VGG16 has 512."""
    guide_channels: int = Field(default=512, ge=1, le=8192)
    """Channels of B1, B2 and C.  Source: wsolevaluation vgg.py and inception.py, 512; its ResNet has 1024 in B."""

    @model_validator(mode="after")
    def _check(self) -> SpgConfig:
        problems = [
            f"{name}: expected (high, low) with low ≤ high, found {pair}"
            for name in ("thresholds_b2", "thresholds_b1", "thresholds_c")
            if (pair := getattr(self, name))[0] < pair[1]
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def names_layers(self) -> bool:
        """Whether layers have to be looked up before the training."""
        return self.layers is not None

    def build(self) -> Method:
        """The SPG method."""
        return Spg(self)


class _Branches(NamedTuple):
    """What A, B1, B2 and C make of a batch."""

    a: ClassifierOutput
    b1: Tensor
    """(B, H, W) logits of object against background, at the images' size; so are b2 and c."""
    b2: Tensor
    c: Tensor


class Spg(Cam):
    """Classification plus three guidance losses; attention is A's class score map, as CAM's.

    Differs: an image has several labels, so B2's guidance is the pixel-wise largest of their normalised maps.  Guidance
    has the size of the training crop, wsolevaluation's is 224 × 224.  Every backbone has A's two 3×3 convolutions,
    which wsolevaluation's ResNet lacks.  A batch without a sure pixel costs nothing, there NaN.
    """

    def __init__(self, config: SpgConfig) -> None:
        self.config = config

    def prepare(self, classifier: Classifier) -> None:
        """Put A in place of the head, and B1, B2, what they share and C beside it as ``guides``.

        Raises:
            ConfigError: the backbone has no such layer, or no preset where one is needed.
        """
        from torch import nn

        num_foreground = num_head_classes(classifier, "spg")
        first, second = num_layer_channels(classifier.backbone, self._layers(classifier))
        head, width = self.config.head_channels, self.config.guide_channels
        classifier.add_module("head", class_branch(classifier.backbone.num_channels, head, num_foreground))
        guides = {
            "b1": nn.Sequential(*conv_relu(first, width)),
            "b2": nn.Sequential(*conv_relu(second, width)),
            "shared": _object_branch(width, width),
            "c": _object_branch(head, width),
        }
        classifier.add_module("guides", nn.ModuleDict(guides))

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classification loss, and the cross-entropies of B2, B1 and C against their guidance, all with weight 1."""
        del step, masks
        output, b1, b2, c = self._forward(classifier, images)
        classification = classifier.classification_loss(output.logits, labels)
        attention = _attention(output.scores, labels, images, classifier.backbone)
        guided = self._guidance_losses(attention, b1, b2, c)
        return {"loss": sum(guided.values(), start=classification), "classification": classification, **guided}

    def _layers(self, classifier: Classifier) -> tuple[str, str]:
        """Where B1 and B2 stand: as configured, else as in LAYERS."""
        backbone = classifier.backbone.name
        layers = self.config.layers or LAYERS.get(backbone)
        if layers is None:
            known = ", ".join(sorted(LAYERS))
            raise ConfigError(f"spg has no layers for backbone '{backbone}' (it has: {known}); write method.layers")
        return layers

    def _forward(self, classifier: Classifier, images: Tensor) -> _Branches:
        """One pass through backbone and all branches."""
        from stages.nets.layers import capture_output

        first, second = self._layers(classifier)
        with (
            capture_output(classifier.backbone, first) as at_b1,
            capture_output(classifier.backbone, second) as at_b2,
            capture_output(classifier, HEAD_FEATURES) as at_c,
        ):
            output = classifier(images)
        b1, b2, shared, c = (classifier.get_submodule(f"guides.{name}") for name in ("b1", "b2", "shared", "c"))
        backbone = classifier.backbone
        return _Branches(
            output,
            _enlarge(shared(b1(at_b1.output)), images, backbone)[:, 0],
            _enlarge(shared(b2(at_b2.output)), images, backbone)[:, 0],
            _enlarge(c(at_c.output), images, backbone)[:, 0],
        )

    def _guidance_losses(self, attention: Tensor, b1: Tensor, b2: Tensor, c: Tensor) -> dict[str, Tensor]:
        """§3: attention guides B2, B2 guides B1, both together guide C; nothing flows back into a guide."""
        from stages.ops.losses import object_cross_entropy

        guide_b1, guide_b2 = b1.detach().sigmoid(), b2.detach().sigmoid()
        config = self.config
        return {
            "b2": object_cross_entropy(b2, self._guidance(attention, config.thresholds_b2)),
            "b1": object_cross_entropy(b1, self._guidance(guide_b2, config.thresholds_b1)),
            "c": object_cross_entropy(c, self._guidance((guide_b1 + guide_b2) / 2, config.thresholds_c)),
        }

    def _guidance(self, attention: Tensor, thresholds: tuple[float, float]) -> Tensor:
        """What is sure in ``attention`` (B, H, W), as 0, 1 and 255."""
        from stages.ops.attention import sure_pixels

        return sure_pixels(
            attention,
            high=thresholds[0],
            low=thresholds[1],
            min_object_px=self.config.min_object_px,
            fallback_ratio=self.config.fallback_ratio,
        )


def _object_branch(in_channels: int, width: int) -> nn.Sequential:
    """A 3×3 convolution with ReLU, then a 1×1 convolution to one map of logits: object or background."""
    from torch import nn

    logits = nn.Conv2d(width, 1, kernel_size=1)
    nn.init.normal_(logits.weight, std=0.01)
    if logits.bias is not None:
        nn.init.zeros_(logits.bias)
    return nn.Sequential(*conv_relu(in_channels, width), logits)


def num_layer_channels(backbone: Backbone, names: tuple[str, ...]) -> list[int]:
    """How many channels each named layer puts out, seen by sending a grey image through; draws no random number.

    Raises:
        ConfigError: there is no such layer, or its output is no map.
    """
    import torch

    from stages.nets.layers import capture_output

    training, image = backbone.training, torch.zeros(1, 3, DRY_RUN_PX, DRY_RUN_PX)
    backbone.eval()
    try:
        with contextlib.ExitStack() as stack, torch.no_grad():
            captured = [stack.enter_context(capture_output(backbone, name)) for name in names]
            backbone(image.to(next(backbone.parameters()).device))
    finally:
        backbone.train(training)
    shapes = {name: tuple(found.output.shape) for name, found in zip(names, captured, strict=True)}
    problems = [
        f"layer '{name}' puts out {shape}, not a map (B, D, h, w)" for name, shape in shapes.items() if len(shape) != 4
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    return [shapes[name][1] for name in names]


def _attention(scores: Tensor, labels: Tensor, images: Tensor, backbone: Backbone) -> Tensor:
    """Guidance for B2: the normalised map of the image's classes at the images' size, (B, H, W), without a gradient."""
    from stages.ops.attention import labelled_attention

    return labelled_attention(_enlarge(scores.detach(), images, backbone), labels)[:, 0]


def _enlarge(maps: Tensor, images: Tensor, backbone: Backbone) -> Tensor:
    """Maps (B, D, h, w) of the backbone's cells at the images' size, bilinearly, in float32."""
    from stages.ops.cells import cells_to_pixels

    size = (images.shape[2], images.shape[3])
    return cells_to_pixels(maps, size, backbone.cells(maps.shape[2:], size))
