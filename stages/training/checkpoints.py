"""The state of a training on disk: one file, written whole or not at all, and read back exactly.

The file begins with the sha256 of the rest, which is torch's: torch reads a flipped bit without a word, and the
training would go on from it to a wrong artifact under its right key.
Torch is imported by the functions only; files are read with ``weights_only=True`` and never run code.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.contracts import Progress, write_atomic
from stages.errors import InputError

CHECKPOINT = "checkpoint.pt"
_DIGEST_BYTES = hashlib.sha256().digest_size


def save_checkpoint(out: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint under ``out``; a kill leaves the old one or the new one.

    Args:
        out: Work folder of the stage.
        identity: What distinguishes this training from any other; plain values.
        state: Tensors and plain values, nested.
    """
    import torch

    content = io.BytesIO()
    torch.save({"identity": dict(identity), "state": dict(state)}, content)
    write_atomic(out / CHECKPOINT, hashlib.sha256(content.getbuffer()).digest(), content.getbuffer())


def load_checkpoint(out: Path, identity: Mapping[str, Any], progress: Progress) -> dict[str, Any] | None:
    """Read the state that ``save_checkpoint`` wrote for the same ``identity``, on the CPU.

    A damaged checkpoint is set aside with a warning; one that the machine cannot read now (permission, memory) stays.

    Returns:
        The state, or None when there is no (whole) checkpoint.

    Raises:
        InputError: the checkpoint belongs to another training.
        OSError: the file cannot be read.
    """
    import torch

    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        data = memoryview(path.read_bytes())
        if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
            raise ValueError("the sha256 differs")  # noqa: TRY301 - set aside as whatever else does not read back
        content = torch.load(io.BytesIO(data[_DIGEST_BYTES:]), map_location="cpu", weights_only=True)
        found, state = content["identity"], content["state"]
    except (OSError, MemoryError):
        raise
    except Exception as error:
        aside = path.replace(path.with_suffix(".damaged"))
        progress.warn(f"{path} does not read back ({type(error).__name__}): moved to {aside.name}, starting at step 0")
        return None
    if found != dict(identity):
        names = dict.fromkeys([*identity, *found])
        differing = [name for name in names if found.get(name) != identity.get(name)]
        raise InputError(
            f"{path} belongs to another training (other {', '.join(differing)}); delete it or train elsewhere"
        )
    return state


def check_network(out: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another network.

    Args:
        out: Work folder of the stage.
        wanted: The network's ``state_dict()``.
        found: The checkpoint's.

    Raises:
        InputError: tensors differ in name or shape; all are listed.
    """
    problems = [
        *(f"{name}: missing in the checkpoint" for name in wanted if name not in found),
        *(f"{name}: not in the net" for name in found if name not in wanted),
        *(
            f"{name}: the net has shape {tuple(value.shape)}, the checkpoint {tuple(found[name].shape)}"
            for name, value in wanted.items()
            if name in found and found[name].shape != value.shape
        ),
    ]
    if problems:
        raise InputError(
            f"{out / CHECKPOINT} is of another network ({len(problems)} tensors differ); delete it or train elsewhere",
            problems,
        )


def remove_checkpoint(out: Path) -> None:
    """Remove the checkpoint under ``out``; to be called once the trained weights are safely written."""
    for suffix in (".pt", ".damaged"):
        (out / CHECKPOINT).with_suffix(suffix).unlink(missing_ok=True)
