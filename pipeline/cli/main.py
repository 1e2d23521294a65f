"""The command ``wsss``: parse, call, and turn every end into one exit code.

0 done; 2 the user's input is wrong; 3 a needed artifact is missing; 4 the machine failed; 1 a fault of ours;
130 interrupted.  With ``--json`` stdout gets exactly one JSON document, also for errors, and logs go to stderr.
Commands import what they need when they run, so that ``--help`` and config errors answer at once.
"""

from __future__ import annotations

import importlib.metadata
import io
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from pipeline.cli.artifacts import artifacts_app, config_app
from pipeline.cli.compare import compare
from pipeline.cli.data import data_app
from pipeline.cli.doctor import doctor
from pipeline.cli.export import export
from pipeline.cli.init import init
from pipeline.cli.masks import masks_app
from pipeline.cli.output import INTERRUPTED, Output, run_document
from pipeline.cli.predict import predict
from pipeline.cli.push import push
from pipeline.cli.reproduce import reproduce
from pipeline.cli.run import report, run, stage, status
from pipeline.cli.runs import runs
from pipeline.cli.score import score
from pipeline.cli.submission import submission
from pipeline.cli.up import down, up

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""click's UsageError; some releases of typer bring a click of their own, and only this class is public in all."""

app = typer.Typer(
    name="wsss",
    help="Semantic segmentation from image-level labels: from raw images to a measured mIoU, in one command.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich's help costs 0.1 s
    pretty_exceptions_enable=False,
)
for command in (
    init,
    run,
    runs,
    stage,
    status,
    report,
    predict,
    export,
    push,
    compare,
    score,
    reproduce,
    submission,
    doctor,
    up,
    down,
):
    app.command()(command)
app.add_typer(data_app, name="data")
app.add_typer(masks_app, name="masks")
app.add_typer(artifacts_app, name="artifacts")
app.add_typer(config_app, name="config")


def version() -> str:
    """The installed version."""
    try:
        return importlib.metadata.version("wsss-pipeline")
    except importlib.metadata.PackageNotFoundError:
        return "0+checkout"


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"wsss {version()}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that belong to no command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of ``arguments`` (by default those of the process) and return its exit code.

    This is the only place where errors become words.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # words for people must not fail at a terminal's encoding
    output = Output(is_json="--json" in words and "--help" not in words)
    if words[:1] in (["run"], ["stage"]):
        output.document = run_document(None)  # a wrong command line gets the same keys as any other end
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(words, prog_name="wsss", obj=output, standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except _UsageError as error:  # a wrong command line
        if output.is_json:
            output.finish(code=2, message=getattr(error, "format_message", error.__str__)())
        else:
            error.show()  # type: ignore[attr-defined]  # every click error has it
        return 2
    except Exception as error:  # the one place for every error
        from pipeline.engine.failures import InternalFailure, deliberate

        failure = deliberate(error, " ".join(["wsss", *words[:1]]))
        message = failure.message
        if isinstance(failure, InternalFailure):
            typer.echo(failure.trace, err=True)
            message = f"a fault of ours: {message}; the traceback is above, please report it"
        output.finish(code=failure.exit_code, message=message, problems=failure.problems)
        return failure.exit_code
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == INTERRUPTED:
        again = "with --force the same command starts over, without it what is in the store is used"
        next_time = again if "--force" in words else "the same command continues where it stopped"
        output.finish(code=INTERRUPTED, message=f"interrupted; {next_time}")
    elif output.document and not code:
        output.finish()
    return int(code or 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C, so that what was started is ended too."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
