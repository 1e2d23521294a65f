"""Every random number of a training as a pure function of where it is drawn, without a state that could be lost.

Reads and writes nothing.  Torch is imported by the functions only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from stages.data.batches import Keys
from stages.training.config import TrainingConfig


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """Seed of one sample's augmentation, 0 … 2**32 - 1: the same for every reader."""
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
