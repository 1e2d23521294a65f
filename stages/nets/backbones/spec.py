"""What is known of a backbone before it is built: name, strides, public weights, how segmenters use it; torch-free.

Reads and writes nothing.  A backbone is one file beside this one and its line in ``BACKBONES``
(``stages.nets.backbones.config``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.nets.backbones.cell_rules import CellRule

if TYPE_CHECKING:
    from stages.nets.backbones.network import Backbone


@dataclass(frozen=True)
class PublicWeights:
    """A public file of weights."""

    url: str
    sha_prefix: str | None
    """First hex digits of the file's sha256; None where the publisher states none."""

    @property
    def file_name(self) -> str:
        """Name in the cache folder and in cache keys; unique by content."""
        repository, _, rest = self.url.partition("/resolve/")
        name = self.url.rsplit("/", 1)[-1]
        return f"{repository.rsplit('/', 1)[-1]}-{name}" if rest else name


@dataclass(frozen=True)
class PackageFile:
    """A file of weights in an installed package, such as the extra ``weights`` brings."""

    package: str
    """The package's module."""
    path: str
    """The file inside of it."""
    sha_prefix: str
    """First hex digits of the file's sha256."""
    tensor_names: Callable[[], list[str]] | None = None
    """The network's names of the file's tensors, in the file's order, where it calls them otherwise."""

    @property
    def file_name(self) -> str:
        """Name in cache keys; unique by content."""
        return self.path.rsplit("/", 1)[-1]


def torchvision_file(name: str) -> PublicWeights:
    """A file of torchvision's server, which writes the first digits of the sha256 into the file's name."""
    sha_prefix = name.removesuffix(".pth").rsplit("-", 1)[-1]
    return PublicWeights(f"https://download.pytorch.org/models/{name}", sha_prefix)


@dataclass(frozen=True)
class BackboneSpec:
    """One backbone: everything that a config, a download or a segmenter asks of it."""

    name: str
    """As a config spells it."""
    output_strides: tuple[int, ...]
    """Strides it can be built at; the last one is the plain network's own."""
    build: Callable[[int], Backbone]
    """The network at an output stride and a random start; torch is imported inside.  Its ``state_dict()`` has the plain
    torchvision or timm network's keys, so that public weights load directly."""
    public: PublicWeights | PackageFile | None = None
    """ImageNet weights; None where there are none and it trains from scratch."""
    coco: PublicWeights | None = None
    """A segmentation network trained on COCO whose backbone is this one."""
    largefov_head: Mapping[str, Any] = field(default_factory=lambda: {"batch_norm": True})
    """LargeFOV's options on it where they differ from the defaults of ``LargeFovConfig``, which are VGG16's."""
    cells: CellRule = CellRule.PADDED_KERNELS
    """Where its cells look."""
    decoder_layer: tuple[str, int] | None = None
    """The layer whose output, at stride 4, DeepLabV3+'s decoder reads too, and its channels; None where DeepLabV3 and
    V3+ do not stand on this backbone but on an encoder of segmentation-models-pytorch."""
    has_vgg_pools: bool = False
    """Whether DeepLab makes its 2×2 pools 3×3, whose cells are those of padded kernels, and puts pool5 behind it."""

    @property
    def has_corner_cells(self) -> bool:
        """Whether a segmenter's cell i looks at pixel stride · i, so that LargeFOV can align corners."""
        return self.has_vgg_pools or self.cells is CellRule.PADDED_KERNELS
