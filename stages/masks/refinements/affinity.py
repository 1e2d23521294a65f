"""Learned affinity as a refinement: the maps walk over what a small head has learned about which cells belong together.

The head is trained before (``stages.training.affinity``); here are its options, its files and the walk.  Reads
``affinity.json`` and ``affinity.safetensors``, the classifier and images; writes the two files when the head is saved.
Torch is imported by the functions only.
Source: PSA (Ahn and Kwak, CVPR 2018); the labels it learns from are those of irn (Ahn, Cho and Kwak, CVPR 2019,
``step/cam_to_ir_label.py``).
Differs: PSA lets the background's score walk too; here only the classes' maps walk, as in irn, and the threshold rule
decides after.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from stages.contracts import ImageSet, Progress, Runtime, StageConfig, read_json, write_json
from stages.data.transforms import AugmentConfig
from stages.errors import DamagedFileError
from stages.masks.label_rules import ConfidentThresholds
from stages.masks.refinements.base import Refinement
from stages.masks.refinements.random_walk import MapWalker
from stages.ops.random_walk import RandomWalkConfig

if TYPE_CHECKING:
    from torch import Tensor

    from stages.nets.affinity import AffinityHead

WEIGHTS_FILE = "affinity.safetensors"
DESCRIPTION_FILE = "affinity.json"

AFFINITY = Refinement("the maps spread over cells that a trained head finds alike", None)


class AffinityConfig(StageConfig):
    """What the head learns from, how it is trained, and how far evidence walks over what it learned."""

    confident: ConfidentThresholds = ConfidentThresholds()
    """The labels that the head learns from: a CRF (``crf:``) at two thresholds, and where they differ no label.
    Source: irn's 0.30 and 0.05."""
    stride_px: int = Field(default=8, ge=2, le=64)
    """Pixels of the network's input per cell of the embedding.  Source: PSA's 8."""
    channels: int = Field(default=64, ge=4, le=1024, multiple_of=4)
    """Numbers of a cell's embedding, and of each level's projection.  PSA has 448, on a network that it trains."""
    radius_cells: int = Field(default=5, ge=2, le=64)
    """Pairs of cells nearer than this are learned, and pass evidence on.  Source: PSA's γ and irn's are 5."""
    augment: AugmentConfig = AugmentConfig()
    """How a training image becomes a crop; its ``short_side_px`` is also what the walk sees."""
    epochs: float = Field(default=4.0, gt=0, le=1000)
    """Passes over the training images that have labels.  Source: PSA takes 8, irn 3."""
    batch_size: int = Field(default=16, ge=1, le=4096)
    """Crops per step.  Source: irn's 32, PSA's 8."""
    learning_rate: float = Field(default=0.1, gt=0, le=100)
    """At the start; SGD with a polynomial schedule.  Source: irn's 0.1."""
    beta: float = Field(default=10.0, gt=0, le=100)
    """Power of the affinity in the walk: higher keeps evidence among more similar cells.  Source: irn's 10, PSA's 8."""
    log2_steps: int = Field(default=5, ge=0, le=12)
    """The walk has 2^this steps.  PSA and irn take 8 (256 steps); 5 is ours and measured: what a small head on frozen
    features learns separates objects less sharply, and a long walk over it ends at a flat map."""


class AffinityDescription(StageConfig):
    """Everything that is needed to build the head again, but its weights."""

    levels: tuple[tuple[str, int], ...]
    """Layers of the backbone that it reads, with their channels."""
    channels: int
    """Numbers of a cell's embedding."""
    stride_px: int
    """Pixels of the network's input per cell."""
    history: tuple[dict[str, float], ...] = ()
    """The losses of its training."""

    def build(self) -> AffinityHead:
        """A fresh head."""
        from stages.nets.affinity import AffinityHead

        return AffinityHead([channels for _, channels in self.levels], self.channels)


def is_trained(folder: Path) -> bool:
    """Whether there is a whole head in ``folder``."""
    return (folder / DESCRIPTION_FILE).exists() and (folder / WEIGHTS_FILE).exists()


def save_head(folder: Path, description: AffinityDescription, head: AffinityHead) -> None:
    """Write the head to ``folder``; the description comes last and says that the weights are whole."""
    from stages.nets.weights import save_weights

    save_weights(head, folder / WEIGHTS_FILE)
    write_json(folder / DESCRIPTION_FILE, description.model_dump(mode="json"))


def read_head(folder: Path) -> tuple[AffinityDescription, AffinityHead]:
    """The trained head in ``folder``, on the CPU and in evaluation mode.

    Raises:
        DamagedFileError: a file is missing or does not read back.
    """
    from stages.nets.weights import load_weights

    path = folder / DESCRIPTION_FILE
    try:
        description = AffinityDescription.model_validate(read_json(path))
    except ValidationError as error:
        raise DamagedFileError(f"{path} does not describe a trained affinity; rebuild make_masks") from error
    head = description.build()
    load_weights(head, folder / WEIGHTS_FILE)
    return description, head.eval()


class AffinityWalker(MapWalker):
    """The trained head on the classifier's features, and the walk over its embedding."""

    section = "affinity.augment"

    def __init__(
        self,
        config: AffinityConfig,
        *,
        head: Path,
        classifier: Path,
        images: ImageSet,
        progress: Progress,
        runtime: Runtime,
    ) -> None:
        """Load both.

        Args:
            config: The walk.
            head: Folder of the trained head.
            classifier: Output folder of ``train_classifier``.
            images: Where pixels come from.
            progress: Warned as by ``MapWalker``.
            runtime: As for ``MapWalker``.

        Raises:
            DamagedFileError: the head or the classifier does not read back.
        """
        seen = RandomWalkConfig(short_side_px=config.augment.seen_short_side_px)
        super().__init__(seen, classifier=classifier, images=images, progress=progress, runtime=runtime)
        self._description, network = read_head(head)
        self._head, self._affinity = network.to(self._device), config

    def _extract(self, images: Tensor) -> Tensor:
        from stages.nets.affinity import read_levels

        names = [name for name, _ in self._description.levels]
        return self._head(read_levels(self._backbone, names, images, self._description.stride_px))

    def _spread(self, maps: Tensor, cells: Tensor) -> Tensor:
        from stages.ops.affinity import walk_learned

        config = self._affinity
        return walk_learned(maps, cells, radius=config.radius_cells, beta=config.beta, log2_steps=config.log2_steps)
