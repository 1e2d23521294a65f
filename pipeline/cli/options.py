"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def as_path(text: str | Path) -> Path:
    """The ``parser`` of every option and argument that is a path: ``~`` and ``$VAR`` mean what they mean in a shell.

    Raises:
        InputError: the path means nothing.
    """
    from stages.contracts import expand_path

    return expand_path(text)


ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file, shipped config, or a run: its name or last.")
]

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
