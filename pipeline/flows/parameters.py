"""What the parameters of a flow mean: the config of a run, from a file, a shipped name or values typed into a form.

Imports no Prefect.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from pipeline.config.run_config import RunConfig, shipped_configs
from pipeline.config.yaml_models import load_values
from pipeline.engine.invocation import DEFAULT_ARTIFACTS, write_invocation
from pipeline.engine.records import load_named

StageName = Literal["prepare_data", "train_classifier", "make_attention", "make_masks", "train_segmenter", "evaluate"]
"""The stages, for the form's menu; a test compares them with the table's."""
Split = Literal["val", "test"]
Parts = Annotated[int, Field(ge=1, le=4096)]
Part = Annotated[str, Field(pattern=r"^(any|[1-9]\d*/[1-9]\d*)$")]

ShippedName = Annotated[
    str,
    WithJsonSchema({"title": "Shipped config", "type": "string", "enum": [path.stem for path in shipped_configs()]}),
]
ConfigPath = Annotated[str, Field(title="YAML file on the worker")]
Config = ShippedName | ConfigPath | RunConfig


@dataclass(frozen=True)
class FlowCall:
    """The parameters that every flow has."""

    config: str | RunConfig
    overrides: tuple[str, ...] = ()
    artifacts: str = DEFAULT_ARTIFACTS

    @staticmethod
    def of(
        config: str | RunConfig,
        overrides: Sequence[str] | None = None,
        artifacts: str | None = None,
        *,
        splits: Sequence[Split] | None = None,
        parts: int | None = None,
    ) -> FlowCall:
        """Collect a flow's parameters; ``splits`` and ``parts`` stand for the overrides that they mean.

        Without ``artifacts`` the store is where WSSS_ARTIFACTS of the worker says, or in ``artifacts``.
        """
        words = list(overrides or ())
        if splits is not None:
            words.append(f"evaluate.splits=[{', '.join(splits)}]")
        if parts is not None:
            words.append(f"runtime.parts={parts}")
        return FlowCall(config, tuple(words), artifacts or os.environ.get("WSSS_ARTIFACTS") or DEFAULT_ARTIFACTS)

    def load(self) -> RunConfig:
        """The config with its overrides.

        Raises:
            ConfigError: it is not valid; with all problems.
        """
        if isinstance(self.config, str):
            return load_named(self.config, self.overrides, self.artifacts)
        values = self.config.model_dump(mode="json", exclude_unset=True)
        return load_values(RunConfig, values, self.overrides, "the config of the form")

    @property
    def invocation(self) -> str:
        """The same behind ``wsss run``; a config that was typed in has a word in its place."""
        config = self.config if isinstance(self.config, str) else f"{self.config.name}.yaml"
        return write_invocation(config, self.overrides, self.artifacts)
