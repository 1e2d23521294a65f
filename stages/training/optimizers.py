"""The optimiser of a training: which parameters learn how fast.

Pure; reads and writes nothing.  Torch is imported by the functions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.training.config import TrainingConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


def build_optimizer(config: TrainingConfig, groups: Sequence[Mapping[str, Any]], model: nn.Module) -> torch.optim.SGD:
    """SGD over the parameters of ``groups`` that learn; biases apart where the config treats them otherwise.

    Args:
        config: Learning rate, momentum, decay.
        groups: Each with "params" and optionally "lr_factor" (default 1) and "weight_decay".
        model: The network, which knows what is a bias.
    """
    import torch

    trained = [
        {**group, "params": [p for p in group["params"] if p.requires_grad], "lr_factor": group.get("lr_factor", 1.0)}
        for group in groups
    ]
    if config.bias_lr_factor != 1 or not config.bias_weight_decay:
        biases = find_biases(model)
        trained = [part for group in trained for part in _part_biases(group, biases, config)]
    return torch.optim.SGD(
        [group for group in trained if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def find_biases(model: nn.Module) -> frozenset[int]:
    """Identities of the biases of convolutions and linear layers: of whatever has a weight of two axes or more."""
    found = set()
    for layer in model.modules():
        own = dict(layer.named_parameters(recurse=False))
        if "bias" in own and "weight" in own and own["weight"].ndim > 1:
            found.add(id(own["bias"]))
    return frozenset(found)


def _part_biases(group: Mapping[str, Any], biases: frozenset[int], config: TrainingConfig) -> list[dict[str, Any]]:
    """``group`` without its biases, and these with their own rate and decay."""
    apart: dict[str, Any] = {
        **group,
        "params": [p for p in group["params"] if id(p) in biases],
        "lr_factor": group["lr_factor"] * config.bias_lr_factor,
    }
    if not config.bias_weight_decay:
        apart["weight_decay"] = 0.0
    return [{**group, "params": [p for p in group["params"] if id(p) not in biases]}, apart]
