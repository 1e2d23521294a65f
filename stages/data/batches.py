"""Read training samples ahead of the network, in a fixed order, whatever the number of workers.

A sample is what ``dataset.get(index, epoch)`` returns: a dict of arrays.  A batch is the same dict with the samples
stacked along a new first axis.  Imports no torch.

Threads serve a network on the CPU: they start at once, share memory, and decoding and cropping release the GIL.
Processes serve an accelerator, whose Python thread must not wait for the GIL; they never come from a plain fork, which
could hang in locks that another thread of the parent held.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.errors import EnvironmentFailure

Sample = dict[str, NDArray[Any]]
Keys = Sequence[tuple[int, int]]
"""The samples of one batch as (epoch, index)."""


class TrainingData(Protocol):
    """What a training reads; picklable, and safe to share between threads."""

    def __len__(self) -> int:
        """Number of samples in one epoch."""
        ...

    def get(self, index: int, epoch: int) -> Sample:
        """The sample ``index`` as ``epoch`` sees it: a pure function of both, of equal shapes for all samples."""
        ...


def read_batch(dataset: TrainingData, keys: Keys) -> Sample:
    """Read the samples of ``keys`` and stack them."""
    samples = [dataset.get(index, epoch) for epoch, index in keys]
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def iterate_batches(
    dataset: TrainingData, order: Iterable[Keys], *, workers: int, processes: bool = False
) -> Generator[Sample]:
    """Yield the batches of ``order``, read ahead by ``workers``.

    Args:
        dataset: The samples.
        order: The keys of each batch, in the order of the batches.
        workers: Number of threads or processes; 0 reads in the caller's thread when a batch is asked for.
        processes: Read in processes instead of threads.

    Yields:
        Batches in ``order``, the same for every ``workers`` and ``processes``.

    Raises:
        EnvironmentFailure: a worker process died.
        Exception: whatever ``dataset.get`` raises, at the batch that raised it.
    """
    if workers == 0:
        yield from (read_batch(dataset, keys) for keys in order)
        return
    pool = _process_pool(dataset, workers) if processes else ThreadPoolExecutor(workers, "read-batches")
    try:
        yield from _read_ahead(pool, dataset, order, ahead=2 * workers, processes=processes)
    except BrokenProcessPool as error:
        raise EnvironmentFailure(
            "a process that reads training images died (killed for memory?); lower runtime.workers, or set it to 0"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_ahead(
    pool: Executor, dataset: TrainingData, order: Iterable[Keys], *, ahead: int, processes: bool
) -> Iterator[Sample]:
    pending: deque[Future[Sample]] = deque()
    for keys in order:
        pending.append(pool.submit(_read_in_process, keys) if processes else pool.submit(read_batch, dataset, keys))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _process_pool(dataset: TrainingData, workers: int) -> ProcessPoolExecutor:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process, initargs=(dataset,))


_process_dataset: TrainingData | None = None


def _start_process(dataset: TrainingData) -> None:
    """Keep the data set, and end with the parent: a killed parent cannot tell its workers to stop."""
    global _process_dataset
    _process_dataset = dataset
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read_in_process(keys: Keys) -> Sample:
    if _process_dataset is None:
        raise RuntimeError("the worker process was not initialised")
    return read_batch(_process_dataset, keys)
