"""CutMix: paste a rectangle of one training image into another and ask for both images' labels by area.

Shapes: B images, K foreground classes, H W pixels.
Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
§3.1; clovaai/CutMix-PyTorch train.py; clovaai/wsolevaluation (b5c1e8a) wsol/method/cutmix.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from stages.methods.base import Method, MethodConfig
from stages.methods.cam import Cam

if TYPE_CHECKING:
    from torch import Tensor

    from stages.nets.classifier import Classifier
    from stages.ops.step import StepInfo


class CutMixConfig(MethodConfig):
    """CAM, trained on mixed images."""

    name: Literal["cutmix"] = "cutmix"
    """The method's key in METHODS."""
    beta: float = Field(default=1.0, gt=0, le=100)
    """α of Beta(α, α), which the kept share of an image is drawn from; 1 is uniform, larger values lie nearer to half.
    Source: §3.1, α = 1; wsolevaluation config.py, cutmix_beta 1."""
    mix_rate: float = Field(default=1.0, ge=0, le=1)
    """Probability that a batch is mixed.  Source: wsolevaluation config.py, cutmix_prob 1 (the paper's ImageNet too;
    its CIFAR runs take 0.5)."""

    def build(self) -> Method:
        """The CutMix method."""
        return CutMix(self)


class CutMix(Cam):
    """CAM of a classifier that was trained on mixed images; in evaluation images are whole.

    The losses are mixed as in the paper: λ L(y_a) + (1 - λ) L(y_b), which is the loss of the labels
    λ y_a + (1 - λ) y_b.  Differs: so are multi-label losses where images have several labels.
    """

    def __init__(self, config: CutMixConfig) -> None:
        self.config = config

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """λ L(y_a) + (1 - λ) L(y_b) of the mixed batch."""
        import torch

        del step, masks
        kept = torch.tensor(1.0)
        partners = labels
        if torch.rand(()).item() < self.config.mix_rate:
            mixed = mix_batch(images, self.config.beta)
            images, partners, kept = mixed.images, labels[mixed.partners], torch.tensor(mixed.kept)
        logits = classifier(images).logits
        kept = kept.to(logits.device)
        own, partner = (classifier.classification_loss(logits, target) for target in (labels, partners))
        loss = kept * own + (1 - kept) * partner
        return {"loss": loss, "kept": kept}


class MixedBatch(NamedTuple):
    """Images with a rectangle of another image each."""

    images: Tensor
    """(B, 3, H, W)."""
    partners: Tensor
    """(B,) index of the image that the rectangle comes from, on the images' device."""
    kept: float
    """λ: the share of the area that is the image's own."""


def mix_batch(images: Tensor, beta: float) -> MixedBatch:
    """Paste one rectangle, the same for the whole batch, from a permutation of the images; the given ones stay.

    Draws on the CPU, so that the rectangles are the same on every device.

    Args:
        images: (B, 3, H, W).
        beta: α of Beta(α, α).

    Source:
        §3.1, eq. 1-2 and Algorithm A1.
    """
    import torch

    size = (images.shape[2], images.shape[3])
    drawn = torch.distributions.Beta(torch.tensor(beta), torch.tensor(beta)).sample().item()
    partners = torch.randperm(len(images)).to(images.device)
    centre = (int(torch.randint(size[0], ()).item()), int(torch.randint(size[1], ()).item()))
    top, bottom, left, right = pasted_box(size, centre, drawn)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
    return MixedBatch(mixed, partners, 1 - (bottom - top) * (right - left) / (size[0] * size[1]))


def pasted_box(size: tuple[int, int], centre: tuple[int, int], kept: float) -> tuple[int, int, int, int]:
    """The rectangle (top, bottom, left, right), ends excluded, of the image's form and 1 - ``kept`` of its area.

    Args:
        size: (H, W).
        centre: (row, column); what juts out of the image is cut off, so the area has to be counted again.
        kept: The share that was drawn for the image's own pixels.

    Source:
        §3.1, eq. 2; rounding and clipping as in clovaai/CutMix-PyTorch ``rand_bbox``.
    """
    side = (1 - kept) ** 0.5
    (top, bottom), (left, right) = (
        (max(middle - int(length * side) // 2, 0), min(middle + int(length * side) // 2, length))
        for length, middle in zip(size, centre, strict=True)
    )
    return top, bottom, left, right
