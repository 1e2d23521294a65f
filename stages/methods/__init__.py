"""The attention methods by name; importing this reads their options only, never torch.

A new method is one file beside this one, its line in METHODS (with its import), and one YAML under ``configs/``: see
``docs/methods.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from stages.methods.acol import AcolConfig
from stages.methods.adl import AdlConfig
from stages.methods.base import Method, MethodConfig
from stages.methods.cam import CamConfig
from stages.methods.cutmix import CutMixConfig
from stages.methods.gain import GainConfig, GainExtConfig
from stages.methods.gradcam import GradCamConfig
from stages.methods.has import HasConfig
from stages.methods.spg import SpgConfig

METHODS: dict[str, type[MethodConfig]] = {
    "cam": CamConfig,
    "gradcam": GradCamConfig,
    "gain": GainConfig,
    "gain_ext": GainExtConfig,
    "adl": AdlConfig,
    "has": HasConfig,
    "acol": AcolConfig,
    "spg": SpgConfig,
    "cutmix": CutMixConfig,
}
"""Method names as a config spells them, with the class of their options."""


def method_union(methods: Mapping[str, type[MethodConfig]]) -> Any:  # noqa: ANN401 - a type made at run time
    """The type of a config's ``method:``: one of ``methods``, told apart by ``name``."""
    choices = tuple(methods.values())
    if len(choices) == 1:  # pydantic refuses to discriminate between one choice
        return choices[0]
    return Annotated[Union[choices], Field(discriminator="name")]  # noqa: UP007 - the members are known at run time only


if TYPE_CHECKING:
    MethodConfigUnion = MethodConfig
else:
    MethodConfigUnion = method_union(METHODS)


def build_method(config: MethodConfig) -> Method:
    """The method that ``config`` describes."""
    return config.build()


__all__ = ["METHODS", "Method", "MethodConfig", "MethodConfigUnion", "build_method", "method_union"]
