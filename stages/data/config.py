"""The data section of a run's config: one of the adapters, told apart by ``format``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stages.data.adapters.cub import CubConfig
from stages.data.adapters.custom import CustomConfig
from stages.data.adapters.imagenet import ImageNetConfig
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.voc import VocConfig

DataConfig = Annotated[
    VocConfig | CustomConfig | SyntheticConfig | CubConfig | ImageNetConfig, Field(discriminator="format")
]
"""Any data set that wsss reads or makes."""


def data_root(config: DataConfig) -> Path | None:
    """The folder of the user's data; None for the synthetic set, which prepare_data generates below its own output."""
    return None if isinstance(config, SyntheticConfig) else config.root
