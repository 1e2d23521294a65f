"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped config.")]

OverridesOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one value of the config; repeatable.")
]

ArtifactsOption = Annotated[
    str,
    typer.Option(
        "--artifacts",
        metavar="DIR",
        envvar="WSSS_ARTIFACTS",
        help="Root of the artifact store: a folder, or a URL as s3://BUCKET/FOLDER.",
    ),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
"""Read by ``main`` from the command line, since it also decides how a wrong command line is reported."""
