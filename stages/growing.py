"""Config classes that get new options without a new key for the configs that do not use them.

Reads and writes nothing; torch-free.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, SerializationInfo, SerializerFunctionWrapHandler, model_serializer

from stages.contracts import StageConfig

_EVERY_OPTION = "every option"
"""Serialization context of ``every_option``."""


def every_option(config: BaseModel) -> dict[str, Any]:
    """All options of ``config`` and the sections in it as JSON, for people: also those that a key leaves out."""
    return config.model_dump(mode="json", context=_EVERY_OPTION)


class GrowingConfig(StageConfig):
    """A config some of whose options came later: these are left out of what is written while they are at their default.

    Keys, checkpoints and records of trained nets are made of what is written, so those of the time before stay valid.
    A reader finds the default in the field, whichever file it reads.
    """

    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset()
    """Names of the options that came later."""

    @model_serializer(mode="wrap")
    def _leave_out_unused(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        if info.context == _EVERY_OPTION:
            return handler(self)
        fields = type(self).model_fields
        unused = {name for name in self.LATER_FIELDS if getattr(self, name) == fields[name].default}
        return {name: value for name, value in handler(self).items() if name not in unused}
