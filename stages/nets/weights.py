"""Network weights: what goes into cache keys, loading with a report, saving.

Reads torch's files (never unpickles objects) and safetensors, told apart by their bytes; writes safetensors.
Public files come from ``stages.nets.downloads``.
Torch-free at import: identities and checks work without torch.
Weights are looked up by backbone name; one entry of ``weights:`` serves the classifier and the segmenter.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages.contracts import Progress, stand_in, write_atomic
from stages.errors import DamagedFileError, WeightsError
from stages.nets.backbones.config import BackboneConfig
from stages.nets.backbones.spec import PackageFile
from stages.nets.downloads import PUBLIC_WEIGHTS, digest_file, download_weights, package_file, public_source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.nets.backbones.network import Backbone

_HEAD_BYTES = 512
_LARGEST_HEADER = 100_000_000
"""Bytes of the longest header that safetensors reads."""


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
    """Why the weights of ``name`` cannot be used, as far as their first bytes show; empty when fine."""
    try:
        if name in weights:
            _kind_of(_given_file(name, weights[name]))
        elif isinstance(source := public_source(name), PackageFile):
            package_file(source, name)
    except WeightsError as error:
        return [error.message]
    return []


def _given_file(name: str, path: Path) -> Path:
    if not path.is_file():
        raise WeightsError(f"weights.{name}: there is no file {path}; correct the path or remove the entry")
    return path


def _kind_of(path: Path) -> Literal["safetensors", "torch"]:
    """What a file of weights is by its first bytes, whatever it is called.

    Raises:
        WeightsError: it is something else; the message says what, and what to give instead.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise WeightsError(f"{path}: not a readable weight file ({error.strerror})") from error
    if (reason := stand_in(head)) is not None:
        raise WeightsError(f"{path}: not a readable weight file ({reason})")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    reason = "it holds neither tensors of torch nor safetensors"
    if head[:1] == b"\x08" and head[2:3] in {b"\x12", b"\x3a", b"\x42"}:  # ir_version, then producer, graph or opset
        reason = "it is an ONNX model"
    elif head.startswith(b"\x89HDF"):
        reason = "it is an HDF5 file, as Keras writes it"
    raise WeightsError(f"{path}: not a readable weight file ({reason}); {_SAVE}")


_SAVE = "save a plain state_dict() of tensors, with torch.save or as safetensors"


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
    wanted = module.state_dict().keys()
    tensors, public = read_tensors(file, wanted), PUBLIC_WEIGHTS.get(name)
    if isinstance(public, PackageFile) and public.tensor_names and not tensors.keys() & wanted:
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
    return load_tensors(module, read_tensors(file, module.state_dict().keys()), source=f"{name} from {file.name}")


_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net", "params")
"""Where training programs put the state_dict into a larger one."""
_MOST_WRAPPERS = 4

_WRAPPER_PARTS = frozenset(
    {"module", "model", "net", "network", "backbone", "body", "encoder", "encoder_q", "trunk", "_orig_mod"}
)
"""What programs put before the names of a network inside of theirs: DDP, Lightning, torchvision, MMSegmentation, MoCo,
torch.compile."""


def read_tensors(path: Path, wanted: Collection[str] = ()) -> dict[str, Tensor]:
    """Read a weight file as a flat dict; what wraps the state_dict is taken off.

    Args:
        path: The file, whatever it is called.
        wanted: Names of the network's tensors.  A known prefix of the file's names (``module.``, ``model.backbone.``)
            is taken off where more of them fit then; names without it stay as they are.

    Raises:
        WeightsError: not a weight file, or a pickle of objects instead of tensors; the message says what it is.
    """
    import torch

    content = _load(path)
    for _ in range(_MOST_WRAPPERS):
        inner = [
            content[key] for key in _WRAPPER_KEYS if isinstance(content, dict) and isinstance(content.get(key), dict)
        ]
        content = inner[0] if inner else content
    items = content.items() if isinstance(content, dict) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, torch.Tensor)}
    if not tensors:
        keys = f" with {shorten(map(str, content), 5)}" if isinstance(content, dict) and content else ""
        raise WeightsError(f"{path}: expected a dict of tensors, found {type(content).__name__}{keys}; {_SAVE}")
    counts = {prefix: sum(prefix + name in tensors for name in wanted) for prefix in _prefixes(tensors)}
    best = max(counts, key=lambda prefix: counts[prefix])  # the shortest of equals
    return {name.removeprefix(best): value for name, value in tensors.items()}


