"""The one training loop, for classifier and segmenter: seeds, schedule, mixed precision, exact checkpoint and resume.

Writes ``checkpoint.pt`` under ``out`` while it trains.  Killed at any step and called again it continues, and ends with
the bytes of an uninterrupted training on the same kind and number of devices.  Randomness has no state that could be
lost: the data of a sample depend on (seed, epoch, sample), the model's random numbers on (seed, step, rank).
Under torchrun every rank calls ``train`` with the same arguments; together they take the steps that one device would.
Torch is imported by the functions, not by the module, so that a config is checked without it.
Shapes: B images, H W pixels of a crop.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.checkpoints import load_checkpoint, remove_checkpoint, save_checkpoint
from stages.contracts import Progress, Runtime, SilentProgress, StageConfig
from stages.data.batches import Keys, TrainingData, iterate_batches
from stages.data.transforms import to_network_input
from stages.devices import deterministic, resolve_device
from stages.distributed import is_main, join_ranks, main_first, num_ranks, own_slice, this_rank
from stages.errors import ConfigError, EnvironmentFailure, InputError
from stages.ops.step import StepInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Objective = Callable[[nn.Module, dict[str, Tensor], StepInfo], dict[str, Tensor]]

__all__ = [
    "TrainingConfig",
    "batch_order",
    "remove_checkpoint",
    "resolve_device",
    "sample_seed",
    "seed_initial_weights",
    "step_seed",
    "train",
]


class TrainingConfig(StageConfig):
    """How long and how fast to train: SGD with momentum and a learning rate schedule."""

    epochs: float | None = Field(default=None, gt=0, le=10_000)
    """Passes over the data; give this or ``steps``."""
    steps: int | None = Field(default=None, gt=0, le=100_000_000)
    """Parameter updates; give this or ``epochs``."""
    batch_size: int = Field(default=10, ge=1, le=4096)
    """Images per step, over all devices together."""
    learning_rate: float = Field(default=1e-3, gt=0, le=100)
    """Of the backbone, at the start."""
    head_lr_factor: float = Field(default=10.0, gt=0, le=1000)
    """Learning rate of the new layers over the backbone's."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    nesterov: bool = False
    schedule: Literal["poly", "step", "constant"] = "poly"
    """poly: (1 - step / steps) ** poly_power; step: x step_factor every step_every steps."""
    poly_power: float = Field(default=0.9, gt=0, le=10)
    step_every: int | None = Field(default=None, gt=0)
    """Steps between two drops of the ``step`` schedule."""
    step_factor: float = Field(default=0.1, gt=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    """First steps over which the learning rate rises linearly to the schedule's."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the forward pass; the weights stay fp32. fp16 needs CUDA."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest L2 norm of the whole gradient; None never clips."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give exactly one of epochs and steps, got epochs={self.epochs}, steps={self.steps}")
        if self.schedule == "step" and self.step_every is None:
            raise ValueError("schedule 'step' needs step_every, the number of steps between two drops")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

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


# ---------------------------------------------------------------------------------------------------------------------
# Randomness
# ---------------------------------------------------------------------------------------------------------------------


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """Seed of one sample's augmentation, 0 … 2**32 - 1: whoever reads it, whenever."""
    return _derive("sample", seed, epoch, sample) % 2**32


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of the model's random numbers (dropout …) in one step, 0 … 2**63 - 1."""
    return _derive("step", seed, step, rank)


def seed_initial_weights(seed: int) -> None:
    """Seed torch before a network with random layers is built."""
    import torch

    torch.manual_seed(_derive("initial weights", seed))


def _derive(purpose: str, *numbers: int) -> int:
    digest = hashlib.sha256(repr((purpose, *numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batch_order(num_samples: int, config: TrainingConfig, seed: int, *, start: int = 0) -> Iterator[Keys]:
    """Yield the samples of each step from ``start`` to the last, as (epoch, index).

    The order of an epoch is a permutation that depends on (seed, epoch).  An incomplete last batch is left out, except
    in a data set smaller than one batch, whose only batch has every sample.
    """
    import numpy as np

    per_epoch = config.steps_per_epoch(num_samples)
    order, order_epoch = np.arange(0), -1
    for step in range(start, config.num_steps(num_samples)):
        epoch, position = divmod(step, per_epoch)
        if epoch != order_epoch:
            order, order_epoch = np.random.default_rng(_derive("order", seed, epoch)).permutation(num_samples), epoch
        first = position * config.batch_size
        yield [(epoch, int(index)) for index in order[first : first + config.batch_size]]


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    *,
    objective: Objective,
    dataset: TrainingData,
    config: TrainingConfig,
    parameter_groups: Sequence[Mapping[str, Any]],
    seed: int,
    out: Path,
    progress: Progress,
    runtime: Runtime,
    task: str = "train",
) -> list[dict[str, float]]:
    """Train ``model`` in place, from the checkpoint under ``out`` where there is one.

    Args:
        model: Moved to the runtime's device and put into training mode; stays there.
        objective: Called each step with (model, batch, step) inside autocast; returns a dict of scalar tensors of which
            ``"loss"`` is minimised and all are recorded.  The batch has the samples' names: ``"images"`` (uint8
            B H W 3 in the data set) arrives normalised as float32 (B, 3, H, W), all else as it was, on the device.
            On several devices a rank's batch is its slice of the step's, and what is returned are means over its
            images, or over other things with ``stages.ops.collectives.mean_divisor``.
        dataset: The samples, see ``TrainingData``.
        config: Length, batch, learning rate.
        parameter_groups: Each with "params" and optionally "lr_factor" (default 1) and "weight_decay".
        seed: Decides order and model randomness.
        out: Folder of the checkpoint, which the main rank writes; ``remove_checkpoint`` when the results are written.
        progress: Told about steps and losses, by the main rank.
        runtime: Device, threads, workers and how often to keep a checkpoint; changes no result.
        task: Name of the bar.

    Returns:
        About a hundred records {"step", "epoch", "learning_rate", "loss", …}: the means of the losses since the
        record before, and where the training stood after them; the same on every rank.

    Raises:
        InputError: a loss is not finite, the data set is empty or has fewer images than there are devices, or ``out``
            holds the checkpoint of another training.
        EnvironmentFailure: the device is missing or out of memory.
    """
    import torch

    from stages.nets.shared_batch_norm import share_batch_norm
    from stages.ops.collectives import copy_from_first

    progress = progress if is_main() else SilentProgress()
    with join_ranks(runtime) as device, deterministic(device), share_batch_norm(model):
        _check_start(config, dataset, device)
        _place(model, device)
        loop = _Loop(model.train(), objective, config, parameter_groups, seed, len(dataset), device, out)
        loop.resume(progress)
        copy_from_first(model)
        progress.begin(task, total=loop.num_steps, done=loop.step, unit="steps")
        order = (own_slice(batch) for batch in batch_order(len(dataset), config, seed, start=loop.step))
        batches = iterate_batches(dataset, order, workers=runtime.workers, processes=device.type != "cpu")
        with contextlib.closing(batches):
            try:
                loop.run(batches, progress, runtime.checkpoint_every_s)
            except torch.OutOfMemoryError as error:
                raise EnvironmentFailure(
                    f"{device} is out of memory at batch_size {config.batch_size}; lower training.batch_size or "
                    f"augment.crop_px, or use another runtime.device ({error})"
                ) from error
    return loop.history


def _place(model: nn.Module, device: torch.device) -> None:
    """Move ``model`` to ``device``, its convolutions with the channels innermost: 5 to 30 % quicker steps on a CPU."""
    import torch

    model.to(device)
    if device.type != "mps":
        # The overload of nn.Module.to for memory formats has no type: it only rearranges 4-D parameters.
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _check_start(config: TrainingConfig, dataset: TrainingData, device: torch.device) -> None:
    if len(dataset) == 0:
        raise InputError("there is no image to train on; check the train list and its labels or masks")
    if min(len(dataset), config.batch_size) < num_ranks():
        raise InputError(
            f"a step has {min(len(dataset), config.batch_size)} images (training.batch_size {config.batch_size}, "
            f"{len(dataset)} to train on), fewer than runtime.devices {num_ranks()}; lower runtime.devices"
        )
    if config.precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"training.precision fp16 needs CUDA, found {device.type}; use fp32 or bf16")


@dataclass
class _Window:
    """Sums of the losses since the last record of the history."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def means(self) -> dict[str, float]:
        return {name: value / self.count for name, value in self.sums.items()}


class _Loop:
    """The state of one training and its steps."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: TrainingConfig,
        parameter_groups: Sequence[Mapping[str, Any]],
        seed: int,
        num_samples: int,
        device: torch.device,
        out: Path,
    ) -> None:
        import torch

        self.model, self.objective, self.config, self.seed, self.device = model, objective, config, seed, device
        self.out = out
        self.num_steps = config.num_steps(num_samples)
        self.per_epoch = config.steps_per_epoch(num_samples)
        self.num_images = min(config.batch_size, num_samples)
        self.record_every = max(1, self.num_steps // 100)
        self.optimizer = _build_optimizer(config, parameter_groups)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.window = _Window()
        self.unread: tuple[int, dict[str, Tensor]] | None = None
        self.identity = {
            "config": config.model_dump_json(),
            "seed": seed,
            "num_samples": num_samples,
            "num_steps": self.num_steps,
        }

    def run(self, batches: Iterator[dict[str, Any]], progress: Progress, checkpoint_every_s: float) -> None:
        """Take all steps that are left; checkpoint now and then and at the end."""
        ticker = _Ticker(progress)
        saved = time.monotonic()
        for batch in batches:
            losses = self._take_step(self._to_device(batch))
            # The losses of the step before are read only now: an accelerator has the next step queued meanwhile.
            self._read_losses()
            self.unread = (self.step, losses)
            self.step += 1
            ticker.step(self.window)
            if time.monotonic() - saved >= checkpoint_every_s and self.step < self.num_steps:
                self._save()
                saved = time.monotonic()
        self._save()
        ticker.flush(self.window)

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        if self.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        moved = {
            name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items() if name != "images"
        }
        if "images" in tensors:
            moved["images"] = to_network_input(tensors["images"], self.device)
        return moved

    def _take_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        import torch

        from stages.ops.collectives import sum_gradients, sum_losses

        torch.manual_seed(step_seed(self.seed, self.step, this_rank()))
        rate = self.config.learning_rate_at(self.step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        info = StepInfo(self.step, self.num_steps, self.step // self.per_epoch, self.device)
        precision = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype=precision, enabled=self.config.precision != "fp32"):
            losses = self.objective(self.model, batch, info)
        self.optimizer.zero_grad(set_to_none=True)
        share = len(next(iter(batch.values()))) / self.num_images  # of the step's images; 1 on one device
        self.scaler.scale(losses["loss"] * share).backward()
        sum_gradients(self.model.parameters())
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return sum_losses({name: value.detach() for name, value in losses.items()}, share)

    def _read_losses(self) -> None:
        """Check and record the losses of the last step that was not read yet."""
        if self.unread is None:
            return
        step, tensors = self.unread
        self.unread = None
        values = {name: float(value) for name, value in tensors.items()}
        if not all(math.isfinite(value) for value in values.values()):
            raise InputError(self._explain_not_finite(step, values))
        self.window.add(values)
        if (step + 1) % self.record_every == 0 or step + 1 == self.num_steps:
            rate = self.config.learning_rate_at(step, self.num_steps)
            where = {"step": step + 1, "epoch": (step + 1) / self.per_epoch, "learning_rate": rate}
            self.history.append({**where, **self.window.means()})
            self.window = _Window()

    def _explain_not_finite(self, step: int, values: Mapping[str, float]) -> str:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        remedies = [f"lower training.learning_rate (now {self.config.learning_rate:g})"]
        if self.config.clip_norm is None:
            remedies.append("set training.clip_norm (10, say)")
        if self.config.precision != "fp32":
            remedies.append(f"use training.precision fp32 instead of {self.config.precision}")
        return f"the loss is not finite at step {step + 1} of {self.num_steps} ({terms}); {', or '.join(remedies)}"

    def _save(self) -> None:
        """Write the whole state; its losses are read, and so checked, first.  Every rank has the same state."""
        self._read_losses()
        if not is_main():
            return
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "window": {"sums": self.window.sums, "count": self.window.count},
        }
        save_checkpoint(self.out, self.identity, state)

    def resume(self, progress: Progress) -> None:
        """Take over the checkpoint under ``out``, where there is one."""
        with main_first():  # it sets a damaged checkpoint aside before the others look
            state = load_checkpoint(self.out, self.identity, progress)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        self.window = _Window(**state["window"])
        progress.info(f"resumed after step {self.step} of {self.num_steps}")


def _build_optimizer(config: TrainingConfig, groups: Sequence[Mapping[str, Any]]) -> torch.optim.SGD:
    import torch

    trained = [
        {**group, "params": [p for p in group["params"] if p.requires_grad], "lr_factor": group.get("lr_factor", 1.0)}
        for group in groups
    ]
    return torch.optim.SGD(
        [group for group in trained if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


class _Ticker:
    """Tells the progress a few times a second instead of at each step."""

    def __init__(self, progress: Progress, every_s: float = 0.25) -> None:
        self.progress, self.every_s = progress, every_s
        self.count, self.told = 0, time.monotonic()

    def step(self, window: _Window) -> None:
        self.count += 1
        if time.monotonic() - self.told >= self.every_s:
            self.flush(window)

    def flush(self, window: _Window) -> None:
        if self.count:
            self.progress.advance(self.count, **(window.means() if window.count else {}))
        self.count, self.told = 0, time.monotonic()
