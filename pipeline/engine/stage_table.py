"""What the stages are, as data: their order, what each reads, what enters its key, and how it is called.

Nothing is read or written here.  Tests bring tables of their own; ``TABLE`` is the real one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.config.advice import config_warnings
from pipeline.config.network_check import check_networks, needs_check
from pipeline.config.preflight import preflight
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_models import did_you_mean
from stages.contracts import Progress, StageResult, open_image_set
from stages.data.config import DataConfig
from stages.data.listing import DataDigests, DataListing, DataView, digest_data
from stages.data.subsets import choose_sweep_images, hold_out, sweep_key_content
from stages.errors import ConfigError
from stages.evaluate import EvaluateConfig, PseudoMasks
from stages.make_masks import MakeMasksConfig
from stages.methods.classifier_files import START
from stages.nets.segmenters.config import pretrained_name
from stages.nets.weights import weights_identity
from stages.ops.crf.dense_crf import CrfConfig


@dataclass(frozen=True)
class DataState:
    """What a run knows of its data before the first stage."""

    root: Path | None = None
    """Folder of the user's data; None where prepare_data generates it."""
    digests: DataDigests | None = None
    """The data set's lists and the digest of each file; independent of where the data lies."""
    warnings: tuple[str, ...] = ()
    """What a run should say before its first stage, beside what prepare_data says."""


@dataclass(frozen=True)
class StageCall:
    """What one call of a stage is made of, beside ``out``, ``progress`` and ``runtime``."""

    run: Any
    inputs: Mapping[str, Path]
    """Artifact folder by the name of the stage that made it; only this stage's inputs."""
    data_root: Path | None
    exclude: frozenset[str]
    """Training images whose true masks were used by any stage before this one."""


@dataclass(frozen=True)
class StageSpec:
    """One stage."""

    name: str
    inputs: Callable[[Any], tuple[str, ...]]
    """Run config to the stages whose artifacts this one reads."""
    key_parts: Callable[[Any, DataState], Mapping[str, Any]]
    """Everything but name, version and inputs that decides the result, as JSON."""
    arguments: Callable[[StageCall], Mapping[str, Any]]
    """Keyword arguments; ``config`` among them."""
    view: Callable[[Any, DataListing], DataView] | None = None
    """What the stage reads of the data through the first stage's artifact; stands in its key instead of that one's key.
    Nothing else of the data may decide a byte of what it writes."""
    package: str = "stages"
    num_units: Callable[[StageCall], int] | None = None
    """How many images (or other units) the stage goes through one by one, for those that take ``part``; else None."""
    in_parts: Callable[[Any], bool] = lambda run: True
    """Run config to whether parts of the stage are any work."""
    on_devices: Callable[[Any], bool] = lambda run: False
    """Run config to whether several devices of a machine would take parts: the stage computes on them."""

    def has_parts(self, run: Any) -> bool:  # noqa: ANN401 - a run of this table's type
        """Whether the stage can be built in parts."""
        return self.num_units is not None and self.in_parts(run)

    @property
    def version(self) -> int:
        """The stage module's VERSION."""
        return int(importlib.import_module(f"{self.package}.{self.name}").VERSION)

    def function(self) -> Callable[..., StageResult]:
        """The stage's function; its module has the stage's name."""
        return getattr(importlib.import_module(f"{self.package}.{self.name}"), self.name)


