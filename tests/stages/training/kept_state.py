"""The state in a checkpoint, whatever training it is of."""

import io
from pathlib import Path
from typing import Any

import torch


def read_state(folder: Path) -> dict[str, Any]:
    data = (folder / "checkpoint.pt").read_bytes()
    return torch.load(io.BytesIO(data[32:]), weights_only=True)["state"]
