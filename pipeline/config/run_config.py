"""The config of a run: one YAML file, one section per stage, checked without torch and without Prefect.

Reads YAML files; writes nothing.  Paths in a config are relative to the working directory of the command; ``~`` and
``$VAR`` mean what they mean in a shell.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from pipeline.config.yaml_models import did_you_mean, load_model
from stages.contracts import Runtime, StageConfig, expand_path
from stages.data.config import DataConfig
from stages.errors import ConfigError
from stages.evaluate import EvaluateConfig
from stages.make_attention import MakeAttentionConfig
from stages.make_masks import MakeMasksConfig
from stages.prepare_data import PrepareDataConfig
from stages.train_classifier import TrainClassifierConfig
from stages.train_segmenter import TrainSegmenterConfig

LAST = "last"
"""Means the newest run."""


def name_problem(name: str) -> str | None:
    """Why no run can be called ``name``, which would be read as something else; None where it can."""
    if name.casefold() == LAST:
        return f"'{name}' means the newest run in every command; give the run another name"
    if name.casefold().endswith((".yaml", ".yml", ".json")):
        return f"'{name}' would be read as a file; leave {name[name.rindex('.') :]} out"
    return None


class RunConfig(StageConfig):
    """Everything that one run needs; each section belongs to the stage of the same name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Name of the run, used in file names: letters, digits, dot, dash and underscore."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of both trainings."""
    data: DataConfig
    """The data set: format voc, custom, synthetic, cub or imagenet, and where it lies."""
    weights: dict[str, Path] = Field(default_factory=dict)
    """Backbone name to a file of ImageNet weights (.pth or .safetensors); without an entry they are downloaded.
    ``classifier``: the ``classifier.safetensors`` of an earlier run to go on from."""
    prepare_data: PrepareDataConfig = Field(default_factory=PrepareDataConfig)
    """Index and check the images."""
    train_classifier: TrainClassifierConfig
    """Train on image-level labels."""
    make_attention: MakeAttentionConfig = Field(default_factory=MakeAttentionConfig)
    """Attention maps of the training images."""
    make_masks: MakeMasksConfig
    """Pseudo-masks from attention maps."""
    train_segmenter: TrainSegmenterConfig
    """Train on pseudo-masks, or on true masks with ``supervision: full``."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """Scores on val, and on train where true masks exist."""
    runtime: Runtime = Field(default_factory=Runtime)
    """How to run; changes no result and is in no key."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Who else follows the run's curves and numbers; changes no result and is in no key."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if problem := name_problem(name):
            raise ValueError(problem)
        return name


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the config at ``path`` with ``overrides`` (``a.b=value``, the ``--set`` of the command line).

    Raises:
        ConfigError: with every problem: dotted path, found value, what is allowed, nearest valid spelling, file:line.
    """
    return load_model(RunConfig, path, overrides)


def find_config(name: str) -> Path:
    """The file that ``name`` means: a path, or the name of a shipped config with or without ``.yaml``.

    Raises:
        ConfigError: there is no such file and no such shipped config.
    """
    path = expand_path(name)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in shipped_configs()}
    if path.parent == Path() and path.name.removesuffix(".yaml") in shipped:
        return shipped[path.name.removesuffix(".yaml")]
    if path.is_dir():
        raise ConfigError(f"{name} is a folder; name a YAML config inside it")
    names = ", ".join(shipped) or "none"
    guess = did_you_mean(path.name.removesuffix(".yaml"), list(shipped))
    raise ConfigError(f"there is no config file {name}{guess or ';'} shipped configs: {names}")


def shipped_configs() -> list[Path]:
    """The YAML files that come with wsss, sorted by name."""
    package = Path(__file__).parents[1]
    folder = package / "_configs"
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "configs"  # a checkout: the wheel maps configs/ to pipeline/_configs
    return sorted(folder.glob("*.yaml"))
