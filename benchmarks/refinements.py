"""What each refinement of the pseudo-masks is worth on a data set with true masks: mIoU, coverage, processor seconds.

Takes the attention (and the classifier) of a config from the store, as ``wsss run CONFIG --until make_attention`` left
them, and makes the masks of the scored training images by every refinement, at several thresholds; by learned affinity
only where the store has the config's masks with a trained head (``--until make_masks``).  The threshold is chosen on
one half of these images (``train_select``), the figures are those of the other (``train_report``): mIoU with 255 as
background, mIoU of the labelled pixels, the share of these (coverage), and seconds of one thread per image, the reading
of the image and the training of a head left out.  Finished rows are kept beside the store (``--rows``), so that a
stopped run goes on.

    python benchmarks/refinements.py CONFIG [--set a.b=c]… [--artifacts DIR] [--rows FILE] [--processes N] [--quick]
        [--only TEXT] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from provenance import commit, hardware

from pipeline.config.run_config import RunConfig, find_config, load_config
from pipeline.engine.run import Run
from pipeline.store.artifacts import open_store
from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    AttentionRecord,
    ImageSet,
    Runtime,
    SilentProgress,
    iter_attention,
    open_image_set,
)
from stages.data.subsets import hash_half
from stages.make_masks import MakeMasksConfig, refine_mask
from stages.masks.label_rules import settle_classes
from stages.masks.refinements.affinity import AffinityWalker, is_trained
from stages.masks.refinements.random_walk import MapWalker
from stages.ops.metrics.confusion import confusion_matrix, mean_iou
from stages.ops.pool import map_ordered, num_processes

THRESHOLDS = (0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.25)
QUICK_THRESHOLDS = (0.05, 0.1, 0.2)
QUICK_IMAGES = 8
"""Of each half, with ``--quick``."""

LOOSE = 1 / 3
"""The background threshold of the rows with ``confident``, as a fraction of the foreground threshold."""

REFINEMENTS: Mapping[str, Mapping[str, Any]] = {
    "none": {"refine": "none"},
    "crf irn": {"refine": "crf", "crf": {"preset": "irn"}},
    "crf irn, maps": {"refine": "crf", "crf": {"preset": "irn"}, "unary": "maps"},
    "crf irn, confidence 0.9": {"refine": "crf", "crf": {"preset": "irn"}, "label_confidence": 0.9},
    "crf irn, half resolution": {"refine": "crf", "crf": {"preset": "irn", "resolution": "half"}},
    "crf irn, two thresholds": {"refine": "crf", "crf": {"preset": "irn"}, "confident": {}},
    "crf sec": {"refine": "crf", "crf": {"preset": "sec"}},
    "crf deeplab_v1": {"refine": "crf", "crf": {"preset": "deeplab_v1"}},
    "crf deeplab_v2_resnet101": {"refine": "crf", "crf": {"preset": "deeplab_v2_resnet101"}},
    "par": {"refine": "par"},
    "random_walk": {"refine": "random_walk"},
    "[random_walk, par]": {"refine": ["random_walk", "par"]},
    "[random_walk, crf irn]": {"refine": ["random_walk", "crf"], "crf": {"preset": "irn"}},
    "[random_walk, crf irn], half": {
        "refine": ["random_walk", "crf"],
        "crf": {"preset": "irn", "resolution": "half"},
    },
    "[random_walk, crf sec]": {"refine": ["random_walk", "crf"], "crf": {"preset": "sec"}},
    "affinity": {"refine": "affinity"},
    "[affinity, crf irn]": {"refine": ["affinity", "crf"], "crf": {"preset": "irn"}},
    "[affinity, crf irn], half": {"refine": ["affinity", "crf"], "crf": {"preset": "irn", "resolution": "half"}},
    "[par, crf irn]": {"refine": ["par", "crf"], "crf": {"preset": "irn"}},
    "[random_walk, par, crf irn]": {"refine": ["random_walk", "par", "crf"], "crf": {"preset": "irn"}},
}
"""What is compared, by the name of its row."""


class Count(NamedTuple):
    """One image at one threshold."""

    matrix: NDArray[np.int64]
    """(C, C), 255 as background."""
    labelled: NDArray[np.int64]
    """(C, C), 255 left out."""
    seconds: float
    """Processor time of one thread."""


@dataclass(frozen=True)
class Scene:
    """What is scored, and on what."""

    images: ImageSet
    records: Mapping[str, AttentionRecord]
    """Attention of the scored images."""
    walked: Mapping[str, Mapping[str, AttentionRecord]]
    """The same after each walk, by its name."""
    walk_s: Mapping[str, Mapping[str, float]]
    """Processor seconds of each walk."""


@dataclass(frozen=True)
class Call:
    """What the images of one row and half share."""

    scene: Scene
    configs: tuple[MakeMasksConfig, ...]
    """One for each threshold."""


def config_at(options: Mapping[str, Any], threshold: float) -> MakeMasksConfig:
    """A row's config at a threshold; with ``confident`` it is that of the foreground."""
    if "confident" in options:
        pair = {"foreground_threshold": threshold, "background_threshold": LOOSE * threshold}
        return MakeMasksConfig.model_validate({**options, "confident": pair})
    return MakeMasksConfig.model_validate({**options, "threshold": threshold})


