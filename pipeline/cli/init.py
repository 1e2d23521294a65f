"""``wsss init``: a config that fits a folder of images and this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, as_path
from pipeline.cli.output import get_output
from stages.errors import ConfigError


def init(
    context: typer.Context,
    folder: Annotated[
        Path,
        typer.Argument(
            parser=as_path, metavar="FOLDER", help="Images with a labels.csv, or a sub-folder for each class."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", parser=as_path, metavar="FILE", help="Config to write; default FOLDER/wsss.yaml."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing config.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look at a folder of images and this machine, and write a config that fits both."""
    path = out or folder / "wsss.yaml"
    output = get_output(context)
    output.document = {"config": path}
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; write over it with --force, or name another file with --out")

    from pipeline.config import starting_config
    from pipeline.engine.gpus import find_gpus
    from pipeline.report.tables import format_seconds
    from stages.contracts import write_atomic

    found = starting_config.look_at(folder)
    output.say(starting_config.describe_data(found))
    for warning in found.listing.warnings:
        output.say(f"  warning: {warning}")
    has_gpu, cores = bool(find_gpus()), starting_config.count_cores()
    device = "one GPU" if has_gpu else f"{cores} CPU cores"
    recipe = starting_config.choose_recipe(found, has_gpu=has_gpu)
    draft = starting_config.write_yaml(recipe, found, path, device=device, time_text="")
    output.say(f"timing a training step of both networks on {device} …")
    speeds = starting_config.measure_speeds(starting_config.load_yaml(draft), len(found.listing.classes.names))
    if not has_gpu:
        recipe = starting_config.fit_to_limit(recipe, found, speeds, cores=cores)
    seconds = starting_config.forecast(recipe, found, speeds, cores=cores)
    total = sum(seconds.values())
    length = format_seconds(total) if total >= 3600 else f"{max(1, round(total / 60))} min"
    time_text = f"about {length} on this machine, from one measured step of each network; the CRF by a rule"
    text = starting_config.write_yaml(recipe, found, path, device=device, time_text=time_text)
    starting_config.load_yaml(text)  # what does not load is not written
    if found.new_labels is not None:
        write_atomic(found.root / "labels.csv", found.new_labels.encode())
        output.tell(f"wrote {folder / 'labels.csv'}: each image's label is the name of its folder")
    write_atomic(path, text.encode())
    output.document |= {
        "images": len(found.listing.images),
        "classes": found.class_counts,
        "masks": found.num_masks,
        "labels_written": found.new_labels is not None,
        "device": device,
        "backbone": recipe.backbone,
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
    }
    output.tell(f"wrote {path}: {recipe.why}")
    output.tell(f"a run takes {time_text}")
    if not has_gpu and total > 3600:
        output.tell("  that is more than an hour: take fewer images, or a machine with a GPU")
    output.tell(f"next: wsss data check {path}\n      wsss run {path}")
