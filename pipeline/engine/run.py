"""A run: one config brought to its end.  What is cached is reused, what is missing is built in a child process.

Reads and writes the store only.  Neither torch nor Prefect is imported here; the command line and the Prefect flows
make the same object.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from pipeline.engine.building import parse_part
from pipeline.engine.forecast import check_space
from pipeline.engine.gpus import find_gpus
from pipeline.engine.outcomes import Around, Helpers, Listener, RunOutcome, SilentListener, StageOutcome, StageStatus
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.records import RunRecord
from pipeline.engine.spawn import Child, run_child
from pipeline.engine.stage_table import TABLE, StageTable
from pipeline.engine.tracking import check_trackers, tracked
from pipeline.store.artifacts import Artifact, Store
from stages.errors import ConfigError, DamagedFileError, EnvironmentFailure, MissingArtifactError, WsssError

_T = TypeVar("_T")

PARTS_PER_DEVICE = 4
"""Parts of a stage for each of several devices where the config names no number: the quicker one takes more of them."""


class Run:
    """One config with its plan, the store it is built in, and who hears of it."""

    def __init__(
        self,
        config: Any,  # noqa: ANN401 - the table's run type
        store: Store,
        *,
        listener: Listener | None = None,
        invocation: str = "CONFIG",
        plan: Plan | None = None,
        around: Around | None = None,
        helpers: Helpers | None = None,
        table: StageTable = TABLE,
    ) -> None:
        """Bring things together; nothing is read or built yet.

        Args:
            config: The config.
            store: Where artifacts live.
            listener: Hears of every stage.
            invocation: Config and options as the user wrote them, for the command in an error.
            plan: The keys, when the caller has them already.
            around: Called in place of each stage with its name and what brings it into being; returns what that does.
            helpers: Called around the building of a stage in parts, to ask others for help.
            table: The stages; tests bring their own.
        """
        self.config, self.store, self.table, self.invocation = config, store, table, invocation
        self.listener: Listener = listener or SilentListener()
        self._threads: int = getattr(getattr(config, "runtime", None), "threads", 0)
        self._plan, self._around, self._helpers = plan, around or (lambda stage, body: body()), helpers

    @property
    def plan(self) -> Plan:
        """The keys of the stages that the run needs; planned, and the inputs checked, at first use (InputError)."""
        return self._plan_for(None)

    def _plan_for(self, last: str | None) -> Plan:
        if self._plan is None:
            self._plan = plan_run(self.config, self.store.digest_cache, self.table, last=last)
        return self._plan

    # -- the whole, one stage, parts of one -------------------------------------------------------------------------

    def run_pipeline(
        self,
        *,
        from_: str | None = None,
        until: str | None = None,
        force: Collection[str] = (),
        then: Callable[[RunOutcome], None] = lambda outcome: None,
    ) -> RunOutcome:
        """Check the inputs, then bring the stages into being one after the other.

        Args:
            from_: First stage to run; the stages before it must be cached.
            until: Last stage to run.
            force: Stages to rebuild, each with all after it.
            then: Called with what came of it, such as to write the report, while nobody may prune what the run used.

        Raises:
            WsssError: the first failure; the listener has heard the outcomes before it and a ``failed`` one.
            EnvironmentFailure: the disk is nearly full; nothing was built.
            KeyboardInterrupt: interrupted by SIGINT or SIGTERM; the unfinished stage continues next time.
        """
        names = self.table.names
        first, last, forced_from = stage_positions(self.table, from_, until, force)
        self._require(names[first], [name for name in names[:first] if self._is_missing(name)])
        is_forced = {name: position >= max(forced_from, first) for position, name in enumerate(names[: last + 1])}
        unbuilt = [name for name, again in is_forced.items() if name in self.plan.keys and again]
        unbuilt += [name for name, again in is_forced.items() if not again and self._is_missing(name)]
        if unbuilt:
            check_space(self.store)
        with self._at_work(self.plan) as record:
            for text in self.plan.data.warnings:
                self.listener.warn(text)
            if self.table.needs_check(self.config, unbuilt):
                # finds out in a child, with torch, what would otherwise come to light only after the first training
                self.listener.info("checking that the networks can be built and their weights fit")
                request = {"table": self.table.location, "run": self.config.model_dump(mode="json"), "check": True}
                run_child(request, self.listener, threads=self._threads)
            outcomes = tuple(
                self._around(name, partial(self.ensure, name, force=again)) for name, again in is_forced.items()
            )
            outcome = RunOutcome(record.run_id, outcomes, record.path)
            then(outcome)
        return outcome

    def run_stage(self, stage: str, *, force: bool = False) -> RunOutcome:
        """Run one stage from cached inputs, also one that the whole run would skip; ``force`` builds it again.

        Raises:
            MissingArtifactError: an input is not in the store; the command that makes it is in the message.
            WsssError: the stage failed; the listener has heard of it.
            EnvironmentFailure: the disk is nearly full; nothing was built.
        """
        plan = self._plan_for(self.table.spec(stage).name)
        self._require(stage, [name for name in plan.inputs(stage) if self._is_missing(name)])
        if force or self._is_missing(stage):
            check_space(self.store)
        with self._at_work(plan) as record:
            outcome = self._around(stage, partial(self.ensure, stage, force=force))
        return RunOutcome(record.run_id, (outcome,), record.path)

    def help_with(self, stage: str, part: str = "any", *, key: str | None = None) -> int:
        """Build parts of a stage that another run is at, or will be; how many, 0 where the artifact is there already.

        Args:
            stage: Stage name.
            part: ``3/8`` for that part, ``any`` for each part that nobody holds.
            key: The key that the other run builds, where it said so.

        Raises:
            ConfigError: this stage has no parts, or there is no such part.
            MissingArtifactError: an input is not in the store; the command that makes it is in the message.
            EnvironmentFailure: the other run has another config or version of the code.
            WsssError: the stage failed.
        """
        wanted, count = parse_part(part), self.count_parts(stage)
        if not self.table.spec(stage).has_parts(self.config):
            possible = ", ".join(spec.name for spec in self.table.specs if spec.num_units is not None)
            raise ConfigError(f"{stage} has no parts; --part goes with {possible}")
        if wanted is None and count == 1:
            raise ConfigError(
                f"--part any needs to know how many parts there are: set runtime.parts above 1, as the run to help "
                f"has it, or name the part of {stage}, such as --part 1/8"
            )
        plan = self._plan_for(stage)
        if key is not None and key != plan.keys[stage]:
            raise EnvironmentFailure(
                f"{stage}: the run that asks for help builds {key}, config and code here give {plan.keys[stage]}; "
                "bring both to the same config and version of wsss"
            )
        self._require(stage, [name for name in plan.inputs(stage) if self._is_missing(name)])
        check_space(self.store)
        request = self._request(stage) | {"num_parts": wanted.count if wanted else count, "part": part}
        with _terminate_as_interrupt(), RunRecord.open(self.store, plan):
            plan.check_data(stage, self.store.digest_cache)
            help_out = partial(run_child, request, self.listener, threads=self._threads)
            return int(self._with_inputs(stage, help_out)["num_parts"])

    @contextmanager
    def _at_work(self, plan: Plan) -> Iterator[RunRecord]:
        """A run that can be interrupted, has a record, and is followed by the trackers that the config names."""
        names = getattr(self.config, "track", ())
        check_trackers(names)
        listener = self.listener
        with ExitStack() as stack:
            stack.enter_context(_terminate_as_interrupt())
            record = stack.enter_context(RunRecord.open(self.store, plan))
            stack.callback(setattr, self, "listener", listener)
            self.listener = stack.enter_context(
                tracked(listener, names, config=self.config, name=record.path.stem, folder=self.store.root)
            )
            yield record

    # -- one stage ---------------------------------------------------------------------------------------------------

    def ensure(self, stage: str, *, force: bool = False) -> StageOutcome:
        """Make sure that the artifact of ``stage`` is in the store, or with ``force`` build it again.

        The artifacts that it reads must be there; one whose files are not as they were written is built again first.

        Raises:
            DataError: the data set was changed since the run was planned; nothing was built.
            WsssError: the stage failed; the listener has heard of it.
            KeyboardInterrupt: the child has been ended; its work is kept and continued by the next call.
        """
        started = time.monotonic()
        key = self.plan.keys.get(self.table.spec(stage).name)
        if key is None:
            outcome = StageOutcome(stage, None, None, "skipped", 0.0)
            self.listener.stage_finished(outcome)
            return outcome
        self.listener.stage_started(stage, key)
        artifact = None if force else self.store.lookup(stage, key)
        try:
            if artifact is not None:
                state, path, metrics, warnings = "cached", artifact.path, artifact.metrics, artifact.warnings
            else:
                self.plan.check_data(stage, self.store.digest_cache)
                answer = self._with_inputs(stage, partial(self._build, stage, force=force))
                state, path = answer["state"], Path(answer["path"])
                metrics, warnings = answer["metrics"], tuple(answer["warnings"])
        except BaseException:
            self.listener.stage_finished(StageOutcome(stage, key, None, "failed", time.monotonic() - started))
            raise
        outcome = StageOutcome(stage, key, path, state, time.monotonic() - started, metrics, warnings)
        self.listener.stage_finished(outcome)
        return outcome

    def _with_inputs(self, stage: str, build: Callable[[], _T]) -> _T:
        """What ``build`` gives; an input that its child found damaged, and has set aside, is built again first."""
        for _ in self.plan.inputs(stage):
            try:
                return build()
            except (DamagedFileError, MissingArtifactError) as error:
                lost = [name for name in self.plan.inputs(stage) if self._is_missing(name)]
                if not lost:
                    raise
                self.listener.warn(
                    f"{error.message} ({'; '.join(error.problems[:1])})" if error.problems else str(error)
                )
                for name in lost:
                    self.ensure(name)
                self.listener.stage_started(stage, self.plan.keys[stage])
        return build()

    def _build(self, stage: str, *, force: bool) -> dict[str, Any]:
        """Let a child build the stage: alone, or in parts with helpers on other devices and whoever else is asked."""
        devices, count = self._part_devices(stage), self.count_parts(stage)
        request = self._request(stage) | {"force": force, "num_parts": count}
        if len(devices) <= 1:
            with self._helpers(stage, count) if self._helpers is not None and count > 1 else nullcontext():
                return run_child(request, self.listener, threads=self._threads)
        requests = [_on_device(request, device, len(devices)) for device in devices]
        with ExitStack() as stack:
            for device, other in zip(devices[1:], requests[1:], strict=True):
                stack.enter_context(
                    self._helping_child(device, other | {"force": False, "part": "any", "follows": True})
                )
            if self._helpers is not None:
                stack.enter_context(self._helpers(stage, count))
            return run_child(requests[0], self.listener, threads=self._threads)

    @contextmanager
    def _helping_child(self, device: str, request: dict[str, Any]) -> Iterator[None]:
        """A child on another device that builds parts within; its failure is a warning, its parts go to others."""
        child = Child(request, threads=self._threads)

        def follow() -> None:
            try:
                child.answer(_Muted(self.listener))
            except WsssError as error:
                if not is_over.is_set():
                    self.listener.warn(f"the process on {device} ended ({error.message}); the others do its parts")

        is_over = threading.Event()
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            child.end()
            thread.join(timeout=5.0)

    def _request(self, stage: str) -> dict[str, Any]:
        plan = self.plan
        return {
            "table": self.table.location,
            "run": self.config.model_dump(mode="json"),
            "stage": stage,
            "key": plan.keys[stage],
            "content": dict(plan.contents[stage]),
            "upstream": {name: plan.keys[name] for name in plan.upstream(stage)},
            "data_root": None if plan.data.root is None else str(plan.data.root),
            "artifacts": self.store.location,
        }

    # -- parts -------------------------------------------------------------------------------------------------------

    def count_parts(self, stage: str) -> int:
        """How many parts a stage is built in: ``runtime.parts``, or some for each of several devices; 1 for none."""
        runtime = getattr(self.config, "runtime", None)
        if runtime is None or not self.table.spec(stage).has_parts(self.config):
            return 1
        devices = self._part_devices(stage)
        return runtime.parts if runtime.parts > 1 or len(devices) <= 1 else PARTS_PER_DEVICE * len(devices)

    def _part_devices(self, stage: str) -> list[str]:
        """The devices of this machine that take parts of ``stage``, a process each; at most one: as without parts."""
        spec, runtime = self.table.spec(stage), getattr(self.config, "runtime", None)
        is_spread = spec.has_parts(self.config) and spec.on_devices(self.config)
        if not is_spread or runtime is None or runtime.devices == 1 or runtime.device not in ("auto", "cpu", "cuda"):
            return []
        num = len(find_gpus()) if runtime.device != "cpu" else 0
        if runtime.devices != "auto":
            num = runtime.devices if runtime.device == "cpu" else min(num, runtime.devices)
        return ["cpu"] * num if runtime.device == "cpu" else [f"cuda:{index}" for index in range(num)]

    # -- what the store holds ----------------------------------------------------------------------------------------

    def _is_missing(self, stage: str) -> bool:
        """Whether the run needs ``stage`` and the store does not have it."""
        return stage in self.plan.keys and self.store.lookup(stage, self.plan.keys[stage]) is None

    def _require(self, stage: str, missing: Sequence[str]) -> None:
        if missing:
            raise MissingArtifactError(
                f"{stage} rests on the artifact of {' and '.join(missing)}, which is not in the store; "
                f"make it with: wsss run {self.invocation} --until {missing[-1]}"
            )

    def finished_artifacts(self) -> dict[str, Artifact]:
        """Those of the run's artifacts that are in the store, by stage."""
        found = {name: self.store.lookup(name, key) for name, key in self.plan.keys.items()}
        return {name: artifact for name, artifact in found.items() if artifact is not None}

    def status(self) -> list[StageStatus]:
        """What the store holds for each stage; builds nothing and sets nothing aside."""
        return [self._stage_status(name) for name in self.table.names]

    def _stage_status(self, stage: str) -> StageStatus:
        key = self.plan.keys.get(stage)
        if key is None:
            return StageStatus(stage, "skipped", None, None)
        damage: list[str] = []
        artifact = self.store.lookup(stage, key, damaged=damage.append, fresh=True)
        if artifact is not None:
            return StageStatus(stage, "cached", key, artifact.path, artifact.size_bytes, artifact.run.get("started"))
        if damage:
            return StageStatus(stage, "damaged", key, self.store.path(stage, key))
        if self.store.has_work(stage, key):
            return StageStatus(stage, "partial", key, self.store.work_path(stage, key))
        return StageStatus(stage, "missing", key, None)