def count_image(call: Call, image_id: str) -> list[Count]:
    """One image at each threshold."""
    import torch

    torch.set_num_threads(1)
    scene = call.scene
    entry, classes = scene.images.index.record(image_id), scene.images.index.classes
    image, truth = scene.images.read_image(entry), scene.images.read_mask(entry)
    counts = []
    for config in call.configs:
        walk = config.chain[0] if config.walks else None
        record = settle_classes((scene.walked[walk] if walk else scene.records)[image_id], config, classes)
        started = time.process_time()
        mask = refine_mask(image, record, config)
        seconds = time.process_time() - started + (scene.walk_s[walk][image_id] if walk else 0)
        covered = np.where(mask == IGNORE_INDEX, IGNORE_INDEX, truth)
        plain = np.where(mask == IGNORE_INDEX, BACKGROUND_INDEX, mask)
        matrices = (confusion_matrix(true, plain, classes.num_classes) for true in (truth, covered))
        counts.append(Count(*matrices, seconds))
    return counts


def score(
    scene: Scene, options: Mapping[str, Any], thresholds: Sequence[float], half: str, processes: int
) -> list[dict[str, float]]:
    """A row's scores on one half of the images, one dictionary a threshold."""
    call = Call(scene, tuple(config_at(options, threshold) for threshold in thresholds))
    ids = [image_id for image_id in scene.records if hash_half(image_id) == half]
    counted = list(map_ordered(count_image, ids, context=call, processes=processes))
    return [
        _summarise(threshold, list(counts))
        for threshold, counts in zip(thresholds, zip(*counted, strict=True), strict=True)
    ]


