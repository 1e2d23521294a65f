"""The one training loop, for classifier and segmenter: seeds, schedule, mixed precision, exact checkpoint and resume.

Writes ``checkpoint.pt`` under ``out`` while it trains.  A training that was killed continues when it is called again,
and ends with the bytes of an uninterrupted one on the same kind and number of devices.  Randomness has no state that
could be lost: a sample depends on (seed, epoch, sample), the model's random numbers on (seed, step, rank).
Under torchrun every rank calls ``train`` with the same arguments; together they take the steps that one device would.
Torch is imported by the functions, not by the module, so that a config is checked without it.
Shapes: B images, H W pixels of a crop.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from stages.contracts import Progress, Runtime, SilentProgress
from stages.data.batches import TrainingData, iterate_batches
from stages.data.transforms import to_network_input
from stages.errors import EnvironmentFailure, InputError, is_out_of_memory
from stages.ops.devices import autocast, check_precision, deterministic
from stages.ops.step import StepInfo
from stages.training.checkpoints import check_network, load_checkpoint, save_checkpoint
from stages.training.config import TrainingConfig
from stages.training.distributed import is_main, join_ranks, main_first, num_ranks, own_slice, this_rank
from stages.training.randomness import batch_order, step_seed
from stages.training.updates import Pass, StepLosses, WeightAverage, build_optimizer, cut_passes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Objective = Callable[[nn.Module, dict[str, Tensor], StepInfo], dict[str, Tensor]]


@runtime_checkable
class Remembering(Protocol):
    """Keeps something from step to step beside the network, as GAIN keeps its frozen judge: part of the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """What is kept: tensors and plain values, nested."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        ...


class Watch(Remembering, Protocol):
    """Looks at the network now and then while it trains; what it has seen is part of the checkpoint."""

    @property
    def identity(self) -> str:
        """What distinguishes this watch from others, whose checkpoints it could not continue."""
        ...

    @property
    def every_steps(self) -> int:
        """Steps between two looks; there is one after the last step, too."""
        ...

    def look(self, model: nn.Module, step: int) -> None:
        """Look at ``model`` after ``step`` steps and leave it as it is, in training mode; called on every rank.

        Raises:
            InputError: there is no point in going on.
            EnvironmentFailure: the device is out of memory for what is looked at, which the message names.
        """
        ...


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
    watch: Watch | None = None,
    memory: Remembering | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place, from the checkpoint under ``out`` where there is one.

    Args:
        model: Moved to the runtime's device and put into training mode; stays there.
        objective: Called each step with (model, batch, step) inside autocast; returns a dict of scalar tensors of which
            ``"loss"`` is minimised and all are recorded.  The batch has the samples' names: ``"images"`` (uint8
            B H W 3 in the data set) arrives normalised as float32 (B, 3, H, W), all else as it was, on the device.
            On several devices a rank's batch is its slice of the step's, and what is returned are means over its
            images, or over other things with ``stages.ops.collectives.mean_divisor``.  An objective whose mean is over
            the labelled pixels also returns ``"labelled"``, their share of the batch's pixels, which is not recorded:
            with ``accumulate_steps`` the passes are weighed by it, so that the step's mean is over all its pixels.
        dataset: The samples, see ``TrainingData``.
        config: Length, batch, learning rate.
        parameter_groups: Each with "params" and optionally "lr_factor" (default 1) and "weight_decay".
        seed: Decides order and model randomness.
        out: Folder of the checkpoint, which the main rank writes; ``remove_checkpoint`` once the results are there.
        progress: Told about steps and losses, by the main rank.
        runtime: Device, threads, workers and how often to keep a checkpoint; changes no result.
        task: Name of the bar.
        watch: Called every so many steps; where weights are averaged it sees the averaged ones.
        memory: What the objective keeps beside the network.

    Returns:
        About a hundred records {"step", "epoch", "learning_rate", "loss", …}: the means of the losses since the
        record before, and where the training stood after them; the same on every rank.  With ``ema_decay`` the model
        has the averaged weights.

    Raises:
        InputError: a loss is not finite, the watch gives up, the data set is empty or a step has too
            few images for its devices and passes, the first step does not fit into the device's memory, or ``out``
            holds the checkpoint of another training or network.
        EnvironmentFailure: the device is missing, or out of memory after steps that fitted.
    """
    from stages.nets.shared_batch_norm import share_batch_norm
    from stages.ops.collectives import copy_from_first

    progress = progress if is_main() else SilentProgress()
    with join_ranks(runtime) as device, deterministic(device), share_batch_norm(model):
        _check_start(config, dataset, device)
        _place(model, device)
        loop = _Loop(model.train(), objective, config, parameter_groups, seed, len(dataset), device, out, watch, memory)
        loop.resume(progress)
        copy_from_first(model)
        progress.step(task, loop.step, loop.num_steps, unit="steps")
        order = (own_slice(batch) for batch in batch_order(len(dataset), config, seed, start=loop.step))
        batches = iterate_batches(dataset, order, workers=runtime.workers, processes=device.type != "cpu")
        with contextlib.closing(batches), _memory_named(loop):
            loop.run(batches, progress, task, runtime.checkpoint_every_s)
        loop.finish(progress)
    return loop.history


