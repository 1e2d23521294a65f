"""What runs a stage and what it gives back: its config, runtime, part, progress and result."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema


class StageConfig(BaseModel):
    """Base of every config class: unknown keys are refused, instances are immutable.

    The docstrings of the options stand in the JSON schema, and so in forms made of it.  They are read from the source
    only then (``option_texts``): pydantic's own way costs every command a sixth of a second.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema with the options' docstrings as their descriptions."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in option_texts(cls).items():
            if name in properties:
                properties[name].setdefault("description", text)
        return schema


@cache
def option_texts(config: type[BaseModel]) -> dict[str, str]:
    """The docstring under each option of a config class and of its bases; none where there is no source to read."""
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not issubclass(base, StageConfig):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, SyntaxError):
            continue
        for option, text in itertools.pairwise(getattr(tree, "body", ())):
            is_option = isinstance(option, ast.AnnAssign) and isinstance(option.target, ast.Name)
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if is_option and is_text and isinstance(text.value.value, str):
                texts[option.target.id] = inspect.cleandoc(text.value.value)
    return texts


class Progress(Protocol):
    """Where a stage reports to; the terminal, Prefect and tests each bring their own."""

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        """``done`` of ``total`` units of ``task`` are finished; ``values`` are shown beside the bar (loss=…).

        Called as often as the stage likes, first with what was there already: listeners draw as seldom as they like.
        """
        ...

    def info(self, text: str) -> None:
        """Say one line."""
        ...

    def warn(self, text: str) -> None:
        """Say one line that the user should not miss; kept in the run's result."""
        ...


class SilentProgress:
    """A Progress that says nothing and keeps the warnings (notebooks and tests)."""

    def __init__(self) -> None:
        """Start with no warnings."""
        self.warnings: list[str] = []

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        """Ignore."""

    def info(self, text: str) -> None:
        """Ignore."""

    def warn(self, text: str) -> None:
        """Keep ``text``."""
        self.warnings.append(text)


class Runtime(StageConfig):
    """How to run, not what to compute: no field is in a key.

    Another kind or number of devices moves the last bits of float arithmetic.  Where ``crf.backend`` is auto,
    ``device`` decides what it means, and the key names that.
    """

    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto takes cuda, then mps, then cpu."""
    workers: int = Field(default=2, ge=0, le=128)
    """Data loading processes; 0 loads in the main process."""
    processes: int = Field(default=0, ge=0, le=512)
    """Processes for per-image CPU work such as the CRF; 0 means one per core."""
    threads: int = Field(default=0, ge=0, le=512)
    """Torch threads; 0 leaves torch's default."""
    devices: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = 1
    """Devices of this machine that one training is spread over, and that attention and masks are shared out to, a
    process each; auto takes every CUDA device that this process may see."""
    checkpoint_every_s: float = Field(default=30.0, ge=0, le=86_400)
    """Seconds of training that a kill may cost; 0 keeps a checkpoint of every step."""
    parts: int = Field(default=1, ge=1, le=4096)
    """Parts that attention and masks are made in; with more than one, every process that reaches the same store, here
    or on another machine, can take free parts and so share the work (``wsss stage … --part``)."""


@dataclass(frozen=True)
class Part:
    """One of ``count`` parts that a stage's work is cut into; everything is in exactly one of them."""

    index: int
    """0 … count - 1."""
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"a part is numbered 0 … {self.count - 1}, got {self.index}")

    def positions(self, total: int) -> range:
        """Which of ``total`` things are this part's: neighbours, as many as another part's or one more or less."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)


@dataclass(frozen=True)
class StageResult:
    """What a stage returns beside the files it wrote under ``out``."""

    metrics: dict[str, Any] = field(default_factory=dict)
    """Flat dotted names to floats in [0, 1] (or dicts of them), e.g. ``{"masks.coverage": 0.93}``."""
    mask_supervision: tuple[str, ...] = ()
    """Ids of the training images whose pixel masks were used."""
