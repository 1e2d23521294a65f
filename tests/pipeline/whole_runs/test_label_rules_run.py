"""A run whose threshold is chosen on true masks: recorded, never scored on, the same in parts; soft labels too."""

from __future__ import annotations

import json
from pathlib import Path

from stages.ops.metrics.confusion import read_confusions
from tests.pipeline.whole_runs.test_whole_flow import SYNTHETIC, run, write_config

RULES = (
    "make_masks.sweep={num_images: 4}",
    "make_masks.soft=true",
    "make_masks.thresholds={bee: 0.6}",
    "train_segmenter.loss_weighting=confidence",
)


def only(folder: Path, stage: str) -> Path:
    """The one artifact of a stage."""
    (found,) = (folder / "artifacts" / stage).glob("[0-9a-f]*/")
    return found


def test_images_of_a_sweep_are_recorded_and_not_scored_and_parts_change_nothing(tmp_path: Path) -> None:
    overrides = [word for rule in RULES for word in ("--set", rule)]
    found = {}
    for name, parts in (("whole", 1), ("parts", 3)):
        folder = tmp_path / name
        folder.mkdir()
        write_config(folder, SYNTHETIC)
        document = run(folder, *overrides, "--set", f"runtime.parts={parts}")
        masks, evaluated = only(folder, "make_masks"), only(folder, "evaluate")
        found[name] = (json.loads((masks / "manifest.json").read_text())["content"], document["metrics"])
        chosen = json.loads((masks / "stats.json").read_text())["sweep"]
        used = set(chosen["image_ids"])
        assert used == set(found[name][0]["mask_supervision"])
        assert len(used) == 4
        assert document["metrics"]["masks.threshold"] == chosen["threshold"]
        assert json.loads((evaluated / "sweep.json").read_text())["configured"] == chosen["threshold"]
        scored = set(read_confusions(evaluated / "confusions.npz")["masks"].ids)
        assert len(scored) == 8
        assert not used & scored
        assert len(list((masks / "confidence").iterdir())) == 12
    assert found["whole"] == found["parts"]
