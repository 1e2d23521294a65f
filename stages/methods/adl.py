"""ADL: dropout layers that hide a feature map's strongest region or weight it by its own attention, at no parameters.

Shapes: B images, K foreground classes, D feature channels, h w cells of the layer's map.
Source: Choe and Shim, "Attention-based Dropout Layer for Weakly Supervised Object Localization", CVPR 2019, §3; the
authors' code (junsukchoe/ADL 1779e55: ops.py, backbone/) and its issues #1, #8 and #12; clovaai/wsolevaluation
(b5c1e8a) wsol/method/adl.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, model_validator

from stages.errors import ConfigError
from stages.methods.base import Method, MethodConfig
from stages.methods.cam import Cam

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.nets.classifier import Classifier


class AdlPreset(NamedTuple):
    """Where the layers stand in one backbone, and how much counts as its strongest region."""

    layers: tuple[str, ...]
    """Layers of the backbone that an ADL stands behind."""
    gamma: float
    """Share of the attention's peak above which a cell is dropped."""
    published: bool
    """Whether positions and γ are both the ADL authors'; else ``source`` says what is whose."""
    source: str
    """Where the numbers come from."""


PRESETS: Mapping[str, AdlPreset] = {
    "vgg16": AdlPreset(
        ("features.16", "features.23", "features.29"), 0.80, True, "pool3, pool4, conv5-3: §4, ADL#1; γ: ADL#12"
    ),
    "seresnet50": AdlPreset(
        ("layer3.0", "layer4.0", "layer4.2"), 0.90, True, "positions 31, 41, 5 of ResNet50-SE: ADL#1; γ: ADL#12"
    ),
    "resnet50": AdlPreset(
        ("layer3.0", "layer4.0", "layer4.2"), 0.90, False, "positions and γ: wsolevaluation resnet.py, config.py"
    ),
    "resnet101": AdlPreset(("layer3.0", "layer4.0", "layer4.2"), 0.90, False, "ours, as resnet50"),
    "inception_v3": AdlPreset(
        ("Mixed_5d", "Mixed_6e", "Mixed_7c"),
        0.80,
        False,
        "γ: ADL#12; positions: wsolevaluation inception.py (its third is the last layer of its own head)",
    ),
    "mobilenetv1_100": AdlPreset(
        ("blocks.3.0", "blocks.4.0", "blocks.4.1"), 0.95, False, "γ: ADL#12; positions ours, as ResNet50-SE's"
    ),
    # A block of MobileNetV2 and of EfficientNet-Lite ends without ReLU: the rectified expansions of two blocks without
    # a shortcut are taken.
    "mobilenet_v2": AdlPreset(
        ("features.7.conv.0", "features.14.conv.0", "features.18"), 0.95, False, "ours; γ as MobileNetV1's"
    ),
    "tf_efficientnet_lite0": AdlPreset(
        ("blocks.3.0.bn1.act", "blocks.5.0.bn1.act", "bn2.act"), 0.95, False, "ours, as MobileNetV2"
    ),
    "tf_efficientnet_lite2": AdlPreset(
        ("blocks.3.0.bn1.act", "blocks.5.0.bn1.act", "bn2.act"), 0.95, False, "ours, as MobileNetV2"
    ),
    "squeezenet1_1": AdlPreset(
        ("features.5", "features.8", "features.12"),
        0.80,
        False,
        "ours, as VGG16: the last two pools and the last layer",
    ),
    "small": AdlPreset(
        ("features.8", "features.11", "features.17"), 0.80, False, "ours, as VGG16: conv3, conv4 and the last layer"
    ),
}
"""Positions and γ by backbone."""


