"""The table of the fake training, and its run config."""

from __future__ import annotations

from pydantic import Field

from fake_training.learn import LearnConfig, Mischief
from pipeline.engine.stage_table import DataState, StageSpec, StageTable
from stages.contracts import StageConfig


class FakeRun(StageConfig):
    name: str = "fake"
    learn: LearnConfig = Field(default_factory=LearnConfig)
    runtime: Mischief = Field(default_factory=Mischief)


TABLE = StageTable(
    location="fake_training.table:TABLE",
    run_type=FakeRun,
    read_data=lambda run, cache_file: DataState(),
    specs=(
        StageSpec(
            name="learn",
            inputs=lambda run: (),
            key_parts=lambda run, data: {"config": run.learn.model_dump(mode="json")},
            arguments=lambda call: {"config": call.run.learn},
            package="fake_training",
        ),
    ),
)
