"""GAIN and GAIN_ext: a classifier whose attention is mined until what it leaves of the image no longer tells the class.

Two streams share the network.  The first classifies.  The second looks at each image with the attention of one of its
classes erased: the class score there is driven down, so the attention must cover the whole object.  GAIN_ext has a
third: on a few images with true masks the attention is compared with the mask.

Shapes: B images, K foreground classes, P (image, class) pairs, H W pixels, h w cells.
Source: Li, Wu, Peng, Ernst and Fu, "Tell Me Where to Look: Guided Attention Inference Network", CVPR 2018
(arXiv 1802.10171).  What the paper leaves open is a field below, with where its default comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.data.subsets import Candidate, choose_masked, read_ids
from stages.methods.base import Method
from stages.methods.gradcam import Evidence, GradCam, GradCamOptions, find_evidence

if TYPE_CHECKING:
    from torch import Tensor

    from stages.nets.classifier import Classifier
    from stages.ops.step import StepInfo

_PIXEL_LIST = "method.pixel_list"

GAIN_PAPER: dict[str, Any] = {
    "mining_gradient": "shared",
    "alpha": 1.0,
    "mask_sigma": 0.5,
    "mask_omega": 10.0,
    "attention_norm": "minmax",
    "norm_gradient": "detached",
    "am_score": "logit",
    "am_mode": "per_class",
    "am_warmup_epochs": 0,
    "am_min_probability": 0.0,
    "second_order": False,
}
"""The preset ``gain_paper``: what the paper says (eq. 1-6, α = 1), and where it says nothing the public VOC
re-implementation's choice (ilyak93 d67855b: min-max with detached denominators, σ 0.5, ω 10)."""


class GainOptions(GradCamOptions):
    """What GAIN and GAIN_ext have in common; the defaults are the recipe that measured best (docs/gain.md)."""

    preset: Literal["gain", "gain_paper"] = "gain"
    """gain: our measured defaults; gain_paper: the paper to the letter.  A field that is written beats its preset."""
    mining_gradient: Literal["shared", "mask_only"] = "mask_only"
    """Where the mining loss may reach: shared, the weights of both passes and the mask (the paper); mask_only, through
    the mask alone, so that the net cannot satisfy it by leaning harder on the most telling spot.
    Source: ours; ilyak93's README found that with shared gradients the maps hardly change."""
    alpha: float = Field(default=0.3, ge=0, le=100)
    """Weight of the mining loss.  Source: eq. 6, α = 1."""
    mask_sigma: float = Field(default=0.5, gt=0, lt=1)
    """σ of T(A) = sigmoid(ω (A - σ)): the attention above which a pixel is erased.
    Source: no number in the paper; re-implementations use 0.25 to 0.6."""
    mask_omega: float = Field(default=10.0, gt=0, le=1000)
    """ω of T(A): how sharp the border is.  Source: no number in the paper; re-implementations use 8 to 100."""
    attention_norm: Literal["max", "minmax"] = "max"
    """How a map is brought to [0, 1] before T.  Source: not in the paper."""
    norm_gradient: Literal["detached", "full"] = "detached"
    """Whether the mining loss differentiates through the normalisation.  Source: detached, alokwhitewolf cd1cb0a."""
    am_score: Literal["logit", "sigmoid"] = "sigmoid"
    """What of the erased image's class is driven down.  Source: the paper's s^c is read as the raw score, which has no
    lower bound; alokwhitewolf takes the sigmoid."""
    am_mode: Literal["per_class", "joint", "random_class"] = "per_class"
    """per_class: one erased image for each class of the image (eq. 3-5); joint: one, with the attention of all its
    classes erased (ilyak93); random_class: one, with a class drawn at random (alokwhitewolf)."""
    am_warmup_epochs: int = Field(default=0, ge=0, le=10_000)
    """Epochs of plain classification before mining begins: attention of an untrained net is noise (ilyak93: 5)."""
    am_min_probability: float = Field(default=0.5, ge=0, lt=1)
    """Mine a class of an image only where the classifier gives it at least this probability: a class that it does not
    know yet, or would forget, is learnt and not mined.  Source: ours; 0 is the paper."""
    second_order: bool = False
    """Whether the losses of the attention differentiate Grad-CAM's channel weights too.  Source: the paper's backward
    pass for w^c "must not update parameters", so they are constants."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the user wrote
        if isinstance(values, dict) and values.get("preset") == "gain_paper":
            return {**GAIN_PAPER, **values}
        return values


class GainConfig(GainOptions):
    """GAIN: image labels alone."""

    name: Literal["gain"] = "gain"
    """The method's key in METHODS."""

    def build(self) -> Method:
        """The GAIN method."""
        return Gain(self)


