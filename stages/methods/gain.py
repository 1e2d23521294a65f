"""GAIN and GAIN_ext: a classifier whose attention is mined until what it leaves of the image no longer tells the class.

Two streams.  The first classifies.  In the second a judge looks at each image with the attention of one of its classes
erased, and should not find the class any more, so the attention must cover the whole object.  GAIN's judge is the
network itself; by default it is a frozen copy, which sees an attention that covers the other classes too (OC-CSE).
GAIN_ext has a third stream: on a few images with true masks the attention is compared with the mask.

Shapes: B images, K foreground classes, P (image, class) pairs, H W pixels, h w cells.
Source: Li, Wu, Peng, Ernst and Fu, "Tell Me Where to Look: Guided Attention Inference Network", CVPR 2018
(arXiv 1802.10171); Kweon et al., "Unlocking the Potential of Ordinary Classifier", ICCV 2021 (OC-CSE).  What GAIN
leaves open is a field below, with where its default comes from.  GAIN's published segmentation (docs/results.md) rests
on background cues of a saliency network too, not on its attention alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    "judge": "self",
    "mask": "sigmoid",
    "target": "erased",
    "alpha": 1.0,
    "mask_sigma": 0.5,
    "mask_omega": 10.0,
    "attention_norm": "minmax",
    "norm_gradient": "detached",
    "am_score": "sigmoid",
    "am_mode": "per_class",
    "am_warmup_epochs": 5,
    "second_order": False,
}
"""The preset ``gain_paper``: what the paper says (eq. 1-6, α = 1), and where it says nothing a choice that works.

