"""``wsss export``: the trained segmenter of a config as a folder for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import ArtifactsOption, ConfigArgument, JsonOption, OverridesOption, as_path
from pipeline.cli.output import get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS


def export(
    context: typer.Context,
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", parser=as_path, help="Folder to write to.")],
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write model.onnx too (extra 'export').")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in DIR.")] = False,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Write the trained segmenter as model.safetensors, model.onnx, config.json and a model card."""
    from pipeline.delivery.trained_segmenter import find_segmenter
    from stages.scoring.export import export_segmenter

    output = get_output(context)
    output.document = {"config": config, "out": out}
    found = find_segmenter(config, overrides, artifacts, doing="export")
    with output.progress("export") as progress:
        record = export_segmenter(
            found.artifact.path,
            out,
            prediction=found.prediction,
            provenance=found.provenance(),
            progress=progress,
            onnx=onnx,
            sample=found.sample_image() if onnx else None,
            force=force,
        )
    files = [*record.files, "README.md", "config.json"]
    agreement = None if record.onnx is None else record.onnx.model_dump(mode="json")
    output.document |= {"key": found.artifact.key, "files": files, "onnx": agreement}
    output.tell(f"exported {found.artifact.key}: {', '.join(files)} in {out}")
    output.tell(f"use it with: wsss predict --model {out} IMAGE... --out DIR")