class AdlConfig(MethodConfig):
    """ADL behind some layers of the backbone."""

    name: Literal["adl"] = "adl"
    """The method's key in METHODS."""
    layers: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Layers of the backbone to put an ADL behind (``features.16``, ``layer4.2``), best with outputs ≥ 0; null: the
    positions of PRESETS.  Source: the paper's ablation on CUB: VGG16 is best with pool3, pool4 and conv5-3."""
    gamma: float | None = Field(default=None, gt=0, le=1)
    """γ: cells whose attention reaches this share of the map's peak are hidden by the drop mask; null: that of PRESETS.
    Source: VGG16 0.80, ResNet50-SE 0.90, MobileNetV1 0.95, Inception-v3 0.80 (the author, ADL#12)."""
    drop_rate: float = Field(default=0.75, ge=0, le=1)
    """Probability that a layer applies the drop mask, else the importance map.
    Source: 75 % on every backbone (the author, ADL#8); the TensorFlow code's keep_prob 0.25 is its complement."""

    @model_validator(mode="after")
    def _check_layers(self) -> AdlConfig:
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers names one layer twice: {', '.join(self.layers)}; name each once")
        return self

    @property
    def names_layers(self) -> bool:
        """Whether layers have to be looked up before the training."""
        return self.layers is not None

    def build(self) -> Method:
        """The ADL method."""
        return Adl(self)


class Adl(Cam):
    """CAM on a classifier that was trained with ADL in its backbone; in evaluation mode the layers pass all through.

    Differs: the head is our 1×1 convolution (VGG16 without the paper's extra conv6).
    """

    def __init__(self, config: AdlConfig) -> None:
        self.config = config

    def prepare(self, classifier: Classifier) -> None:
        """Put an ADL behind each layer; no tensor is added or renamed.

        Raises:
            ConfigError: the backbone has no such layer, or no preset where one is needed.
        """
        from stages.nets.layers import find_layer, insert_after

        layers, gamma = self._positions(classifier.backbone.name)
        for layer in layers:
            _refuse_batch_norm(layer, find_layer(classifier.backbone, layer))
        for layer in layers:
            insert_after(classifier.backbone, layer, partial(_drop_in_training, gamma, self.config.drop_rate))

    def _positions(self, backbone: str) -> tuple[tuple[str, ...], float]:
        """The layers and γ: as configured, else of the backbone's preset."""
        config, preset = self.config, PRESETS.get(backbone)
        layers = config.layers or (preset and preset.layers)
        gamma = config.gamma or (preset and preset.gamma)
        if layers is None or gamma is None:
            known = ", ".join(sorted(PRESETS))
            raise ConfigError(
                f"adl has no preset for backbone '{backbone}' (it has: {known}); write method.layers and method.gamma"
            )
        return layers, gamma


def _refuse_batch_norm(name: str, layer: nn.Module) -> None:
    """BatchNorm's output has both signs, and frozen it never is in training mode."""
    from torch.nn.modules.batchnorm import _BatchNorm

    if isinstance(layer, _BatchNorm):
        raise ConfigError(f"adl cannot stand behind the BatchNorm '{name}'; name the activation or block behind it")


def _drop_in_training(gamma: float, drop_rate: float, layer: nn.Module, output: Tensor) -> Tensor:
    """What an ADL does to the output (B, D, h, w) of ``layer``."""
    return attention_dropout(output, gamma=gamma, drop_rate=drop_rate) if layer.training else output


def attention_dropout(features: Tensor, *, gamma: float, drop_rate: float) -> Tensor:
    """Multiply features by their drop mask or by their importance map; one draw decides for the whole batch.

    Nothing is scaled to make up for what is dropped.  Draws one number of torch's generator.

    Args:
        features: (B, D, h, w).
        gamma: See ``drop_mask``.
        drop_rate: Probability of the drop mask.

    Returns:
        (B, D, h, w), same dtype.

    Source:
        §3; ops.py ``attention_based_dropout``: the draw is one for each forward pass and layer.
    """
    import torch

    attention = features.float().mean(dim=1, keepdim=True)
    drop = torch.rand((), device=features.device) < drop_rate
    chosen = torch.where(drop, drop_mask(attention, gamma), torch.sigmoid(attention))
    return features * chosen.to(features.dtype)


def drop_mask(attention: Tensor, gamma: float) -> Tensor:
    """1 where the attention is below γ times its image's peak, 0 in the strongest region; (B, 1, h, w) as given.

    Source:
        §3, the drop mask; ops.py ``_get_drop_mask`` (per image; a cell equal to the threshold is dropped).
    """
    peaks = attention.amax(dim=(2, 3), keepdim=True)
    return (attention < gamma * peaks).to(attention.dtype)
