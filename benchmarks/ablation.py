"""The ladder from plain CAM to the whole recipe on five animal classes of VOC 2012: one change a row, end to end.

Every row is ``wsss run configs/voc_animals_cam.yaml`` with the options of its row, so rows share the stages that they
have in common through the store, a row that was stopped goes on where it was, and any row can be run by hand:
--commands prints them.  Attention and masks are scored on the images of train that have true masks, segmenters on val,
which decides nothing.  Every row with GAIN stands beside a CAM of equal length, GAIN_ext beside a CAM that sees the
pixel-labelled images as often, and the last column is the segmenter by the one of the row "true masks", which has the
same classifier's start, loss and length.  Minutes are those that the row's stages took where they were built.

    python benchmarks/ablation.py --data VOC2012 --labels labels.csv                # every row: many hours of a CPU
    python benchmarks/ablation.py --data VOC2012 --labels labels.csv --only cam     # rows by how their names begin
    python benchmarks/ablation.py --data VOC2012 --labels labels.csv --show         # the table of what is finished
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import spread, table
from provenance import commit, hardware

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "voc_animals_cam.yaml"

LONG = ("train_classifier.training.epochs=8",)
MINED = (*LONG, "train_classifier.method={name: gain, am_warmup_epochs: 4}")
MASKED = (
    *LONG,
    "train_classifier.method={name: gain_ext, ext_warmup_epochs: 4, pixel_images: 100, pixel_repeat: 10}",
)
BALANCED = ("train_segmenter.loss=balanced_cross_entropy",)
AFFINITY = (
    "make_masks.refine=[affinity, crf]",
    "make_masks.threshold=0.2",
    "make_masks.affinity.augment={crop_px: 224, scale: [0.75, 1.5], short_side_px: 256}",
)
ROUND = ("train_segmenter.rounds=1", "train_segmenter.retraining={scales: [0.75, 1.0, 1.25], crf: {preset: irn}}")
TRUE = ("train_segmenter.supervision=full", *BALANCED)


@dataclass(frozen=True)
class Row:
    """One recipe."""

    name: str
    options: tuple[str, ...]
    """Of ``--set``, on top of the config."""
    full: str = "true masks"
    """The row that its segmenter is divided by."""


ROWS = (
    Row("CAM, threshold", ("make_masks.refine=none", "make_masks.threshold=0.2")),
    Row("CAM, crf", ("make_masks.refine=crf", "make_masks.threshold=0.2")),
    Row("CAM, random walk, crf", ()),
    Row("CAM, affinity, crf", AFFINITY),
    Row("… balanced loss", (*AFFINITY, *BALANCED)),
    Row("… 8 epochs", (*AFFINITY, *BALANCED, *LONG)),
    Row("… GAIN instead of CAM", (*AFFINITY, *BALANCED, *MINED)),
    Row("… and a round", (*AFFINITY, *BALANCED, *MINED, *ROUND), "true masks, as long"),
    Row("GAIN_ext, 100 masks", (*AFFINITY, *BALANCED, *MASKED)),
    Row("CAM, as often", (*AFFINITY, *BALANCED, *MASKED, "train_classifier.method.ext_weight=0")),
    Row("true masks", TRUE),
    Row("true masks, as long", (*TRUE, "train_segmenter.training.epochs=16")),
)
"""The ladder; ``…`` goes on from the row above."""

COLUMNS: Mapping[str, str] = {
    "attention": "attention.miou_oracle",
    "masks": "masks.miou",
    "segmenter": "segmenter.miou",
    "multi-scale": "segmenter.miou_ms",
}


def command(row: Row, seed: int, arguments: argparse.Namespace, what: Sequence[str] = ("run",)) -> list[str]:
    """The call of ``wsss`` that makes a cell of the table."""
    sets = [
        f"data.root={arguments.data}",
        f"data.labels={arguments.labels}",
        f"seed={seed}",
        *arguments.set,
        *row.options,
    ]
    options = [word for option in sets for word in ("--set", option)]
    return [*what, str(CONFIG.relative_to(ROOT)), *options, "--artifacts", str(arguments.artifacts)]


def call(words: Sequence[str]) -> str:
    """What ``wsss`` prints on stdout; its progress goes to stderr as it comes."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", *words, "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 2):  # 2: a training that diverges leaves its cell empty
        raise SystemExit(done.returncode)
    return done.stdout


def cell(row: Row, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """The figures of what is finished of a row: its metrics, and ``seconds`` of the stages that are there."""
    found: dict[str, float] = {"seconds": 0.0}
    for stage in json.loads(call(command(row, seed, arguments, ("status",))))["stages"]:
        if stage["path"] is None:
            return {}
        run = json.loads((ROOT / stage["path"] / "manifest.json").read_text(encoding="utf-8"))["run"]
        found["seconds"] += run["seconds"]
        found |= {name: value for name, value in run["metrics"].items() if isinstance(value, float)}
    return found


def render(cells: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """The table as Markdown."""
    lines = []
    for row in ROWS:
        found, full = cells[row.name], cells[row.full]
        values = [[one[name] for one in found if name in one] for name in COLUMNS.values()]
        ratios = [
            one["segmenter.miou"] / true["segmenter.miou"]
            for one, true in zip(found, full, strict=True)
            if {"segmenter.miou"} <= one.keys() & true.keys()
        ]
        minutes = [one["seconds"] / 60 for one in found if one]
        count = sum(bool(one) for one in found)
        lines.append(
            [
                row.name,
                str(count),
                *map(spread, values),
                spread(ratios, scale=1, digits=2),
                spread(minutes, scale=1, digits=0),
            ]
        )
    header = ["row", "seeds", *(f"{name}, mIoU" for name in COLUMNS), "weak / full", "minutes"]
    return [f"{hardware()}; commit {commit()}", *table(header, lines)]


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="VOC root with the five animal classes")
    parser.add_argument("--labels", type=Path, required=True, help="its labels.csv")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="the store that all rows share")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="for every row; precision, say")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="comma-separated beginnings of row names")
    parser.add_argument("--show", action="store_true", help="compute nothing, print what is finished")
    parser.add_argument("--commands", action="store_true", help="print the command of each row")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    arguments.data, arguments.labels = arguments.data.resolve(), arguments.labels.resolve()
    arguments.artifacts = arguments.artifacts.resolve()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    wanted = tuple(name.strip().lower() for name in (arguments.only or "").split(","))
    for row in [row for row in ROWS if row.name.lower().startswith(wanted)]:
        for seed in seeds:
            if arguments.commands:
                print("wsss", *(f'"{word}"' if " " in word else word for word in command(row, seed, arguments)))
            elif not arguments.show:
                print(f"{row.name}, seed {seed}", file=sys.stderr, flush=True)
                call(command(row, seed, arguments))
    if arguments.commands:
        return
    cells: dict[str, list[dict[str, float]]] = {
        row.name: [cell(row, seed, arguments) for seed in seeds] for row in ROWS
    }
    document: dict[str, Any] = {"benchmark": "ablation", "cells": cells, "seeds": seeds, "ratios": []}
    provenance = {"hardware": hardware(), "commit": commit()}
    print(json.dumps(document | provenance, indent=1) if arguments.json else "\n".join(render(cells)))


if __name__ == "__main__":
    main()
