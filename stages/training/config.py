"""How a network is trained, as a config says it: length, batch, learning rate, precision.  Torch-free.

Reads and writes nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.contracts import StageConfig
from stages.ops.devices import Precision


class TrainingConfig(StageConfig):
    """How long and how fast to train: SGD with momentum and a learning rate schedule."""

    epochs: float | None = Field(default=None, gt=0, le=10_000)
    """Passes over the data; give this or ``steps``."""
    steps: int | None = Field(default=None, gt=0, le=100_000_000)
    """Parameter updates; give this or ``epochs``."""
    batch_size: int = Field(default=10, ge=1, le=4096)
    """Images per step, over all devices together."""
    accumulate_steps: int = Field(default=1, ge=1, le=4096)
    """Passes that a step's batch is computed in, one after the other, to save memory: the step is still that of the
    whole batch, but BatchNorm in training mode measures each pass alone."""
    learning_rate: float = Field(default=1e-3, gt=0, le=100)
    """Of the backbone, at the start."""
    head_lr_factor: float = Field(default=10.0, gt=0, le=1000)
    """Learning rate of the new layers over the backbone's."""
    bias_lr_factor: float = Field(default=1.0, gt=0, le=1000)
    """Learning rate of a layer's bias over its weights'; 2 in Caffe's recipes (BatchNorm's offsets are no biases)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    bias_weight_decay: bool = True
    """Whether biases decay too; not in Caffe's recipes."""
    nesterov: bool = False
    schedule: Literal["poly", "step", "constant"] = "poly"
    """poly: (1 - step / steps) ** poly_power; step: x step_factor every step_every steps."""
    poly_power: float = Field(default=0.9, gt=0, le=10)
    step_every: int | None = Field(default=None, gt=0)
    """Steps between two drops of the ``step`` schedule."""
    step_factor: float = Field(default=0.1, gt=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    """First steps over which the learning rate rises linearly to the schedule's."""
    precision: Precision = "fp32"
    """Of the forward pass; the weights stay fp32. fp16 needs CUDA."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest L2 norm of the whole gradient; None does not clip."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Deliver a moving average of the weights instead of the last ones: the share of the average that each step keeps
    (0.999, say; less in the first steps).  None delivers the last weights."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give exactly one of epochs and steps, got epochs={self.epochs}, steps={self.steps}")
        if self.schedule == "step" and self.step_every is None:
            raise ValueError("schedule 'step' needs step_every, the number of steps between two drops")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        if self.accumulate_steps > self.batch_size:
            raise ValueError(
                f"a step of batch_size {self.batch_size} cannot be computed in {self.accumulate_steps} passes; lower "
                "accumulate_steps (batch_size counts all images of a step)"
            )
        return self

    @property
    def max_devices(self) -> int:
        """Devices that a step can be spread over: each needs an image in every pass."""
        return self.batch_size // self.accumulate_steps

    def steps_per_epoch(self, num_samples: int) -> int:
        """Whole batches in ``num_samples``; the rest waits for another epoch's order.  At least one."""
        return max(1, num_samples // self.batch_size)

    def num_steps(self, num_samples: int) -> int:
        """Parameter updates of a training on ``num_samples`` samples."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 0) * self.steps_per_epoch(num_samples)))

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of ``step`` (0 … num_steps - 1), for a parameter group of factor 1."""
        rate = self.learning_rate
        if self.schedule == "poly":
            rate *= (1 - step / num_steps) ** self.poly_power
        elif self.schedule == "step" and self.step_every is not None:
            rate *= self.step_factor ** (step // self.step_every)
        if step < self.warmup_steps:
            rate *= (step + 1) / self.warmup_steps
        return rate
