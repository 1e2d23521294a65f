"""The table of the fake stages, and their run config."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fake_stages.collect import CollectConfig, Mischief
from fake_stages.combine import CombineConfig
from pipeline.engine.stage_table import DataState, StageSpec, StageTable
from stages.contracts import Progress, StageConfig
from stages.errors import ConfigError


class FakeRun(StageConfig):
    name: str = "fake"
    digest: str = "d"
    root: Path | None = None
    is_checked: bool = False
    collect: CollectConfig = Field(default_factory=CollectConfig)
    combine: CombineConfig = Field(default_factory=CombineConfig)
    runtime: Mischief = Field(default_factory=Mischief)
    track: tuple[str, ...] = ()


def check(run: FakeRun, progress: Progress) -> None:
    """The check before the first stage, in a child."""
    progress.info("checked")
    if run.combine.factor < 0:
        raise ConfigError("factor is negative", [f"combine.factor: {run.combine.factor}"])


TABLE = StageTable(
    location="fake_stages.table:TABLE",
    run_type=FakeRun,
    read_data=lambda run, cache_file: DataState(run.root),
    needs_check=lambda run, stages: run.is_checked and "combine" in stages,
    check=check,
    specs=(
        StageSpec(
            name="collect",
            inputs=lambda run: (),
            key_parts=lambda run, data: {"config": run.collect.model_dump(mode="json"), "digest": run.digest},
            arguments=lambda call: {"config": call.run.collect},
            package="fake_stages",
            num_units=lambda call: call.run.collect.items,
            on_devices=lambda run: True,
        ),
        StageSpec(
            name="combine",
            inputs=lambda run: ("collect",),
            key_parts=lambda run, data: {"config": run.combine.model_dump(mode="json")},
            arguments=lambda call: {
                "config": call.run.combine,
                "collected": call.inputs["collect"],
                "data_root": call.data_root,
            },
            package="fake_stages",
        ),
        StageSpec(
            name="finish",
            inputs=lambda run: ("combine",) if run.combine.is_used else ("collect",),
            key_parts=lambda run, data: {},
            arguments=lambda call: {"combined": call.inputs.get("combine"), "exclude": call.exclude},
            package="fake_stages",
        ),
    ),
)
