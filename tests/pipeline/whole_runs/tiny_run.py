"""A whole run on a few small generated images, in seconds; a test says what it needs otherwise."""

from __future__ import annotations

from typing import Any

import yaml

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"format": "synthetic", "num_train": 6, "num_val": 2, "size_px": 64, "num_classes": 2},
    "train_classifier": {
        "backbone": {"name": "small"},
        "method": {"name": "cam"},
        "augment": {"crop_px": 64, "scale": [1.0, 1.0]},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.05},
    },
    "make_attention": {"scales": [1.0], "flip": False},
    "make_masks": {"threshold": 0.3, "refine": "none"},
    "train_segmenter": {
        "init": "classifier",
        "net": {"name": "largefov", "backbone": {"name": "small"}},
        "augment": {"crop_px": 64},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
    },
    "evaluate": {"multi_scale": False},
    "runtime": {"device": "cpu", "workers": 0, "processes": 1, "threads": 1},
}


def tiny_yaml(**changes: Any) -> str:
    """The config file of that run with ``changes``, which name only the fields that differ."""
    return yaml.safe_dump(_over(TINY, changes), sort_keys=False)


def _over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = {
        name: _over(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in changes.items()
    }
    return {**base, **merged}
