"""Find the trained segmenter of a config in the store, for commands that only use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.run_config import RunConfig
from pipeline.engine.invocation import write_invocation
from pipeline.engine.plan import Plan, plan_run
from pipeline.engine.records import load_named
from pipeline.store.artifacts import Artifact, Store, open_store
from stages.contracts import open_image_set
from stages.errors import ConfigError, DataError, MissingArtifactError

if TYPE_CHECKING:
    from stages.scoring.prediction import PredictionConfig

STAGE = "train_segmenter"


@dataclass(frozen=True)
class FoundSegmenter:
    """A config with the artifact of its segmenter."""

    run: RunConfig
    plan: Plan
    store: Store
    artifact: Artifact

    @property
    def prediction(self) -> PredictionConfig:
        """How the config looks at whole images."""
        return prediction_config(self.run)

    def sample_image(self) -> NDArray[np.uint8] | None:
        """An image of the data set, RGB (H, W, 3); None where it is not here any more."""
        key = self.plan.keys["prepare_data"]
        if self.store.lookup("prepare_data", key) is None:
            return None
        images = open_image_set(self.store.require("prepare_data", key).path, self.plan.data.root)
        try:
            return images.read_image((images.index.split("val") or images.index.images)[0])
        except DataError:
            return None

    def provenance(self) -> dict[str, Any]:
        """Where the segmenter comes from, as JSON: key, commit, config, labels, initial weights, measured scores."""
        run, keys = self.artifact.run, self.plan.keys
        lineage = [self.store.lookup(name, keys[name]) for name in self.plan.upstream(STAGE)]
        supervised = {image_id for found in (self.artifact, *lineage) if found for image_id in found.mask_supervision}
        evaluation = self.store.lookup("evaluate", keys["evaluate"]) if "evaluate" in keys else None
        scores = evaluation.metrics if evaluation else {}
        return {
            "run": self.run.name,
            "key": self.artifact.key,
            "commit": run.get("revision"),
            "trained": run.get("started"),
            "packages": run.get("packages", {}),
            "seed": self.run.seed,
            "supervision": self.run.train_segmenter.supervision,
            "mask_supervision": sorted(supervised),
            "init": self.run.train_segmenter.init,
            "initial_weights": self.artifact.content.get("weights"),
            "metrics": {name: value for name, value in scores.items() if name.startswith("segmenter.")},
        }


def find_segmenter(config: str, overrides: Sequence[str] | None, artifacts: str, *, doing: str) -> FoundSegmenter:
    """The trained segmenter of ``config``; its files are here, also where the store is elsewhere.

    The words are those of the command line, and ``doing`` is the command.

    Raises:
        ConfigError: the config trains no segmenter.
        MissingArtifactError: it is not in the store; the command that makes it is in the message.
    """
    run = load_named(config, overrides or [], artifacts)
    if not run.evaluate.segmentation:
        raise ConfigError(f"{config} trains no segmenter (evaluate.segmentation: false); {doing} needs one")
    store = open_store(artifacts)
    plan = plan_run(run, store.digest_cache)
    invocation = write_invocation(config, overrides, artifacts)
    return FoundSegmenter(run, plan, store, require_built(plan, store, STAGE, doing=doing, invocation=invocation))


def prediction_config(run: RunConfig) -> PredictionConfig:
    """How a config looks at whole images: that part of its evaluate section."""
    from stages.scoring.prediction import PredictionConfig

    values = {name: getattr(run.evaluate, name) for name in PredictionConfig.model_fields}
    return PredictionConfig.model_validate(values)


def require_built(plan: Plan, store: Store, stage: str, *, doing: str, invocation: str) -> Artifact:
    """The artifact of ``stage``; its files are here, also where the store is elsewhere.

    Args:
        plan: Of the run.
        store: Where to look.
        stage: Which one.
        doing: The command that needs it.
        invocation: Config and options behind ``wsss run``.

    Raises:
        MissingArtifactError: it is not in the store; the command that makes it is in the message.
    """
    key = plan.keys[stage]
    damage: list[str] = []
    if store.lookup(stage, key, damaged=damage.append) is None:
        what = "the trained segmenter" if stage == STAGE else stage
        found = f"is damaged ({damage[0]})" if damage else "is not in the store"
        command = f"wsss run {invocation} --until {stage}"
        raise MissingArtifactError(f"{doing} needs {what} {key}, which {found}; make it with: {command}")
    return store.require(stage, key)
