"""Config classes that get new options without a new key for the configs that do not use them.

Reads and writes nothing; torch-free.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import SerializerFunctionWrapHandler, model_serializer

from stages.contracts import StageConfig


class GrowingConfig(StageConfig):
    """A config some of whose options came later: these are left out of what is written while they are at their default.

    Keys, checkpoints and records of trained nets are made of what is written, so those of the time before stay valid.
    A reader finds the default in the field, whichever file it reads.
    """

    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset()
    """Names of the options that came later."""

    @model_serializer(mode="wrap")
    def _leave_out_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        unused = {name for name in self.LATER_FIELDS if getattr(self, name) == fields[name].default}
        return {name: value for name, value in handler(self).items() if name not in unused}
