"""The attention methods by name; importing this reads their options only, never torch.

A new method is one file beside this one, its line in METHODS (with its import), and one YAML under ``configs/``: see
``docs/methods.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from stages.methods.base import Method, MethodConfig
from stages.methods.cam import CamConfig

METHODS: dict[str, type[MethodConfig]] = {
    "cam": CamConfig,
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
