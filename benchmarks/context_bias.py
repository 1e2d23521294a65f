"""GAIN's biased-boat test on the synthetic context bias: does a classifier look at the object or at what comes with it?

In training the first class (auk) stands on waves always, or in nine of ten images as the paper's boats do (--bias 0.9),
and no other class does.  Val asks four questions, the columns of the paper's Table 4: labels on all of val; auks on
ordinary ground (object without its context); waves with no auk (context without the object: the right answer is no);
the last two together.  Rows: CAM, GAIN, and GAIN_ext with 9, 23 and 78 pixel-labelled images of auks.  These come with
the masks of other images in the proportion that the classes have in the training set, so that repeating them makes no
class more frequent than it is.  All go on from one plain CAM start a seed with the same schedule.

    python benchmarks/context_bias.py [--bias 1.0] [--seeds 0,1,2] [--show] [--quick] [--json] [--out DIR]

Source: Li et al., CVPR 2018, §4.2, Table 4 (boats and water in VOC, and 500 images from the web).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from attention_methods import SYNTHETIC, quick
from cells import Bench, first_by_hash, spread, table
from provenance import commit, hardware

from stages.contracts import Runtime, SilentProgress, read_json, write_json
from stages.data.adapters.synthetic import BIASED_LABEL, SyntheticConfig, val_group
from stages.methods import METHODS, MethodConfig
from stages.methods.classifier_files import load_classifier
from stages.scoring.label_scores import predict_logits

COLUMNS = ("all val", "object without context", "context without object", "overall")
ROWS = ("CAM", "GAIN", "GAIN_ext, 9 auks", "GAIN_ext, 23 auks", "GAIN_ext, 78 auks")


def method_of(row: str, bench: Bench) -> MethodConfig:
    """The method that a row names."""
    if not row.startswith("GAIN_ext"):
        return METHODS[row.lower()](**({"am_warmup_epochs": 0} if row == "GAIN" else {}))
    wanted, index, masked = int(row.split()[1]), bench.images("train").index, bench.masked_ids()
    biased = {record.id for record in index.split("train") if BIASED_LABEL in (record.labels or ())}
    count = next(n for n in range(wanted, len(masked)) if len(biased & {*first_by_hash(masked, n)}) == wanted)
    repeat = max(1, len(index.split("train")) // count)
    return METHODS["gain_ext"](pixel_list=bench.pixel_list(count, of=masked), pixel_repeat=repeat)


def answers(bench: Bench, method: MethodConfig, seed: int) -> dict[str, float]:
    """Accuracies of one cell, kept beside it.

    ``all val`` is the label accuracy of all classes; the others are about the biased class alone.
    """
    path = Path(bench.cell(method, seed)["folder"]) / "answers.json"
    if not path.exists():
        classifier, _ = load_classifier(path.parent, torch.device("cpu"))
        images = bench.images("train")
        records = images.index.split("val")
        says = predict_logits(classifier, images, records, None, SilentProgress(), bench.runtime) > 0
        truth = np.zeros_like(says)
        for row, record in enumerate(records):
            truth[row, list(record.labels or ())] = True
        data = bench.setting.data
        assert isinstance(data, SyntheticConfig)
        groups = np.array([val_group(data, index) for index in range(len(records))])
        biased = says[:, BIASED_LABEL] == truth[:, BIASED_LABEL]
        off, empty = biased[groups == "off"], biased[groups == "empty"]
        values = ((says == truth).mean(), off.mean(), empty.mean(), np.concatenate([off, empty]).mean())
        write_json(path, dict(zip(COLUMNS, map(float, values), strict=True)))
    return read_json(path)


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bias", type=float, default=1.0, help="share of the auks that stand on waves in training")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="compute nothing, print what is finished")
    parser.add_argument("--quick", action="store_true", help="a few steps of each method")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    data = SyntheticConfig(context_bias=arguments.bias, num_val=600)
    setting = replace(SYNTHETIC, name=f"context_bias-{arguments.bias:g}", data=data)
    setting = replace(quick(setting), num_train=None) if arguments.quick else setting
    bench = Bench(
        setting,
        arguments.out / f"{setting.name}{'_quick' if arguments.quick else ''}",
        Runtime(workers=1, threads=arguments.threads),
    )
    bench.prepare()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    found: dict[str, dict[str, list[float]]] = {row: {column: [] for column in COLUMNS} for row in ROWS}
    for row in ROWS:
        for seed in seeds:
            method = method_of(row, bench)
            if arguments.show and bench.trained(method, seed) is None:
                continue
            for column, value in answers(bench, method, seed).items():
                found[row][column].append(value)
    if arguments.json:
        print(
            json.dumps(
                {"benchmark": "context_bias", "cells": found, "ratios": [], "hardware": hardware(), "commit": commit()},
                indent=1,
            )
        )
        return
    print(f"context bias {arguments.bias:g}: seeds {arguments.seeds}; {hardware()}; commit {commit()}")
    print(
        "\n".join(
            table(["method", *COLUMNS], [[row, *(spread(found[row][column]) for column in COLUMNS)] for row in ROWS])
        )
    )


if __name__ == "__main__":
    main()