def _summarise(threshold: float, counts: Sequence[Count]) -> dict[str, float]:
    plain, labelled = (np.sum([count[place] for count in counts], axis=0) for place in (0, 1))
    return {
        "threshold": threshold,
        "miou": mean_iou(plain),
        "miou_labelled": mean_iou(labelled),
        "coverage": float(labelled.sum() / plain.sum()),
        "seconds": float(np.mean([count.seconds for count in counts])),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Before and after
# ---------------------------------------------------------------------------------------------------------------------


def open_scene(run: RunConfig, artifacts: str, *, is_quick: bool) -> Scene:
    """The attention of the scored images, and what becomes of it on a walk."""
    found = Run(run, open_store(artifacts)).finished_artifacts()
    if "make_attention" not in found:
        sys.exit("there is no attention of this config in the store; run it with --until make_attention first")
    root = getattr(run.data, "root", None)
    images = open_image_set(found["prepare_data"].path, root)
    scored = _scored(images, is_quick=is_quick)
    records = {record.id: record for record in iter_attention(found["make_attention"].path) if record.id in scored}
    given: dict[str, Any] = {
        "classifier": found["train_classifier"].path,
        "images": images,
        "progress": SilentProgress(),
        "runtime": Runtime(device="cpu", workers=0),
    }
    walkers = {"random_walk": MapWalker(run.make_masks.random_walk, **given)}
    if "make_masks" in found and is_trained(found["make_masks"].path):
        walkers["affinity"] = AffinityWalker(run.make_masks.affinity, head=found["make_masks"].path, **given)
    walked = {name: dict[str, AttentionRecord]() for name in walkers}
    seconds = {name: dict[str, float]() for name in walkers}
    for name, walker in walkers.items():
        for image_id, record in records.items():
            started = time.process_time()
            walked[name] |= walker.walk([record], [images.index.record(image_id)])
            seconds[name][image_id] = time.process_time() - started
    return Scene(images, records, walked, seconds)


def _scored(images: ImageSet, *, is_quick: bool) -> frozenset[str]:
    labelled = [name for name in images.index.splits["train_score"] if images.index.record(name).labels]
    if not is_quick:
        return frozenset(labelled)
    halves = (
        [name for name in sorted(labelled) if hash_half(name) == half] for half in ("train_select", "train_report")
    )
    return frozenset(name for half in halves for name in half[:QUICK_IMAGES])


def make_rows(arguments: argparse.Namespace, scene: Scene) -> Iterator[dict[str, Any]]:
    """The rows in order, those of an earlier call from its file."""
    thresholds = QUICK_THRESHOLDS if arguments.quick else THRESHOLDS
    path: Path | None = arguments.rows
    kept = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    for name, options in REFINEMENTS.items():
        if arguments.only not in name or ("affinity" in name and "affinity" not in scene.walked):
            continue
        if name not in kept:
            selected = score(scene, options, thresholds, "train_select", arguments.processes)
            best = max(selected, key=lambda row: row["miou"])
            reported = score(scene, options, [best["threshold"]], "train_report", arguments.processes)
            kept[name] = {"select": selected, "report": reported[0]}
            if path is not None:
                path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        yield {"name": name, **kept[name]}


def main() -> None:
    """Print the table; with ``--json`` one document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="as of wsss run")
    parser.add_argument("--artifacts", default="artifacts", help="the store that has the attention")
    parser.add_argument("--rows", type=Path, help="keep finished rows here, and take those that are there")
    parser.add_argument("--processes", type=int, default=0, help="0 is one per core")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their name")
    parser.add_argument("--quick", action="store_true", help="16 images, three thresholds")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.processes = num_processes(arguments.processes)
    run = load_config(find_config(arguments.config), arguments.set)
    scene = open_scene(run, arguments.artifacts, is_quick=arguments.quick)
    rows = []
    for row in make_rows(arguments, scene):
        rows.append(row)
        print(_line(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps(_document(rows)))


def _line(row: Mapping[str, Any]) -> str:
    best, report = max(row["select"], key=lambda each: each["miou"]), row["report"]
    return (
        f"{row['name']:28} threshold {best['threshold']:.2f}  select {best['miou']:.1%}  report {report['miou']:.1%}  "
        f"labelled {report['miou_labelled']:.1%}  coverage {report['coverage']:.1%}  {report['seconds']:.3f} s"
    )


def _document(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    best = max(rows, key=lambda row: max(each["miou"] for each in row["select"]))
    return {
        "benchmark": "refinements",
        "ratios": [],
        "rows": list(rows),
        "best_on_select": best["name"],
        "hardware": hardware(),
        "commit": commit(),
    }


if __name__ == "__main__":
    main()
