"""``wsss predict``: masks, overlays and areas for anybody's images, from a config's segmenter or an exported one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import ArtifactsOption, JsonOption, OverridesOption, as_path
from pipeline.cli.output import get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS
from stages.errors import ConfigError, DataError

if TYPE_CHECKING:
    from stages.contracts import Runtime
    from stages.scoring.image_prediction import SegmenterSource
    from stages.scoring.prediction import PredictionConfig
    from stages.scoring.window_prediction import PredictOptions


def predict(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(metavar="[CONFIG] IMAGE...", help="CONFIG (not with --model), then files, folders, patterns."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", parser=as_path, help="Folder to write to.")],
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=as_path, help="What wsss export wrote, not a CONFIG.")
    ] = None,
    scales: Annotated[str | None, typer.Option(metavar="A,B,…", help="Scales to average.")] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Mirror images too.")] = None,
    crf: Annotated[
        str | None, typer.Option(metavar="on|off|PRESET", help="Dense CRF: the config's numbers, none, or a preset.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="N", help="Windows of N px for larger images; 0 never; else 1024 above 2048.")
    ] = None,
    precision: Annotated[str | None, typer.Option(metavar="NAME", help="fp32, bf16 or, on CUDA, fp16.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Predict again what is there, and replace it.")] = False,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu, mps, cuda or cuda:N.")] = None,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Predict anybody's images with a trained segmenter: NAME.png, overlays/NAME.jpg, areas.csv.

    What no option says is done as the config says.
    """
    from pydantic import ValidationError

    from stages.data.pictures import find_pictures
    from stages.scoring.image_prediction import AREAS_FILE, predict_pictures

    output = get_output(context)
    output.document = {"out": out, "model": model}
    images = words if model is not None else words[1:]
    if not images:
        raise typer.BadParameter("name images, folders or patterns" + ("" if model else " after CONFIG"))
    found = find_pictures(images, out)
    source, config, runtime = _find_source(model, words[0], overrides, artifacts)
    given = {"scales": scales and scales.split(","), "flip": flip, "precision": precision, "window_px": window}
    options = _options(config, given, crf)
    if device is not None:
        try:
            runtime = type(runtime).model_validate({**runtime.model_dump(), "device": device})
        except ValidationError as error:
            raise ConfigError(f"--device: expected auto, cpu, mps, cuda or cuda:N, found {device}") from error
    with output.progress("predict") as progress:
        summary = predict_pictures(
            source, found.pictures, options, out=out, progress=progress, runtime=runtime, force=force
        )
    unread = [*found.left_out, *summary.problems]
    output.document |= {
        "predicted": summary.predicted,
        "skipped": summary.skipped,
        "windowed": summary.windowed,
        "unreadable": unread,
        "seconds": round(summary.seconds, 3),
        "images_per_s": round(summary.images_per_s, 3),
        "areas": summary.out / AREAS_FILE,
    }
    there = f", {summary.windowed} of them in windows" if summary.windowed else ""
    there += f", {summary.skipped} were there already" if summary.skipped else ""
    pace = f" in {summary.seconds:.1f} s ({summary.images_per_s:.2f} images/s)" if summary.predicted else ""
    output.tell(f"{summary.predicted} images predicted{pace}{there}: {summary.out}")
    if unread:
        count = f"{len(unread)} image{'s' if len(unread) > 1 else ''}"
        raise DataError(f"{count} could not be read; the others are done", unread)


def _find_source(
    model: Path | None, config: str, overrides: Sequence[str] | None, artifacts: str
) -> tuple[SegmenterSource, PredictionConfig, Runtime]:
    """The segmenter of an exported model, or else of a config, with how it predicts and how it is run."""
    from stages.contracts import Runtime
    from stages.scoring.exported_model import exported_source, read_export, trained_source

    if model is None:
        from pipeline.delivery.trained_segmenter import find_segmenter

        found = find_segmenter(config, overrides, artifacts, doing="predict")
        return trained_source(found.artifact.path), found.prediction, found.run.runtime
    if overrides:
        raise ConfigError("--set changes a CONFIG, and --model stands instead of one; use --scales, --crf, --device …")
    folder, record = read_export(model)
    return exported_source(folder, record), record.prediction, Runtime()


def _options(config: PredictionConfig, given: dict[str, Any], crf: str | None) -> PredictOptions:
    """What the config does, changed by what the command line says; all mistakes at once."""
    from pydantic import ValidationError

    from pipeline.config.yaml_models import explain
    from stages.scoring.window_prediction import PredictOptions

    values = PredictOptions.of(config).model_dump() | {name: it for name, it in given.items() if it is not None}
    if crf == "off":
        values["crf"] = None
    elif crf is not None:
        values["crf"] = config.crf_config.model_dump() if crf == "on" else {"preset": crf}
    try:
        return PredictOptions.model_validate(values)
    except ValidationError as error:
        texts = [text for _, text in explain(error, PredictOptions, values)]
        problems = [f"--{text.replace('window_px', 'window').replace('crf.preset', 'crf')}" for text in texts]
        raise ConfigError("the options of the prediction are wrong", problems) from error
