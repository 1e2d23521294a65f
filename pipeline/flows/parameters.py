"""What the parameters of a flow mean: the config of a run, from a file, a shipped name or values typed into a form.

Imports no Prefect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.config.run_config import RunConfig, find_config, load_config
from pipeline.config.yaml_models import load_values
from pipeline.engine.invocation import DEFAULT_ARTIFACTS, write_invocation

StageName = Literal["prepare_data", "train_classifier", "make_attention", "make_masks", "train_segmenter", "evaluate"]
"""The stages, for the form's menu; a test compares them with the table's."""
ShardedStage = Literal["make_attention", "make_masks"]
"""The stages that work in parts."""
Split = Literal["val", "test"]

STAGE_NAMES: tuple[str, ...] = get_args(StageName)


@dataclass(frozen=True)
class FlowCall:
    """The parameters that every flow has."""

    config: str | RunConfig
    overrides: tuple[str, ...] = ()
    artifacts: str = DEFAULT_ARTIFACTS

    @staticmethod
    def of(
        config: str | RunConfig,
        overrides: Sequence[str] | None,
        artifacts: str,
        *,
        splits: Sequence[Split] | None = None,
        shards: int | None = None,
    ) -> FlowCall:
        """Collect a flow's parameters; ``splits`` and ``shards`` stand for the overrides that they mean."""
        words = list(overrides or ())
        if splits is not None:
            words.append(f"evaluate.splits=[{', '.join(splits)}]")
        if shards is not None:
            words.append(f"runtime.shards={shards}")
        return FlowCall(config, tuple(words), artifacts)

    def load(self) -> RunConfig:
        """The config with its overrides.

        Raises:
            ConfigError: it is not valid; with all problems.
        """
        if isinstance(self.config, str):
            return load_config(find_config(self.config), self.overrides)
        values = self.config.model_dump(mode="json", exclude_unset=True)
        return load_values(RunConfig, values, self.overrides, "the config of the form")

    @property
    def invocation(self) -> str:
        """The same behind ``wsss run``; a config that was typed in has a word in its place."""
        config = self.config if isinstance(self.config, str) else f"{self.config.name}.yaml"
        return write_invocation(config, self.overrides, self.artifacts)