def _place(model: nn.Module, device: torch.device) -> None:
    """Move ``model`` to ``device``, its convolutions with the channels innermost: 5 to 30 % quicker steps on a CPU."""
    import torch

    model.to(device)
    if device.type != "mps":
        # The overload of nn.Module.to for memory formats has no type: it only rearranges 4-D parameters.
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


@contextlib.contextmanager
def _memory_named(loop: _Loop) -> Iterator[None]:
    """Say what a step needs its memory for when the device runs out; a watch reports its own needs."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        config = loop.config
        kind = EnvironmentFailure if loop.step else InputError  # what fitted for a step has lost its memory to others
        crop = "" if loop.crop is None else f" with crops of {loop.crop[0]} x {loop.crop[1]} px"
        passes = "" if config.accumulate_steps == 1 else f" in {config.accumulate_steps} passes"
        raise kind(
            f"{loop.device} is out of memory at batch_size {config.batch_size}{passes}{crop}; raise "
            "training.accumulate_steps (the same batch in several passes), lower training.batch_size or "
            f"augment.crop_px, or use another runtime.device ({str(error).partition(chr(10))[0]})"
        ) from error


def _check_start(config: TrainingConfig, dataset: TrainingData, device: torch.device) -> None:
    if len(dataset) == 0:
        raise InputError("there is no image to train on; check the train list and its labels or masks")
    if min(len(dataset), config.batch_size) < num_ranks():
        raise InputError(
            f"a step has {min(len(dataset), config.batch_size)} images (training.batch_size {config.batch_size}, "
            f"{len(dataset)} to train on), fewer than runtime.devices {num_ranks()}; lower runtime.devices"
        )
    if min(len(dataset), config.batch_size) // num_ranks() < config.accumulate_steps:
        raise InputError(
            f"a step has {min(len(dataset), config.batch_size)} images (training.batch_size {config.batch_size}, "
            f"{len(dataset)} to train on), too few for {config.accumulate_steps} passes on each of {num_ranks()} "
            "devices; lower training.accumulate_steps"
        )
    check_precision(config.precision, device, "training.precision")


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
        watch: Watch | None,
        memory: Remembering | None = None,
    ) -> None:
        import torch

        self.model, self.objective, self.config, self.seed, self.device = model, objective, config, seed, device
        self.out, self.watch = out, watch
        self.kept = {name: each for name, each in (("watch", watch), ("memory", memory)) if each is not None}
        self.average = None if config.ema_decay is None else WeightAverage(model, config.ema_decay)
        self.crop: tuple[int, int] | None = None
        self.num_steps = config.num_steps(num_samples)
        self.per_epoch = config.steps_per_epoch(num_samples)
        self.num_images = min(config.batch_size, num_samples)
        self.record_every = max(1, self.num_steps // 100)
        self.optimizer = build_optimizer(config, parameter_groups, model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.window = _Window()
        self.losses: dict[str, float] = {}
        """Means since the last record of the history, or of that record: what ``progress`` is told."""
        self.unread: tuple[int, dict[str, Tensor]] | None = None
        self.identity = {
            "config": config.model_dump_json(),
            "seed": seed,
            "num_samples": num_samples,
            "num_steps": self.num_steps,
            **({} if watch is None else {"watch": watch.identity}),
        }

    def run(self, batches: Iterator[dict[str, Any]], progress: Progress, task: str, checkpoint_every_s: float) -> None:
        """Take all steps that are left; checkpoint now and then and at the end."""
        saved = time.monotonic()
        for batch in batches:
            losses = self._take_step(batch)
            # The losses of the step before are read only now: an accelerator has the next step queued meanwhile.
            self._read_losses()
            self.unread = (self.step, losses)
            self.step += 1
            if self.average is not None:
                self.average.update(self.model, self.step - 1)
            self._look()
            progress.step(task, self.step, self.num_steps, unit="steps", **self.losses)
            if time.monotonic() - saved >= checkpoint_every_s and self.step < self.num_steps:
                self._save()
                saved = time.monotonic()
        self._save()
        progress.step(task, self.step, self.num_steps, unit="steps", **self.losses)

    def finish(self, progress: Progress) -> None:
        """Leave the model with the weights that are delivered."""
        if self.average is not None:
            self.average.write_into(self.model)
            progress.info(f"the weights are the moving average over the steps (ema_decay {self.average.decay:g})")

    def _look(self) -> None:
        """Show the network to the watch when it is due; the losses are read, and so checked, first."""
        if self.watch is None or (self.step % self.watch.every_steps and self.step < self.num_steps):
            return
        self._read_losses()
        with contextlib.nullcontext() if self.average is None else self.average.shown_by(self.model):
            self.watch.look(self.model, self.step)

    def _to_device(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        if self.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        moved = {
            name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items() if name != "images"
        }
        if "images" in tensors:
            moved["images"] = to_network_input(tensors["images"], self.device)
            self.crop = (moved["images"].shape[2], moved["images"].shape[3])
        return moved

    def _take_step(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        import torch

        from stages.ops.collectives import sum_gradients

        torch.manual_seed(step_seed(self.seed, self.step, this_rank()))
        rate = self.config.learning_rate_at(self.step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        info = StepInfo(self.step, self.num_steps, self.step // self.per_epoch, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        losses = StepLosses(self.config.accumulate_steps)
        for one in cut_passes(batch, self.config.accumulate_steps, self.num_images):
            self._take_pass(one, info, losses)
        sum_gradients(self.model.parameters())
        losses.scale_gradients(self.model.parameters())
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses.means()

    def _take_pass(self, one: Pass, info: StepInfo, losses: StepLosses) -> None:
        """Add the gradient of one part of the step's batch."""
        batch = self._to_device(one.batch)
        with autocast(self.device.type, self.config.precision):
            found = dict(self.objective(self.model, batch, info))
        loss = found["loss"]
        weight = losses.add(found, one)
        self.scaler.scale(loss * (one.rank_share * weight)).backward()

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
        self.losses = self.window.means()
        if (step + 1) % self.record_every == 0 or step + 1 == self.num_steps:
            rate = self.config.learning_rate_at(step, self.num_steps)
            where = {"step": step + 1, "epoch": (step + 1) / self.per_epoch, "learning_rate": rate}
            self.history.append({**where, **self.losses})
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
        if self.average is not None:
            state["average"] = self.average.tensors
        state |= {name: each.state_dict() for name, each in self.kept.items()}
        save_checkpoint(self.out, self.identity, state)

    def resume(self, progress: Progress) -> None:
        """Take over the checkpoint under ``out``, where there is one."""
        with main_first():  # it sets a damaged checkpoint aside before the others look
            state = load_checkpoint(self.out, self.identity, progress)
        if state is None:
            return
        check_network(self.out, self.model.state_dict(), state["model"])
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load(state["average"])
        for name, each in self.kept.items():
            each.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        self.window = _Window(**state["window"])
        progress.info(f"resumed after step {self.step} of {self.num_steps}")