@dataclass(frozen=True)
class StageTable:
    """The stages of a run in order; the last one is what the run is for."""

    location: str
    """``module:NAME`` of this table, so that a child process finds it."""
    run_type: type[BaseModel]
    read_data: Callable[[Any, Path], DataState]
    """Check the run's inputs and digest its data; the path is a cache of file digests."""
    specs: tuple[StageSpec, ...]
    needs_check: Callable[[Any, Collection[str]], bool] = lambda run, stages: False
    """Whether ``check`` is worth a process before ``stages`` are built."""
    check: Callable[[Any, Progress], None] = lambda run, progress: None
    """What can only be found out with torch, and should be before the first training; runs in a child."""

    @property
    def names(self) -> tuple[str, ...]:
        """The stages in order."""
        return tuple(spec.name for spec in self.specs)

    def spec(self, name: str) -> StageSpec:
        """The stage called ``name``.

        Raises:
            ConfigError: there is none.
        """
        for spec in self.specs:
            if spec.name == name:
                return spec
        guess = did_you_mean(name, self.names)
        raise ConfigError(f"there is no stage '{name}'{guess}  Stages: {', '.join(self.names)}")

    def needed(self, run: Any, last: str | None = None) -> tuple[str, ...]:  # noqa: ANN401 - a run of this table's type
        """The stages that ``last`` (default: the last stage) rests on, itself included, in order."""
        wanted = {last or self.names[-1]}
        for spec in reversed(self.specs):
            if spec.name in wanted:
                wanted.update(spec.inputs(run))
        return tuple(name for name in self.names if name in wanted)


# ---------------------------------------------------------------------------------------------------------------------
# The real table
# ---------------------------------------------------------------------------------------------------------------------


def _read_data(run: RunConfig, cache_file: Path) -> DataState:
    listing = preflight(run)
    warnings = config_warnings(run)
    digests = digest_data(listing, run.data, cache_file, warn=warnings.append)
    return DataState(root=listing.root, digests=digests, warnings=tuple(warnings))


def _is_weak(run: RunConfig) -> bool:
    return run.train_segmenter.supervision == "weak"


def _mask_inputs(run: RunConfig) -> tuple[str, ...]:
    """Maps walk over the features of the classifier that made them, and come from it where they are not kept."""
    classifier = ("train_classifier",) if run.make_masks.walks or not run.make_attention.keep_maps else ()
    return ("prepare_data", *classifier, "make_attention")


def _segmenter_inputs(run: RunConfig) -> tuple[str, ...]:
    from_classifier = ("train_classifier",) if run.train_segmenter.init == "classifier" else ()
    return ("prepare_data", *from_classifier, *(("make_masks",) if _is_weak(run) else ()))


def _evaluate_inputs(run: RunConfig) -> tuple[str, ...]:
    """The classifier wherever the run has one: its labels are scored on val."""
    if not run.evaluate.segmentation:
        return ("prepare_data", "train_classifier")
    if _is_weak(run):
        return ("prepare_data", "train_classifier", "make_attention", "make_masks", "train_segmenter")
    has_classifier = run.train_segmenter.init == "classifier" or run.evaluate.localization is not None
    return ("prepare_data", *(("train_classifier",) if has_classifier else ()), "train_segmenter")


# What each stage reads of the data.


def _masks_of(run: RunConfig, listing: DataListing, ids: Iterable[str], *, kind: str = "masks") -> dict[str, Any]:
    """Masks of training images in a view.

    With ``on_bad_image: skip`` an image whose mask is damaged counts as one without, so that all masks together decide
    which images are chosen.
    """
    found = tuple(ids)
    if found and run.data.on_bad_image == "skip":
        return {"masks": listing.splits["train"], "full_masks": listing.splits["train"]}
    return {kind: found}


def _classifier_view(run: RunConfig, listing: DataListing) -> DataView:
    """Train and what of it is held out, and the masks of the subset that the method asks for (GAIN_ext)."""
    holdout = hold_out(listing, run.prepare_data.holdout_ratio)
    subset = run.train_classifier.method.pixel_labelled(listing.split("train", without=holdout))
    splits = {"train": listing.splits["train"], "holdout": holdout}
    return DataView(splits, **_masks_of(run, listing, subset))


def _attention_view(run: RunConfig, listing: DataListing) -> DataView:
    """Train."""
    del run
    return DataView({"train": listing.splits["train"]})


def _masks_view(run: RunConfig, listing: DataListing) -> DataView:
    """Train, and the masks of the subset on which a threshold is chosen."""
    sweep = run.make_masks.sweep
    subset = () if sweep is None else choose_sweep_images(sweep, listing.split("train"))
    return DataView({"train": listing.splits["train"]}, **_masks_of(run, listing, subset))


