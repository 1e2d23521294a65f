"""What every segmenter's config says of its net; torch-free.

A segmenter is its config in one file, its torch module in another, and its place in ``AnySegmenterConfig``
(``stages.nets.segmenters.config``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.contracts import StageConfig

if TYPE_CHECKING:
    from stages.nets.segmenters.segmenter import Segmenter

Init = Literal["imagenet", "coco", "classifier", "random"]
"""Where the segmenter's backbone starts: public weights, this run's classifier, or chance.

``coco`` is the backbone of a DeepLabV3 that torchvision trained on COCO's pixel masks, of VOC's classes alone: worth
points that no run on ImageNet weights has."""


class SegmenterBase(StageConfig):
    """Base of the segmenters' configs, which are told apart by their field ``name``."""

    @property
    def backbone_name(self) -> str:
        """The name under which ``weights:`` lists the backbone (the classifier's name for the same net)."""
        raise NotImplementedError

    @property
    def may_be_pretrained(self) -> bool:
        """Whether ``init`` may load public weights."""
        raise NotImplementedError

    def build(self, num_classes: int) -> Segmenter:
        """The net for C = ``num_classes`` with background, at a random start; imports torch.

        Raises:
            ConfigError: the net cannot be built.
        """
        raise NotImplementedError

    def init_problems(self, init: Init) -> list[str]:
        """What of this net alone does not go with ``init``; empty when all does."""
        del init
        return []
