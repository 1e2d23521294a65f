"""Per-image CPU work over processes: results in order, memory flat, errors with their own message.

A worker that needs no torch starts in milliseconds, so the stages that use this keep their modules free of it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from stages.errors import EnvironmentFailure

ContextT = TypeVar("ContextT")
JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

_shared: dict[str, Any] = {}
"""In a worker: the context that every job shares, sent once."""


def num_processes(requested: int) -> int:
    """How many processes ``Runtime.processes`` means: 0 is one per core that this process may use."""
    if requested > 0:
        return requested
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ordered(
    function: Callable[[ContextT, JobT], ResultT],
    jobs: Iterable[JobT],
    *,
    context: ContextT,
    processes: int,
    in_flight: int = 4,
) -> Iterator[ResultT]:
    """Yield ``function(context, job)`` for every job, in the jobs' order.

    Args:
        function: A function of a module, so that it can be sent to a worker; must not depend on the order of jobs.
        jobs: Taken lazily, in this process.
        context: What all jobs share; sent to each worker once.
        processes: Number of workers; 1 works in this process.
        in_flight: Jobs per process that wait, run, or are done and not yet taken: enough to keep all processes busy,
            few enough to keep memory flat.

    Yields:
        The results.

    Raises:
        EnvironmentFailure: a worker was killed; any error of ``function`` comes through unchanged.
    """
    if processes <= 1:
        yield from (function(context, job) for job in jobs)
        return
    executor = ProcessPoolExecutor(
        processes,
        mp_context=_start_method(function.__module__),
        initializer=_start_worker,
        initargs=(context,),
    )
    try:
        _launch(executor)
        yield from take_in_order(executor, functools.partial(_work, function), jobs, limit=processes * in_flight)
    except BrokenProcessPool as error:
        raise EnvironmentFailure(
            f"a worker process of {function.__name__} was killed, most likely for memory; "
            f"lower runtime.processes (now {processes}) and run again: finished images are kept"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def take_in_order(
    executor: Executor, work: Callable[[JobT], ResultT], jobs: Iterable[JobT], *, limit: int
) -> Iterator[ResultT]:
    """Yield ``work(job)`` in the jobs' order with at most ``limit`` of them under way or waiting to be taken."""
    pending: deque[Future[ResultT]] = deque()
    for job in jobs:
        pending.append(executor.submit(work, job))
        if len(pending) >= limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _launch(executor: ProcessPoolExecutor) -> None:
    """Start the forked workers before any thread of the executor's."""
    with warnings.catch_warnings():
        # from Python 3.12 on, a fork beside any thread warns; numpy's idle BLAS threads are made for it
        warnings.simplefilter("ignore", DeprecationWarning)
        executor.submit(_be_ready)


def _be_ready() -> None:
    """A first job for a worker to start with."""


def _start_method(module: str) -> BaseContext:
    """Choose fork where it is safe (Linux, no torch, no other thread that may hold a lock), else a clean process."""
    if sys.platform == "linux" and "torch" not in sys.modules and threading.active_count() == 1:
        return multiprocessing.get_context("fork")
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload([module])
    return clean


def _start_worker(context: object) -> None:
    """Take the shared context; leave interrupts to the parent; end when the parent ends, however it ended."""
    _shared["context"] = context
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(function: Callable[[Any, JobT], ResultT], job: JobT) -> ResultT:
    return function(_shared["context"], job)