def _segmenter_view(run: RunConfig, listing: DataListing) -> DataView:
    """Train; its masks with full supervision alone."""
    train = listing.splits["train"]
    return DataView({"train": train}, **_masks_of(run, listing, () if _is_weak(run) else train, kind="full_masks"))


def _evaluate_view(run: RunConfig, listing: DataListing) -> DataView:
    """What is predicted, val in any case, with masks and boxes; of train the masks that score pseudo-masks."""
    splits = {name: listing.splits.get(name, ()) for name in ("val", *run.evaluate.splits)}
    predicted = [image_id for ids in splits.values() for image_id in ids]
    if not (run.evaluate.segmentation and _is_weak(run)):
        return DataView(splits, masks=predicted, boxes=splits["val"])
    scored = listing.splits["train_score"]
    kinds = _masks_of(run, listing, scored)
    return DataView(
        {**splits, "train_score": scored},
        masks=(*predicted, *kinds["masks"]),
        full_masks=kinds.get("full_masks", ()),
        boxes=splits["val"],
    )


# What else is in each key.


def _json(config: BaseModel) -> dict[str, Any]:
    return config.model_dump(mode="json")


def data_key_parts(config: DataConfig) -> dict[str, Any]:
    """``config`` without its paths: where the data lies changes nothing, what it holds is in the digest."""
    paths = {name for name in type(config).model_fields if isinstance(getattr(config, name), Path)}
    return {name: value for name, value in _json(config).items() if name not in paths and value is not None}


def _crf(config: CrfConfig, run: RunConfig, *, is_used: bool) -> dict[str, Any] | None:
    """The CRF's numbers with the backend that really runs; None where none runs."""
    return config.key_content(run.runtime.device) if is_used else None


def _mask_config(run: RunConfig) -> MakeMasksConfig:
    """The section with the CRF backend of the key by name: the stage must not find another one."""
    config = run.make_masks
    crf = config.crf.resolved(run.runtime.device) if config.uses_crf else config.crf
    return config.model_copy(update={"crf": crf})


def _evaluate_config(run: RunConfig) -> EvaluateConfig:
    """The same of ``evaluate``."""
    config = run.evaluate
    crf = config.crf_config.resolved(run.runtime.device) if config.crf else config.crf_config
    return config.model_copy(update={"crf_config": crf})


def _mask_parts(run: RunConfig, _: DataState) -> dict[str, Any]:
    config = run.make_masks
    sweep = {} if config.sweep is None else {"sweep": sweep_key_content(config.sweep)}
    content = {"config": config.key_content() | sweep | {"crf": _crf(config.crf, run, is_used=config.uses_crf)}}
    return content | ({"seed": run.seed} if config.learns_affinity else {})


def _evaluate_parts(run: RunConfig, _: DataState) -> dict[str, Any]:
    config = run.evaluate
    return {"config": config.key_content() | {"crf_config": _crf(config.crf_config, run, is_used=config.crf)}}


def _weights(name: str | None, weights: Mapping[str, Path]) -> str | None:
    return None if name is None else weights_identity(name, weights)


def _classifier_parts(run: RunConfig, data: DataState) -> dict[str, Any]:
    backbone = run.train_classifier.backbone
    is_public = backbone.pretrained and START not in run.weights
    weights = _weights(backbone.name if is_public else None, run.weights)
    start = _weights(START if START in run.weights else None, run.weights)
    config = run.train_classifier.key_content(None if data.digests is None else data.digests.listing)
    return {"config": config, "seed": run.seed, "weights": weights, "start": start}


def _segmenter_parts(run: RunConfig, _: DataState) -> dict[str, Any]:
    config = run.train_segmenter
    weights = _weights(pretrained_name(config.net, config.init), run.weights)
    return {"config": config.key_content(run.runtime.device), "seed": run.seed, "weights": weights}


def _common(call: StageCall) -> dict[str, Any]:
    return {"images": call.inputs["prepare_data"], "data_root": call.data_root}


