"""Reach into a network by layer name: read what a layer makes, or change what it passes on; group its parameters.

Pure network code; reads and writes nothing, and every tensor keeps its name.  Layers are named as by
``named_modules()`` (``features.29``, ``layer4.2``).
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.errors import ConfigError


def find_layer(module: nn.Module, name: str) -> nn.Module:
    """The layer of ``module`` called ``name``.

    Raises:
        ConfigError: there is none; the nearest names are listed.
    """
    layers = {known: layer for known, layer in module.named_modules() if known}
    if name in layers:
        return layers[name]
    near = difflib.get_close_matches(name, layers, n=6, cutoff=0.5) or [known for known in layers if "." not in known]
    raise ConfigError(f"the backbone has no layer '{name}'; the nearest are: {', '.join(near[:8])}")


class Captured:
    """What one layer made in the forward pass inside ``capture_output``."""

    def __init__(self, *, cut: bool = False) -> None:
        """Keep the output as it is, or (``cut``) without what came before it in the graph."""
        self._output: Tensor | None = None
        self._cut = cut

    def keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ANN401 - a hook's signature
        """Keep the output and pass on a copy: an in-place ReLU behind the layer then leaves what was kept alone."""
        del layer, inputs
        self._output = output.detach().requires_grad_() if self._cut else output
        return self._output.clone()

    @property
    def output(self) -> Tensor:
        """The layer's output in the last forward pass.

        Raises:
            ConfigError: the layer was not run.
        """
        if self._output is None:
            raise ConfigError("the layer took no part in the forward pass; name one that the network runs through")
        return self._output


@contextlib.contextmanager
def capture_output(module: nn.Module, name: str, *, cut: bool = False) -> Iterator[Captured]:
    """Keep the output of layer ``name`` of the forward passes inside the block; nothing stays behind afterwards.

    Args:
        module: The network.
        name: Name of the layer.
        cut: Start the graph at this layer: what is computed before it is forgotten, and cannot be trained.

    Raises:
        ConfigError: there is no such layer.
    """
    captured = Captured(cut=cut)
    handle = find_layer(module, name).register_forward_hook(captured.keep)
    try:
        yield captured
    finally:
        handle.remove()


def insert_after(module: nn.Module, name: str, change: Callable[[nn.Module, Tensor], Tensor]) -> RemovableHandle:
    """Let ``change(layer, output)`` rewrite the output of layer ``name`` in every forward pass from now on.

    Being no submodule, ``change`` adds nothing to the ``state_dict``: public weights load as before.

    Args:
        module: The network.
        name: Name of the layer.
        change: Called with the layer (whose ``training`` tells the mode) and its output; returns the new output.

    Raises:
        ConfigError: there is no such layer.
    """

    def apply(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ANN401 - a hook's signature
        del inputs
        return change(layer, output)

    return find_layer(module, name).register_forward_hook(apply)


@contextlib.contextmanager
def batch_norm_in_evaluation(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm use its running statistics inside the block and measure nothing; its mode comes back afterwards."""
    switched = [
        layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
    ]
    for layer in switched:
        layer.training = False
    try:
        yield
    finally:
        for layer in switched:
            layer.training = True


def parameter_groups(module: nn.Module, trunk: nn.Module, head_lr_factor: float) -> list[dict[str, Any]]:
    """Parameters of ``trunk`` at factor 1, the others of ``module`` at ``head_lr_factor``; none twice."""
    trunk_ids = {id(parameter) for parameter in trunk.parameters()}
    head = [parameter for parameter in module.parameters() if id(parameter) not in trunk_ids]
    return [
        {"params": list(trunk.parameters()), "lr_factor": 1.0},
        {"params": head, "lr_factor": head_lr_factor},
    ]
