"""The attention methods by name; importing this reads their options only, never torch.

A new method is one file beside this one, its line in METHODS (with its import), and one YAML under ``configs/``: see
``docs/methods.md``.  A method of another package is its entry point in the group ``wsss.methods``, looked up when a
config names a method that is not in METHODS.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, SerializeAsAny, ValidatorFunctionWrapHandler, WrapValidator

from stages.methods.acol import AcolConfig
from stages.methods.adl import AdlConfig
from stages.methods.base import Method, MethodConfig
from stages.methods.cam import CamConfig
from stages.methods.cutmix import CutMixConfig
from stages.methods.gain import GainConfig, GainExtConfig
from stages.methods.gradcam import GradCamConfig
from stages.methods.has import HasConfig
from stages.methods.recam import RecamConfig
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
    "recam": RecamConfig,
}
"""Method names as a config spells them, with the class of their options."""


def method_union(methods: Mapping[str, type[MethodConfig]]) -> Any:  # noqa: ANN401 - a type made at run time
    """The type of a config's ``method:``: one of ``methods``, told apart by ``name``."""
    choices = tuple(methods.values())
    if len(choices) == 1:  # pydantic refuses to discriminate between one choice
        return choices[0]
    return Annotated[Union[choices], Field(discriminator="name")]  # noqa: UP007 - the members are known at run time only


ENTRY_POINTS = "wsss.methods"
"""The group in which a package offers methods: name = "module:ConfigClass"."""


@cache
def _installed_method(name: str) -> tuple[type[MethodConfig], str] | None:
    """The options of method ``name`` of an installed package, with that package and its version; None for none.

    Raises:
        ValueError: several packages offer it, or what is offered cannot be imported or is no method.
    """
    found = importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)
    packages = {_package(point): point for point in found}
    if not packages:
        return None
    if len(packages) > 1:
        raise ValueError(f"method '{name}' is offered by {' and '.join(sorted(packages))}; uninstall all but one")
    ((package, point),) = packages.items()
    try:
        config = point.load()
    except Exception as error:  # whatever an import of somebody's module raises
        raise ValueError(
            f"method '{name}' of {package} cannot be imported ({type(error).__name__}: {error}); install it again"
        ) from error
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        text = f"method '{name}' of {package}: expected a subclass of MethodConfig, found {point.value}"
        raise ValueError(text)  # noqa: TRY004 - pydantic makes a problem of the config of a ValueError only
    return config, package


def _package(point: importlib.metadata.EntryPoint) -> str:
    return "a package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _validate_method(value: Any, built_in: ValidatorFunctionWrapHandler) -> Any:  # noqa: ANN401 - a config's value
    """``value`` as one of METHODS, else as a method of an installed package."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    if not isinstance(name, str) or name in METHODS or (found := _installed_method(name)) is None:
        return built_in(value)
    return found[0].model_validate(value)


if TYPE_CHECKING:
    MethodConfigUnion = MethodConfig
else:
    MethodConfigUnion = Annotated[method_union(METHODS), WrapValidator(_validate_method), SerializeAsAny()]


def method_key(config: MethodConfig) -> dict[str, Any]:
    """What a cache key says of a method: its options, and of another package its version, whose code VERSION misses."""
    name = getattr(config, "name", "")
    found = None if name in METHODS else _installed_method(name)
    return config.key_content() | ({} if found is None else {"package": found[1]})


def build_method(config: MethodConfig) -> Method:
    """The method that ``config`` describes."""
    return config.build()


__all__ = ["METHODS", "Method", "MethodConfig", "MethodConfigUnion", "build_method", "method_key", "method_union"]