def _prefixes(names: Iterable[str]) -> list[str]:
    """The known prefixes that some of ``names`` have, shortest first, beginning with none at all."""
    found = {""}
    for name in names:
        prefix = ""
        for part in name.split(".")[:-1]:
            if part not in _WRAPPER_PARTS:
                break
            prefix += f"{part}."
            found.add(prefix)
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _load(path: Path) -> Any:  # noqa: ANN401 - whatever a file holds
    import torch
    from safetensors.torch import load_file

    kind = _kind_of(path)
    try:
        if kind == "safetensors":
            return load_file(path)
        with path.open("rb") as file:  # by its name torch would take some for safetensors
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch's readers answer damaged bytes with whatever their parsers trip over
        reason = f"it is cut off or damaged: {path.stat().st_size:,} bytes; get it again"
        if kind == "torch":
            reason = _why_not_torch(path, str(error)) or reason
        raise WeightsError(f"{path}: not a readable weight file ({reason}); {_SAVE}") from error


def _why_not_torch(path: Path, complaint: str) -> str | None:
    """What a zip archive or a pickle is that torch does not load; None where it is only damaged."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        names = zipfile.ZipFile(path).namelist() if is_zip else []
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # of damaged bytes it reads odd versions
        return None
    if any(name.endswith("constants.pkl") for name in names):
        return "it is a TorchScript program"
    if is_zip and not any(name.endswith("data.pkl") for name in names):
        return f"it is a zip archive of {shorten(names, 3)}"
    if "weights_only" in complaint or "Unsupported" in complaint:  # torch's advice to load it all the same is not ours
        objects = re.findall(r"GLOBAL (\S+)", complaint)
        named = f" ({objects[0]})" if objects else ""
        return f"it holds objects of a program{named}, and loading those would run foreign code"
    return None


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> WeightsReport:
    """Copy ``tensors`` into ``module`` by name; all of the module's tensors must be there, in their shapes.

    A file may hold more (the ImageNet classifier), but nothing more *inside* the parts that the module has:
    ResNet-101's file does not pass for ResNet-50.

    Raises:
        WeightsError: nothing matches, shapes differ, tensors of the backbone are missing, or values are no numbers; all
            are named.
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
    used = {key: tensors[key] for key in matched}
    if problems := non_finite(used):
        raise WeightsError(f"{source}: values are no numbers; get the file again or give another", problems)
    module.load_state_dict({**wanted, **used})
    return WeightsReport(source, matched, missing, unexpected)


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """One line per tensor with NaN or infinity in it."""
    counts = {key: int((~value.isfinite()).sum()) for key, value in tensors.items() if value.is_floating_point()}
    return [
        f"{key}: {count:,} of {tensors[key].numel():,} values are NaN or infinite"
        for key, count in counts.items()
        if count
    ]


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
        DamagedFileError: missing, damaged, written from another net, or with values that are no numbers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        module.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _stand_in_of(path) or error
        raise DamagedFileError(
            f"{path} does not hold this net ({reason}); rebuild the artifact that holds it"
        ) from error
    if problems := non_finite(tensors):
        raise DamagedFileError(f"{path} holds values that are no numbers; rebuild the artifact that holds it", problems)


def _stand_in_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return stand_in(file.read(_HEAD_BYTES))