Its "prediction score" is read as a probability (ilyak93 d67855b takes a softmax's, alokwhitewolf cd1cb0a a sigmoid's):
a raw score has no lower bound, and driving it down unlearns the class.  Mining begins after five epochs (ilyak93), the
maps are brought to [0, 1] by min-max, σ is 0.5 and ω is 10 (ilyak93)."""


class GainOptions(GradCamOptions):
    """What GAIN and GAIN_ext have in common; the defaults are the recipe that measured best (docs/gain.md)."""

    preset: Literal["gain", "gain_paper"] = "gain"
    """gain: our measured defaults; gain_paper: the paper as it can be read.  A field that is written beats its
    preset."""
    judge: Literal["self", "frozen"] = "frozen"
    """Who classifies the erased image.  self: the classifier itself, whose weights learn from it (the paper).  frozen:
    a copy of it, taken when the warm-up ends and kept in evaluation mode, so that only the mask can change the answer.
    Source: frozen, OC-CSE (ICCV 2021), whose judge is a classifier that was trained before."""
    mask: Literal["sigmoid", "linear"] = "linear"
    """What is erased of a pixel with attention A in [0, 1].  sigmoid: T(A) (eq. 4); linear: A itself.
    Source: linear, OC-CSE."""
    target: Literal["erased", "others"] = "others"
    """What the judge is to say.  erased: as little as possible of the erased class (eq. 5); others: the image's labels
    without it, so that erasing another class with it costs as much.  Source: others, OC-CSE."""
    alpha: float = Field(default=1.0, ge=0, le=100)
    """Weight of the mining loss, which is a mean over the K classes as L_cl is.  Source: eq. 6, α = 1."""
    mask_sigma: float = Field(default=0.5, gt=0, lt=1)
    """σ of T(A) = sigmoid(ω (A - σ)): the attention above which a pixel is erased.
    Source: no number in the paper; re-implementations use 0.25 to 0.6."""
    mask_omega: float = Field(default=10.0, gt=0, le=1000)
    """ω of T(A): how sharp the border is.  Source: no number in the paper; re-implementations use 8 to 100."""
    attention_norm: Literal["max", "minmax"] = "max"
    """How a map is brought to [0, 1] before it erases.  Source: not in the paper."""
    norm_gradient: Literal["detached", "full"] = "detached"
    """Whether the mining loss differentiates through the normalisation.  Source: detached, alokwhitewolf cd1cb0a."""
    am_score: Literal["logit", "sigmoid"] = "sigmoid"
    """With ``target: erased``, what of the class is driven down: its raw score or its probability, which is a softmax's
    where the classes exclude each other.  Source: the paper's "prediction score" is either;
    the raw score has no lower bound; alokwhitewolf takes the sigmoid."""
    am_mode: Literal["per_class", "joint", "random_class"] = "random_class"
    """per_class: one erased image for each class of the image (eq. 3-5); joint: one, with the attention of all its
    classes erased (ilyak93); random_class: one, with a class drawn at random (alokwhitewolf)."""
    am_warmup_epochs: int = Field(default=5, ge=0, le=10_000)
    """Epochs of plain classification before mining begins: attention of an untrained net is noise (ilyak93: 5).  0 for
    a training that goes on from a trained classifier (``weights.classifier``), which is then the frozen judge."""
    second_order: bool = False
    """Whether the losses of the attention differentiate Grad-CAM's channel weights too.  Source: the paper's backward
    pass for w^c "must not update parameters", so they are constants."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the user wrote
        if isinstance(values, dict) and values.get("preset") == "gain_paper":
            return {**GAIN_PAPER, **values}
        return values

    @property
    def warmup_epochs(self) -> int:
        """Epochs before the mining begins, where there is any."""
        return self.am_warmup_epochs if self.alpha else 0

    @property
    def needs_start(self) -> bool:
        """A judge that is frozen at once is the classifier that the training begins at."""
        return self.judge == "frozen" and self.alpha > 0 and self.am_warmup_epochs == 0


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

    @property
    def warmup_epochs(self) -> int:
        """Epochs before mining and L_e have begun, where there is any of them."""
        return max(super().warmup_epochs, self.ext_warmup_epochs if self.ext_weight else 0)

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
    """L_self = L_cl + α · L_am (eq. 6); attention is Grad-CAM, the network the plain one.

    Source:
        Li et al. 2018, §3.1; judge, mask and target of the default are those of Kweon et al. 2021 (OC-CSE).
        Differs: L_am is divided by K, for L_cl is a mean over the K classes too: α weighs the two alike whatever K is.
    """

    def __init__(self, config: GainOptions) -> None:
        super().__init__(config)
        self.options = config
        self._judge: Classifier | None = None
        self._judge_tensors: Mapping[str, Tensor] | None = None
        """A checkpoint's judge, until the network that it belongs to is at hand."""

    def prepare(self, classifier: Classifier) -> None:
        """Look the layer up; nothing is inserted."""
        from stages.errors import ConfigError

        super().prepare(classifier)
        if classifier.is_exclusive and self.options.alpha > 0 and self.options.target == "others":
            raise ConfigError(
                "method.target: others asks for the image's other labels, and these images have one label each "
                "(train_classifier.loss: cross_entropy); set method.target: erased, or loss: multilabel_soft_margin"
            )

    def state_dict(self) -> dict[str, Any]:
        """The frozen judge, once there is one."""
        return {"judge": self._judge_tensors if self._judge is None else self._judge.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the judge of a checkpoint."""
        self._judge, self._judge_tensors = None, state["judge"]

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classification, and once it is warmed up, mining.

        Logged beside the losses: ``peak_logit``, the largest logit of a present class (a larger scale of the features
        is a second way to satisfy a mining loss), and ``recall``, the share of the present classes that the classifier
        gives a positive logit.
        """
        del masks
        with self._batch_norm(classifier, step):
            evidence, losses = self._classify(classifier, images, labels)
            losses["mining"] = self._mine(classifier, images, labels, evidence, step)
        return {"loss": losses["classification"] + self.options.alpha * losses["mining"], **losses}

    def _mines(self, step: StepInfo) -> bool:
        """Whether the warm-up is over."""
        return self.options.alpha > 0 and step.epoch >= self.options.am_warmup_epochs

    def _batch_norm(self, classifier: Classifier, step: StepInfo) -> AbstractContextManager[None]:
        """A network that judges itself has its BatchNorm in evaluation mode in both passes, once it mines.

        Statistics of erased images must not be kept (ilyak93).  With the batch's statistics in the first pass and the
        running ones in the second the network tells the two apart and learns to deny the class in evaluation mode.
        """
        from stages.nets.layers import batch_norm_in_evaluation

        judges_itself = self.options.judge == "self" and self._mines(step)
        return batch_norm_in_evaluation(classifier) if judges_itself else nullcontext()

    def _classify(self, classifier: Classifier, images: Tensor, labels: Tensor) -> tuple[Evidence, dict[str, Tensor]]:
        """S_cl: the first pass, its loss, and the Grad-CAM maps of the present classes."""
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
            "classification": classifier.classification_loss(evidence.logits, labels),
            "peak_logit": present.amax() if len(present) else present.sum(),
            "recall": (present > 0).float().sum() / max(len(present), 1),
        }

    def _mine(
        self, classifier: Classifier, images: Tensor, labels: Tensor, evidence: Evidence, step: StepInfo
    ) -> Tensor:
        """S_am: L_am, what the judge says of the images whose attention is erased (eq. 3-5)."""
        import torch

        from stages.ops.cells import cells_to_pixels
        from stages.ops.mining import erase, mean_over_images, normalise_maps, soft_mask

        config = self.options
        if not self._mines(step):
            return images.new_zeros(())
        # taken at the first step of mining, whatever its images: every device then has the same
        judge = classifier if config.judge == "self" else self._frozen_judge(classifier)
        if len(evidence.image) == 0:
            return images.new_zeros(())
        chosen = self._choose(evidence)
        image, label = evidence.image[chosen], evidence.label[chosen]
        maps = cells_to_pixels(evidence.maps[chosen], (images.shape[2], images.shape[3]), evidence.cells)
        maps = normalise_maps(maps, config.attention_norm, config.norm_gradient)
        shown, row = image, torch.arange(len(image), device=image.device)
        if config.am_mode == "joint":
            shown, row = image.unique(return_inverse=True)
            maps = maps.new_zeros(len(shown), *maps.shape[1:]).index_add(0, row, maps).clamp(max=1)
        if config.mask == "sigmoid":
            maps = soft_mask(maps, sigma=config.mask_sigma, omega=config.mask_omega)
        logits = judge(erase(images[shown], maps)).logits.float()
        if config.target == "erased":
            if config.am_score == "sigmoid":
                logits = logits.softmax(dim=1) if classifier.is_exclusive else logits.sigmoid()
            share = 1 if classifier.is_exclusive else labels.shape[1]  # of the K classes that L_cl is a mean over
            return mean_over_images(logits[row, label] / share, image, len(images))
        others = labels[shown].float()
        others[row, label] = 0
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, others, reduction="none").mean(dim=1)
        return mean_over_images(losses, shown, len(images))

    def _choose(self, evidence: Evidence) -> Tensor:
        """Positions (n,) of the pairs to mine."""
        import torch

        order = torch.arange(len(evidence.image), device=evidence.image.device)
        if self.options.am_mode != "random_class":
            return order
        order = order[torch.randperm(len(order), device=order.device)]
        image = evidence.image[order]
        first = [int(torch.nonzero(image == one)[0, 0]) for one in image.unique()]
        return order[first]

    def _frozen_judge(self, classifier: Classifier) -> Classifier:
        """The copy that was taken at the first mining step, which this is where there is none yet."""
        from stages.nets.folding import fold_batch_norm

        if self._judge is None:
            judge = copy.deepcopy(classifier).eval().requires_grad_(requires_grad=False)
            fold_batch_norm(judge)  # it is never trained again: one layer less to pass through
            if self._judge_tensors is not None:
                judge.load_state_dict(self._judge_tensors)
            self._judge, self._judge_tensors = judge, None
        return self._judge