class _Muted(SilentListener):
    """Passes on what a helping process warns of; the main one says the rest."""

    def __init__(self, inner: Listener) -> None:
        super().__init__()
        self._inner = inner

    def warn(self, text: str) -> None:
        self._inner.warn(text)

    def output(self, text: str) -> None:
        self._inner.output(text)


def _on_device(request: dict[str, Any], device: str, count: int) -> dict[str, Any]:
    """``request`` for one of ``count`` processes: on ``device``, with its share of the cores for work on the CPU."""
    runtime = request["run"]["runtime"]
    own = {"device": device, "devices": 1, "processes": runtime["processes"] or max(1, (os.cpu_count() or 1) // count)}
    return request | {"run": request["run"] | {"runtime": runtime | own}}


def stage_positions(
    table: StageTable, from_: str | None, until: str | None, force: Collection[str]
) -> tuple[int, int, int]:
    """Positions of the first, the last and the first forced stage.

    Raises:
        ConfigError: an unknown stage, a first one after the last, or a forced one that would not run.
    """
    order = {name: position for position, name in enumerate(table.names)}
    for name in (from_, until, *force):
        if name is not None:
            table.spec(name)
    first = order[from_] if from_ is not None else 0
    last = order[until] if until is not None else len(order) - 1
    if first > last:
        raise ConfigError(f"--from {from_} comes after --until {until}; order: {', '.join(order)}")
    unforced = [f"--force {name}" for name in force if not first <= order[name] <= last]
    if unforced:
        bounds = f"{table.names[first]} … {table.names[last]}"
        raise ConfigError(f"{' and '.join(unforced)}: this run covers {bounds} only; change --from, --until or --force")
    return first, last, min((order[name] for name in force), default=len(order))


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the child as Ctrl-C does, where nobody else has taken that signal."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
