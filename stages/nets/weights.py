"""Network weights: what goes into cache keys, loading with a report, saving.

Reads .pth (never unpickles objects) and .safetensors; writes .safetensors.
Public files come from ``stages.nets.downloads``.
Torch-free at import: identities and checks work without torch.
Weights are looked up by backbone name; one entry of ``weights:`` serves the classifier and the segmenter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.contracts import Progress, write_atomic
from stages.errors import DamagedFileError, WeightsError
from stages.nets.backbones.config import BackboneConfig
from stages.nets.backbones.spec import PackageFile
from stages.nets.downloads import PUBLIC_WEIGHTS, digest_file, download_weights, package_file, public_source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.nets.backbones.network import Backbone

SUFFIXES = (".pth", ".pt", ".safetensors")
"""Weight files that are read."""


# ---------------------------------------------------------------------------------------------------------------------
# Identity and checks, torch-free
# ---------------------------------------------------------------------------------------------------------------------


def weights_identity(name: str, weights: Mapping[str, Path]) -> str:
    """What a cache key says of the weights of ``name``: ``sha256:…`` of the given file, or ``public:<file name>``.

    Raises:
        WeightsError: the given file does not exist, or there is neither a file nor a public source.
    """
    if name not in weights:
        return f"public:{public_source(name).file_name}"
    path = _given_file(name, weights[name])
    state = path.stat()
    return "sha256:" + digest_file(path.resolve(), state.st_size, state.st_mtime_ns)


def weights_problems(name: str, weights: Mapping[str, Path]) -> list[str]:
    """Why the weights of ``name`` cannot be used, as far as that shows without reading them; empty when fine."""
    try:
        if name in weights:
            _given_file(name, weights[name])
        elif isinstance(source := public_source(name), PackageFile):
            package_file(source, name)
    except WeightsError as error:
        return [error.message]
    return []


def _given_file(name: str, path: Path) -> Path:
    if not path.is_file():
        raise WeightsError(f"weights.{name}: there is no file {path}; correct the path or remove the entry")
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"weights.{name}: expected a file ending in {', '.join(SUFFIXES)}, found {path}")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Loading into a network
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightsReport:
    """What a weight file and a network had in common, by tensor name."""

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    """Tensors of the network that the file lacks and that may start fresh (BatchNorm's batch counters)."""
    unexpected: tuple[str, ...]
    """Tensors of the file that the network has no place for (its ImageNet classifier)."""

    def describe(self) -> str:
        """One line for people."""
        left = f", {len(self.unexpected)} not used ({shorten(self.unexpected, 3)})" if self.unexpected else ""
        fresh = f", {len(self.missing)} start fresh ({shorten(self.missing, 3)})" if self.missing else ""
        return f"{self.source}: {len(self.matched)} tensors loaded{left}{fresh}"


def shorten(names: Iterable[str], limit: int = 8) -> str:
    """At most ``limit`` names, and how many more there are."""
    names = list(names)
    more = f", … {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def load_pretrained(
    module: nn.Module,
    name: str,
    path: Path | None = None,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> WeightsReport:
    """Load ImageNet weights into a backbone or encoder.

    Args:
        module: A backbone of ours or an encoder of segmentation-models-pytorch.
        name: Its name, as in the ``weights:`` map.
        path: The user's file; None fetches the public one.
        cache_dir: Where public files are kept.
        progress: Counts the download.

    Returns:
        What matched.

    Raises:
        WeightsError: no file, not readable, or it does not fit; every tensor that differs in shape is named.
    """
    file = fetch_weights(name, path, cache_dir=cache_dir, progress=progress)
    tensors, public = read_tensors(file), PUBLIC_WEIGHTS.get(name)
    if isinstance(public, PackageFile) and public.tensor_names and not tensors.keys() & module.state_dict().keys():
        names = public.tensor_names()
        if len(names) != len(tensors):
            raise WeightsError(f"{file}: expected {len(names)} tensors, found {len(tensors)}: it is of another net")
        tensors = dict(zip(names, tensors.values(), strict=True))
    return load_tensors(module, tensors, source=f"{name} from {file.name}")


def build_backbone(config: BackboneConfig, weights: Mapping[str, Path], progress: Progress | None = None) -> Backbone:
    """The backbone at its start: ImageNet weights where the config says ``pretrained``, else random.

    Args:
        config: Which backbone.
        weights: Weight files by backbone name; a name that is not there is downloaded.
        progress: Told what was loaded.

    Raises:
        WeightsError: weights are missing or do not fit; the tensors are named.
    """
    backbone = config.build()
    if config.pretrained:
        report = load_pretrained(backbone, config.name, weights.get(config.name), progress=progress)
        if progress is not None:
            progress.info(report.describe())
    return backbone


def fetch_weights(
    name: str, path: Path | None = None, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """The user's file of weights, or the public one, downloaded if need be.

    Raises:
        WeightsError: there is no such file, or none can be had.
    """
    return _given_file(name, path) if path is not None else download_weights(name, cache_dir, progress=progress)


COCO_PREFIXES = ("backbone.body.", "backbone.")
"""Where torchvision's detection and segmentation networks have their ResNet."""


def load_coco(
    module: nn.Module, name: str, path: Path | None = None, *, progress: Progress | None = None
) -> WeightsReport:
    """Load the backbone of a network that was trained on COCO into a ResNet.

    Args:
        module: Our ResNet, or that of segmentation-models-pytorch.
        name: ``<backbone>_coco``, as in the ``weights:`` map.
        path: The user's file: a segmentation or detection network of torchvision, or a bare ResNet; None fetches the
            public one.
        progress: Counts the download.

    Returns:
        What matched, by the backbone's names.

    Raises:
        WeightsError: no file, not readable, or its backbone does not fit.
    """
    file = fetch_weights(name, path, progress=progress)
    tensors = read_tensors(file)
    for prefix in COCO_PREFIXES:
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            break
    return load_tensors(module, tensors, source=f"{name} from {file.name}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a weight file as a flat dict; ``{"state_dict": …}`` and a ``module.`` prefix are taken off.

    Raises:
        WeightsError: not a weight file, or a pickle of objects instead of tensors.
    """
    import torch
    from safetensors.torch import load_file

    try:
        content = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except MemoryError:
        raise
    except Exception as error:  # torch's readers answer damaged bytes with whatever their parsers trip over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{path}: not a readable weight file ({reason}); save a plain state_dict() of tensors"
        ) from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = (
        {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, dict) else {}
    )
    if not tensors:
        raise WeightsError(f"{path}: expected a dict of tensors, found {type(content).__name__}; save state_dict()")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> WeightsReport:
    """Copy ``tensors`` into ``module`` by name; all of the module's tensors must be there, in their shapes.

    A file may hold more (the ImageNet classifier), but nothing more *inside* the parts that the module has:
    ResNet-101's file does not pass for ResNet-50.

    Raises:
        WeightsError: nothing matches, shapes differ, or tensors of the backbone are missing; all are named.
    """
    wanted = module.state_dict()
    matched = tuple(key for key in wanted if key in tensors)
    if not matched:
        raise WeightsError(
            f"{source}: no tensor name matches; the net expects {shorten(wanted, 3)}; "
            f"the file has {shorten(tensors, 3)}; see docs/weights.md for the layout of each backbone"
        )
    missing = tuple(key for key in wanted if key not in tensors)
    unexpected = tuple(sorted(key for key in tensors if key not in wanted))
    problems = _misfits(wanted, tensors, missing, unexpected)
    if problems:
        raise WeightsError(f"{source}: the weights are of another net ({len(problems)} tensors differ)", problems)
    module.load_state_dict({**wanted, **{key: tensors[key] for key in matched}})
    return WeightsReport(source, matched, missing, unexpected)


def _misfits(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], missing: Iterable[str], unexpected: Iterable[str]
) -> list[str]:
    """One line per tensor that shows that the file belongs to another net."""
    parts = {key.partition(".")[0] for key in wanted}
    return [
        *(
            f"{key}: the net has shape {tuple(value.shape)}, the file {tuple(tensors[key].shape)}"
            for key, value in wanted.items()
            if key in tensors and tensors[key].shape != value.shape
        ),
        *(f"{key}: missing in the file" for key in missing if not key.endswith("num_batches_tracked")),
        *(f"{key}: not in the net" for key in unexpected if key.partition(".")[0] in parts),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Our own files
# ---------------------------------------------------------------------------------------------------------------------


def save_weights(module: nn.Module, path: Path) -> None:
    """Write all tensors of ``module`` as safetensors, atomically; equal tensors give equal bytes."""
    from safetensors.torch import save

    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in sorted(module.state_dict().items())}
    write_atomic(path, save(tensors))


def load_weights(module: nn.Module, path: Path) -> None:
    """Read what ``save_weights`` wrote into an equal module.

    Raises:
        DamagedFileError: missing, damaged, or written from another net.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DamagedFileError(
            f"{path} does not hold this net ({error}); rebuild the artifact that holds it"
        ) from error