class GainExt(Gain):
    """L_ext = L_cl + α · L_am + ext_weight · L_e (eq. 8), L_e on the images that come with a true mask."""

    def __init__(self, config: GainExtConfig) -> None:
        super().__init__(config)
        self.ext = config

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """GAIN's losses and ``pixel``, the squared error between attention and masks (eq. 7)."""
        with self._batch_norm(classifier, step):
            evidence, losses = self._classify(classifier, images, labels)
            losses["mining"] = self._mine(classifier, images, labels, evidence, step)
        losses["pixel"] = losses["mining"].new_zeros(())
        if masks is not None and step.epoch >= self.ext.ext_warmup_epochs:
            losses["pixel"] = self._compare(evidence, masks)
        total = losses["classification"] + self.ext.alpha * losses["mining"]
        return {"loss": total + self.ext.ext_weight * losses["pixel"], **losses}

    def _compare(self, evidence: Evidence, masks: Tensor) -> Tensor:
        """S_e: L_e, mean over the known cells, the classes of an image, then the batch; no mask is an error of 0."""
        from stages.ops.cells import PIXELS, cells_to_pixels
        from stages.ops.mining import mean_over_images, normalise_maps, pixel_targets, squared_error

        options = self.ext
        chosen = _pairs_in_masks(masks, evidence)
        if len(chosen) == 0:
            return evidence.maps.new_zeros(())
        maps, image, label = evidence.maps[chosen], evidence.image[chosen], evidence.label[chosen]
        cells = evidence.cells
        if options.ext_resize == "map_to_mask":
            maps, cells = cells_to_pixels(maps, (masks.shape[1], masks.shape[2]), cells), PIXELS
        maps = normalise_maps(maps, options.ext_norm, options.ext_norm_gradient)
        target, known = pixel_targets(masks, image, label, (maps.shape[1], maps.shape[2]), cells)
        return mean_over_images(squared_error(maps, target, known), image, len(masks))


def _pairs_in_masks(masks: Tensor, evidence: Evidence) -> Tensor:
    """Positions (n,) of the pairs whose class can be seen in a true mask.

    A class that the crop has cut off has no place where its attention, whose peak is 1 by construction, would be right.
    """
    from stages.ops.mining import class_pixels

    return (class_pixels(masks, evidence.image, evidence.label) > 0).nonzero()[:, 0]
