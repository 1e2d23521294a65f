"""``wsss data``: make, fetch, convert and check data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import ArtifactsOption, ConfigArgument, JsonOption, OverridesOption, as_path
from pipeline.cli.output import get_output, load_run
from pipeline.engine.invocation import DEFAULT_ARTIFACTS
from stages.errors import ConfigError, DataError, InputError

data_app = typer.Typer(help="Make, fetch, convert and check data sets.", no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="DIR", parser=as_path, help="Folder to write to.")]


@data_app.command()
def synthetic(
    context: typer.Context,
    folder: Folder,
    num_train: Annotated[int | None, typer.Option(help="Training images.")] = None,
    num_val: Annotated[int | None, typer.Option(help="Validation images.")] = None,
    size_px: Annotated[int | None, typer.Option(help="Height and width in pixels.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Foreground classes.")] = None,
    max_objects: Annotated[int | None, typer.Option(help="Most objects in an image.")] = None,
    head_ratio: Annotated[float | None, typer.Option(help="Size of the vivid head.")] = None,
    body_contrast: Annotated[float | None, typer.Option(help="Strength of the body's class texture.")] = None,
    context_bias: Annotated[float | None, typer.Option(help="Share of one class that has its own background.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed gives another data set of the same kind.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the embedded data set "heads and bodies" in VOC layout; the same options give the same bytes."""
    from pydantic import ValidationError

    from pipeline.config.yaml_models import explain
    from stages.data.adapters.synthetic import SyntheticConfig
    from stages.data.adapters.synthetic_images import generate_synthetic

    given = {name: context.params.get(name) for name in SyntheticConfig.model_fields}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        config = SyntheticConfig(**options)
    except ValidationError as error:
        problems = [
            f"{'--' + str(path[0]).replace('_', '-') + ': ' if path else ''}{text}"
            for path, text in explain(error, SyntheticConfig, options)
        ]
        raise ConfigError("the options of the data set are wrong", problems) from error
    generate_synthetic(config, folder)
    output = get_output(context)
    output.document = {"folder": folder, "num_train": config.num_train, "num_val": config.num_val}
    output.tell(f"{config.num_train} training and {config.num_val} validation images in {folder}")


@data_app.command()
def voc(context: typer.Context, folder: Folder, as_json: JsonOption = False) -> None:
    """Download PASCAL VOC 2012 and SBD into DIR, or say what to fetch by hand."""
    from stages.data.download import fetch_voc

    output = get_output(context)
    with output.progress("data voc") as progress:
        root = fetch_voc(folder, progress)
    output.document = {"root": root}
    output.tell(f"PASCAL VOC 2012 with trainaug is in {root}; use it with --set data.root={root}")


@data_app.command()
def sbd(
    context: typer.Context,
    sbd_folder: Annotated[Path, typer.Argument(metavar="SBD", parser=as_path, help="SBD's folder with cls/*.mat.")],
    voc_folder: Annotated[
        Path, typer.Argument(metavar="VOC2012", parser=as_path, help="The folder that has JPEGImages.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Convert SBD's .mat masks into VOC2012/SegmentationClassAug and write trainaug.txt."""
    from stages.data.sbd import convert_sbd

    output = get_output(context)
    with output.progress("data sbd") as progress:
        num_images = convert_sbd(sbd_folder, voc_folder, progress)
    output.document = {"folder": voc_folder, "num_images": num_images}
    output.tell(f"trainaug: {num_images} images in {voc_folder}")


@data_app.command()
def check(
    context: typer.Context,
    config: ConfigArgument,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Check lists, labels, every image, every mask and every corrected mask of a config; say what was understood."""
    from dataclasses import asdict

    from stages.data.check import check_data
    from stages.data.corrected import check_corrected_listed
    from stages.data.records import PROBLEMS_SHOWN

    run = load_run(config, overrides, artifacts)
    output = get_output(context)
    output.document = {"config": config, "understood": None, "problems": [], "warnings": []}
    with output.progress("data check") as progress:
        found = check_data(run.data, progress, processes=run.runtime.processes)
        if (folder := run.train_segmenter.corrected_masks) is not None:
            try:
                for text in check_corrected_listed(folder, run.data.scan().listing):
                    progress.warn(text)
            except InputError as error:
                for text in error.problems or (error.message,):
                    found.problems.add("corrected mask", f"train_segmenter.{text}")
    problems = found.problems.lines()
    output.document |= {"understood": asdict(found.overview), "problems": problems, "warnings": progress.warnings}
    output.tell("\n".join(found.overview.lines()))
    if problems:
        count = f"{len(problems):,} problem{'s' if len(problems) > 1 else ''}"
        shown = problems if output.is_json else found.problems.lines(PROBLEMS_SHOWN)
        raise DataError(f"{count} in the data set of {config}", shown)
    count = len(progress.warnings)
    but = f" but for the {'warning' if count == 1 else f'{count:,} warnings'} above" if count else ""
    output.tell(f"the data set of {config} is fine{but}")
