"""The Method protocol: what turns a classifier into attention maps, and how the classifier is trained for it.

A method is one file with two classes, listed in ``stages.methods.METHODS``: a config (options with bounds and sources)
and the implementation that the config builds.  Config classes are read without torch, so a method's module imports
torch only inside functions; layers of its own (``nn.Module`` subclasses) live in a function that imports torch, or in a
second module.  ``docs/methods.md`` walks through an example.
Shapes: B images, K foreground classes, H W pixels, h w cells of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from stages.contracts import StageConfig
from stages.data.subsets import Candidate

if TYPE_CHECKING:
    from torch import Tensor

    from stages.nets.classifier import Classifier
    from stages.ops.step import StepInfo


class MethodConfig(StageConfig):
    """Base of every method's options; a subclass adds ``name: Literal["…"] = "…"``, its key in METHODS."""

    needs_score_maps: ClassVar[bool] = True
    """Whether the method reads class score maps, which a classifier with ``head: fc`` does not have."""

    has_own_head: ClassVar[bool] = False
    """Whether ``prepare`` replaces the classifier's head: it then starts fresh behind another method's classifier."""

    @property
    def names_layers(self) -> bool:
        """Whether the user named layers of the backbone; then the network is built once before the first stage."""
        return False

    @property
    def warmup_epochs(self) -> int:
        """Epochs of plain classification at the beginning; a training that ends before is refused."""
        return 0

    @property
    def needs_start(self) -> bool:
        """Whether the training must begin at a trained classifier (``weights.classifier``)."""
        return False

    def build(self) -> Method:
        """The method with these options; imports torch at the earliest when a method of it is called."""
        raise NotImplementedError(f"{type(self).__name__} must say which Method it builds")

    def pixel_labelled(self, candidates: Sequence[Candidate]) -> tuple[str, ...]:
        """Ids of the training images whose true pixel masks the objective reads; none, unless the method overrides it.

        The stage loads exactly these masks, records the ids as mask supervision, and hands the masks to ``objective``.

        Args:
            candidates: The images that the classifier is trained on, in list order.

        Raises:
            ConfigError: more images are asked for than have masks, or a named one has none.
        """
        del candidates
        return ()

    def repeats(self, image_id: str, pixel_labelled: frozenset[str]) -> int:
        """How often an image stands in an epoch (GAIN_ext's few pixel-labelled ones may stand more often); once here.

        Args:
            image_id: A training image.
            pixel_labelled: What ``pixel_labelled`` chose.
        """
        del image_id, pixel_labelled
        return 1

    def key_content(self) -> dict[str, Any]:
        """What a cache key says of these options: their values, and of a file what is in it."""
        return self.model_dump(mode="json")


class Method(Protocol):
    """What differs between CAM, Grad-CAM, GAIN, ADL, ACoL, …; the training loop and the stages are the same for all."""

    @property
    def attention_needs_gradient(self) -> bool:
        """True when ``attention`` differentiates (Grad-CAM); else it runs in inference mode."""
        ...

    def prepare(self, classifier: Classifier) -> None:
        """Fit the network to the method, once, after building and before any weights of ours are loaded.

        May insert layers (ADL), add heads (ACoL) or wrap parts, in place.  Two things must hold afterwards: the keys of
        ``classifier.backbone.state_dict()`` are those of the plain backbone, and ``classifier(images).logits`` are
        still the class scores that labels are predicted with.  New parameters outside the backbone train at the head's
        rate.
        """
        ...

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What one training step minimises; runs every forward pass it needs itself, second ones included.

        Labels are learnt by ``classifier.classification_loss``, which is the one that the images' labels call for.

        Random draws (HaS, ADL, a random class) come from torch's generator, which the loop seeds anew for every step.

        Args:
            classifier: The network in training mode.
            images: (B, 3, H, W) normalised network input.
            labels: (B, K) float, 1 where the image has the class.
            step: Where the training stands (warm-ups, schedules of loss weights).
            masks: (B, H, W) class indices of the images in ``pixel_labelled``, all 255 for the others; None when the
                method asked for none.

        Returns:
            Scalars by name: ``loss`` is minimised, the others are logged beside it.
        """
        ...

    def attention(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Attention maps of a batch: ≥ 0, on the network's own scale (never divided by their peak).

        Args:
            classifier: The trained network in evaluation mode.
            images: (B, 3, H, W) normalised network input.
            labels: (B, K) float, 1 for the classes that are asked for.

        Returns:
            (B, K, h, w), on the cells of the backbone's output or of a layer before it, or on pixels; other maps are
            taken to span the input evenly.  Only the maps of asked classes mean anything.
        """
        ...


@runtime_checkable
class ScoreMapMethod(Protocol):
    """A method whose attention is the positive part of class score maps, which it can also give with their sign."""

    def score_maps(self, classifier: Classifier, images: Tensor) -> Tensor:
        """Class scores per cell, of any sign, for the images (B, 3, H, W) of a trained classifier; (B, K, h, w)."""
        ...
