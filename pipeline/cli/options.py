"""Arguments and options that several commands share."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.engine.invocation import DEFAULT_ARTIFACTS


def as_path(text: str | Path) -> Path:
    """The ``parser`` of every option and argument that is a path: ``~`` and ``$VAR`` mean what they mean in a shell.

    Raises:
        InputError: the path means nothing.
    """
    from stages.contracts import expand_path

    return expand_path(text)


def complete_config(incomplete: str) -> list[str]:
    """What CONFIG may be, for the shell: shipped names, YAML files beside what was typed, runs of the default store."""
    from pipeline.config.run_config import shipped_configs

    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    files = [str(path) for path in folder.glob("*.y*ml")] + [f"{path}/" for path in folder.glob("*/")]
    runs = Path(os.environ.get("WSSS_ARTIFACTS") or DEFAULT_ARTIFACTS).glob("runs/*.json")
    names = [*(path.stem for path in shipped_configs()), *files, *(path.stem for path in runs), "last"]
    return sorted(name for name in names if name.startswith(incomplete))


ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file, shipped config, or a run: its name or last.",
        autocompletion=complete_config,
    ),
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


class PageColours(enum.StrEnum):
    """The palette of a page; mask files always have VOC's."""

    SAFE = "safe"
    VOC = "voc"


PaletteOption = Annotated[
    PageColours, typer.Option("--palette", help="Colours of the classes: safe for colour-blind readers, or VOC's.")
]
