"""``wsss push``: an exported segmenter to a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, as_path
from pipeline.cli.output import get_output


def push(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="DIR", parser=as_path, help="Folder that wsss export wrote; it is checked first.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Of the commit.")] = "wsss export",
    as_json: JsonOption = False,
) -> None:
    """Upload an exported model with its card to the Hugging Face Hub (HF_ENDPOINT for another), as one commit.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from pipeline.delivery.hub import push_export

    output = get_output(context)
    output.document = {"model": model, "repo": repo, "url": None}
    with output.progress("push") as progress:
        output.document["url"] = push_export(model, repo, private=private, message=message, progress=progress)
    output.tell(f"{model} is at {output.document['url']}")