class GainExtConfig(GainOptions):
    """GAIN_ext: image labels, and true masks of a named subset."""

    name: Literal["gain_ext"] = "gain_ext"
    """The method's key in METHODS."""
    alpha: float = Field(default=0.0, ge=0, le=100)
    """Weight of the mining loss.  Source: eq. 8, α = 1; ours: mining beside true masks took more than it gave
    (docs/gain.md)."""
    ext_weight: float = Field(default=10.0, ge=0, le=1000)
    """Weight of L_e.  Source: eq. 8, ω = 10 (another ω than T's)."""
    ext_norm: Literal["max", "minmax"] = "max"
    """How a map is brought to [0, 1] before it is compared with the mask.  Source: not in the paper."""
    ext_norm_gradient: Literal["detached", "full"] = "full"
    """Whether L_e differentiates through that normalisation: a peak that stands out is then lowered, too.
    Source: not in the paper; measured (docs/gain.md)."""
    ext_resize: Literal["mask_to_map", "map_to_mask"] = "mask_to_map"
    """mask_to_map: the mask averaged over the cells of the map; map_to_mask: the map upsampled bilinearly (ilyak93).
    Source: not in the paper."""
    ext_warmup_epochs: int = Field(default=0, ge=0, le=10_000)
    """Epochs before L_e begins.  Source: not in the paper."""
    pixel_images: int | None = Field(default=200, ge=1)
    """Training images whose true masks are used, drawn by ``pixel_seed``.  Source: Table 2: 200, 400, 900, 1,464."""
    pixel_seed: int = Field(default=0, ge=0, lt=2**32)
    """Which ones; a larger subset of one seed contains the smaller."""
    pixel_list: Path | None = None
    """File with one image id a line, instead of ``pixel_images`` and ``pixel_seed``."""
    pixel_repeat: int = Field(default=1, ge=1, le=1000)
    """How often a pixel-labelled image stands in an epoch; every other stands once.  Source: no schedule in the paper
    (its batch is 1 and S_e sees only images that have masks)."""

    @model_validator(mode="before")
    @classmethod
    def _choose_subset(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the user wrote
        """A list stands instead of the default number."""
        if isinstance(values, dict) and values.get("pixel_list") is not None:
            return {"pixel_images": None, **values}
        return values

    @model_validator(mode="after")
    def _check_subset(self) -> GainExtConfig:
        if (self.pixel_images is None) == (self.pixel_list is None):
            raise ValueError(
                f"give exactly one of pixel_images and pixel_list, got {self.pixel_images} and {self.pixel_list}"
            )
        return self

    def build(self) -> Method:
        """The GAIN_ext method."""
        return GainExt(self)

    def pixel_labelled(self, candidates: Sequence[Candidate]) -> tuple[str, ...]:
        """The subset: drawn from the images that have a mask for scores (VOC: official ones), or those of the list.

        Raises:
            ConfigError: fewer images have masks than are asked for, or a listed image has none or is not trained on.
        """
        return choose_masked(
            candidates,
            count=self.pixel_images,
            path=self.pixel_list,
            draw=f"pixel subset {self.pixel_seed}",
            options=("method.pixel_images", _PIXEL_LIST),
            lacks="has no true mask",
            unknown="is not among the images that the classifier is trained on",
        )

    def repeats(self, image_id: str, pixel_labelled: frozenset[str]) -> int:
        """How often an image stands in an epoch."""
        return self.pixel_repeat if image_id in pixel_labelled else 1

    def key_content(self) -> dict[str, Any]:
        """The options with the ids of the list instead of its path."""
        content = super().key_content()
        if self.pixel_list is not None:
            content["pixel_list"] = list(read_ids(self.pixel_list, _PIXEL_LIST))
        return content


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


class Gain(GradCam):
    """L_self = L_cl + α · L_am (eq. 6); attention is Grad-CAM, the network the plain one."""

    def __init__(self, config: GainOptions) -> None:
        super().__init__(config)
        self.options = config

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classification, and once it is warmed up, mining.

        Logged beside the losses: ``peak_logit``, the largest logit of a present class (feature scale is a second way
        to satisfy the mining loss), ``mined``, the share of the pairs that were mined, and ``recall``, the share of the
        present classes that the classifier gives a positive logit.
        """
        del masks
        evidence, losses = self._classify(classifier, images, labels)
        losses |= self._mine(classifier, images, evidence, step)
        return {"loss": losses["classification"] + self.options.alpha * losses["mining"], **losses}

    def _classify(self, classifier: Classifier, images: Tensor, labels: Tensor) -> tuple[Evidence, dict[str, Tensor]]:
        """S_cl: the first pass, its loss, and the Grad-CAM maps of the present classes."""
        from stages.ops.losses import multilabel_soft_margin

        config = self.options
        evidence = find_evidence(
            classifier,
            images,
            labels,
            layer=config.layer,
            channel_weights=config.channel_weights,
            second_order=config.second_order,
        )
        present = evidence.logits.detach()[evidence.image, evidence.label].float()
        return evidence, {
            "classification": multilabel_soft_margin(evidence.logits, labels),
            "peak_logit": present.amax() if len(present) else present.sum(),
            "recall": (present > 0).float().sum() / max(len(present), 1),
        }

    def _mine(self, classifier: Classifier, images: Tensor, evidence: Evidence, step: StepInfo) -> dict[str, Tensor]:
        """S_am: the class scores of the images whose attention is erased (eq. 3-5)."""
        from stages.ops.mining import mean_over_classes_then_images

        config = self.options
        nothing = {"mining": images.new_zeros(()), "mined": images.new_zeros(())}
        if config.alpha == 0 or step.epoch < config.am_warmup_epochs:
            return nothing
        chosen = self._choose(evidence)
        image = evidence.image[chosen]
        values = self._erased_scores(classifier, images, evidence, chosen) if len(chosen) else images.new_zeros(0)
        mining = mean_over_classes_then_images(values, image, len(images))
        return {"mining": mining, "mined": mining.new_tensor(len(chosen) / max(len(evidence.image), 1))}

    def _erased_scores(self, classifier: Classifier, images: Tensor, evidence: Evidence, chosen: Tensor) -> Tensor:
        """The score (n,) of each chosen pair's class in the image whose attention is erased (eq. 3-4)."""
        import torch

        from stages.ops.cells import cells_to_pixels
        from stages.ops.mining import erase, normalise_maps, soft_mask

        config = self.options
        image, label = evidence.image[chosen], evidence.label[chosen]
        maps = cells_to_pixels(evidence.maps[chosen], (images.shape[2], images.shape[3]), evidence.cells)
        maps = normalise_maps(maps, config.attention_norm, config.norm_gradient)
        shown, row = image, torch.arange(len(image), device=image.device)
        if config.am_mode == "joint":
            shown, row = image.unique(return_inverse=True)
            maps = maps.new_zeros(len(shown), *maps.shape[1:]).index_add(0, row, maps).clamp(max=1)
        erased = erase(images[shown], soft_mask(maps, sigma=config.mask_sigma, omega=config.mask_omega))
        scores = self._look_again(classifier, erased)[row, label].float()
        return scores.sigmoid() if config.am_score == "sigmoid" else scores

    def _choose(self, evidence: Evidence) -> Tensor:
        """Positions (n,) of the pairs to mine."""
        import torch

        config = self.options
        probability = evidence.logits.detach()[evidence.image, evidence.label].float().sigmoid()
        kept = torch.nonzero(probability >= config.am_min_probability)[:, 0]
        if config.am_mode != "random_class" or len(kept) == 0:
            return kept
        order = kept[torch.randperm(len(kept), device=kept.device)]
        image = evidence.image[order]
        first = [int(torch.nonzero(image == one)[0, 0]) for one in image.unique()]
        return order[first]

    def _look_again(self, classifier: Classifier, erased: Tensor) -> Tensor:
        """Logits (P, K) of the erased images; BatchNorm neither measures nor keeps anything of them."""
        from torch.func import functional_call

        from stages.nets.layers import batch_norm_in_evaluation

        with batch_norm_in_evaluation(classifier):
            if self.options.mining_gradient == "shared":
                return classifier(erased).logits
            constants = {name: parameter.detach() for name, parameter in classifier.named_parameters()}
            return functional_call(classifier, constants, (erased,)).logits


class GainExt(Gain):
    """L_ext = L_cl + α · L_am + ext_weight · L_e (eq. 8), L_e on the images that come with a true mask."""

    def __init__(self, config: GainExtConfig) -> None:
        super().__init__(config)
        self.ext = config

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """GAIN's losses and ``pixel``, the squared error between attention and masks (eq. 7)."""
        evidence, losses = self._classify(classifier, images, labels)
        losses |= self._mine(classifier, images, evidence, step)
        losses["pixel"] = losses["mining"].new_zeros(())
        if masks is not None and step.epoch >= self.ext.ext_warmup_epochs:
            losses["pixel"] = self._compare(evidence, masks)
        total = losses["classification"] + self.ext.alpha * losses["mining"]
        return {"loss": total + self.ext.ext_weight * losses["pixel"], **losses}

    def _compare(self, evidence: Evidence, masks: Tensor) -> Tensor:
        """S_e: L_e, mean over the known cells, the classes of an image, then the images that have masks."""
        from stages.ops.cells import PIXELS, cells_to_pixels
        from stages.ops.mining import mean_over_classes_then_images, normalise_maps, pixel_targets, squared_error

        options = self.ext
        chosen = _pairs_in_masks(masks, evidence)
        if len(chosen) == 0:  # another device may have pairs
            nothing = mean_over_classes_then_images(evidence.maps.new_zeros(0), chosen, len(masks))
            return evidence.maps.sum() * 0 + nothing
        maps, image, label = evidence.maps[chosen], evidence.image[chosen], evidence.label[chosen]
        cells = evidence.cells
        if options.ext_resize == "map_to_mask":
            maps, cells = cells_to_pixels(maps, (masks.shape[1], masks.shape[2]), cells), PIXELS
        maps = normalise_maps(maps, options.ext_norm, options.ext_norm_gradient)
        target, known = pixel_targets(masks, image, label, (maps.shape[1], maps.shape[2]), cells)
        return mean_over_classes_then_images(squared_error(maps, target, known), image, len(masks))


def _pairs_in_masks(masks: Tensor, evidence: Evidence) -> Tensor:
    """Positions (n,) of the pairs whose class can be seen in a true mask.

    A class that the crop has cut off has no place where its attention, whose peak is 1 by construction, would be right.
    """
    from stages.ops.mining import class_pixels

    return (class_pixels(masks, evidence.image, evidence.label) > 0).nonzero()[:, 0]