def _training(call: StageCall) -> dict[str, Any]:
    return _common(call) | {"weights": call.run.weights, "seed": call.run.seed}


def _num_training_images(call: StageCall) -> int:
    return len(open_image_set(call.inputs["prepare_data"], call.data_root).index.splits.get("train", ()))


def _masks_on_devices(run: RunConfig) -> bool:
    """Whether making masks computes on the device: a walk, maps that are not kept, or the CRF in torch."""
    crf = _mask_config(run).crf.backend if run.make_masks.uses_crf else None
    return bool(run.make_masks.walks) or not run.make_attention.keep_maps or crf == "torch"


def _pseudo_masks(call: StageCall) -> PseudoMasks | None:
    if "make_masks" not in call.inputs:
        return None
    return PseudoMasks(
        attention=call.inputs["make_attention"],
        masks=call.inputs["make_masks"],
        config=call.run.make_masks,
        exclude=call.exclude,
    )


def _optional(call: StageCall, names: Iterable[tuple[str, str]]) -> dict[str, Path | None]:
    """Argument name to the artifact of the stage beside it, None where this run has none."""
    return {argument: call.inputs.get(stage) for argument, stage in names}


TABLE = StageTable(
    location="pipeline.engine.stage_table:TABLE",
    run_type=RunConfig,
    read_data=_read_data,
    needs_check=needs_check,
    check=check_networks,
    specs=(
        StageSpec(
            name="prepare_data",
            inputs=lambda run: (),
            key_parts=lambda run, data: {
                "config": _json(run.prepare_data),
                "data": data_key_parts(run.data),
                "digest": None if data.digests is None else data.digests.whole(),
            },
            arguments=lambda call: {"config": call.run.prepare_data, "data": call.run.data},
        ),
        StageSpec(
            name="train_classifier",
            inputs=lambda run: ("prepare_data",),
            key_parts=_classifier_parts,
            view=_classifier_view,
            arguments=lambda call: {"config": call.run.train_classifier, **_training(call)},
        ),
        StageSpec(
            name="make_attention",
            inputs=lambda run: ("prepare_data", "train_classifier"),
            key_parts=lambda run, data: {"config": run.make_attention.key_content()},
            view=_attention_view,
            arguments=lambda call: {
                "config": call.run.make_attention,
                "classifier": call.inputs["train_classifier"],
                **_common(call),
            },
            num_units=_num_training_images,
            in_parts=lambda run: run.make_attention.keep_maps,
            on_devices=lambda run: True,
        ),
        StageSpec(
            name="make_masks",
            inputs=_mask_inputs,
            key_parts=_mask_parts,
            view=_masks_view,
            arguments=lambda call: {
                "config": _mask_config(call.run),
                "attention": call.inputs["make_attention"],
                "precision": call.run.make_attention.precision,
                **_optional(call, [("classifier", "train_classifier")]),
                **_common(call) | {"seed": call.run.seed},
            },
            num_units=_num_training_images,
            on_devices=_masks_on_devices,
        ),
        StageSpec(
            name="train_segmenter",
            inputs=_segmenter_inputs,
            key_parts=_segmenter_parts,
            view=_segmenter_view,
            arguments=lambda call: {
                "config": call.run.train_segmenter.resolved(call.run.runtime.device),
                **_optional(call, [("masks", "make_masks"), ("classifier", "train_classifier")]),
                **_training(call),
            },
        ),
        StageSpec(
            name="evaluate",
            inputs=_evaluate_inputs,
            key_parts=_evaluate_parts,
            view=_evaluate_view,
            arguments=lambda call: {
                "config": _evaluate_config(call.run),
                **_optional(call, [("segmenter", "train_segmenter"), ("classifier", "train_classifier")]),
                "pseudo_masks": _pseudo_masks(call),
                "labels_short_side_px": call.run.train_classifier.augment.short_side_px,
                **_common(call),
            },
        ),
    ),
)

STAGES: tuple[str, ...] = TABLE.names
"""The six stages in order."""
