"""``wsss submission``: make the archive for PASCAL VOC's test server, or check anybody's."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import ArtifactsOption, JsonOption, OverridesOption
from pipeline.cli.output import Output, get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS, write_invocation

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.store.artifacts import Store
    from stages.scoring.submission.reference import Expected


class CompetitionName(enum.StrEnum):
    """Which of VOC's segmentation competitions."""

    COMP5 = "comp5"
    COMP6 = "comp6"


def submission(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG", help="The run whose test predictions are packed, or whose images are checked against."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The .tar.gz to write.")] = None,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FILE", help="Check this archive, whoever made it; write nothing.")
    ] = None,
    competition: Annotated[
        CompetitionName | None,
        typer.Option(help="comp6 (default): trained on anything but test; comp5: on VOC's trainval images alone."),
    ] = None,
    image_list: Annotated[
        Path | None,
        typer.Option("--image-list", metavar="FILE", help="The test list, one id a line (--check, --predictions)."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="The images, to compare sizes with (--check, --predictions)."),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", metavar="DIR", help="Pack these <id>.png, e.g. of wsss predict CONFIG."),
    ] = None,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Pack the test predictions of a run (see evaluate.predictions) for VOC2012's test server, or check an archive.

    \b
    wsss submission CONFIG --out results.tar.gz [--predictions DIR]
    wsss submission --check results.tar.gz [--image-list test.txt] [--images JPEGImages]
    wsss submission CONFIG --check results.tar.gz
    """  # noqa: D301 - \b keeps the lines apart in click's help
    output = get_output(context)
    words = _Words(config, overrides or (), artifacts, image_list, images)
    if check is not None:
        for flag, value in (("--out", out), ("--predictions", predictions)):
            _refuse(flag, value, "--check writes nothing; leave one of the two away")
        if config is not None:
            words.refuse_files("CONFIG knows its own; leave one of the two away")
        _check(output, words, check, competition)
        return
    if config is None or out is None:
        raise typer.BadParameter("expected CONFIG --out FILE.tar.gz, or --check FILE")
    if predictions is None:
        words.refuse_files("it belongs to --check or --predictions; CONFIG knows its own")
    _make(output, words, out, competition or CompetitionName.COMP6, predictions)


@dataclass(frozen=True)
class _Words:
    """What the user named to compare with."""

    config: str | None
    overrides: Sequence[str]
    artifacts: str
    image_list: Path | None
    images: Path | None

    def refuse_files(self, why: str) -> None:
        _refuse("--image-list", self.image_list, why)
        _refuse("--images", self.images, why)

    def open_run(self) -> tuple[RunConfig, Store, str]:
        """The run, its store, and how the user named them."""
        from pipeline.config.run_config import find_config, load_config
        from pipeline.store.artifacts import open_store

        config = str(self.config)
        run = load_config(find_config(config), self.overrides)
        return run, open_store(self.artifacts), write_invocation(config, self.overrides, self.artifacts)

    def expected(self) -> Expected:
        """The files' list and sizes where files are named or no run is, else the run's."""
        from pipeline.delivery.submission import expected_of_files, expected_of_run

        if self.config is None or self.image_list is not None or self.images is not None:
            return expected_of_files(self.image_list, self.images)
        return expected_of_run(*self.open_run())


def _refuse(name: str, value: object, why: str) -> None:
    if value is not None:
        raise typer.BadParameter(why, param_hint=name)


def _make(output: Output, words: _Words, out: Path, competition: CompetitionName, predictions: Path | None) -> None:
    output.document = {"config": words.config, "archive": None}

    from pipeline.delivery.submission import make_submission, submit_run

    run, store, invocation = words.open_run()
    if predictions is None:
        made = submit_run(run, store, invocation, out, competition=competition.value)
    else:
        made = make_submission(run, predictions, words.expected(), out, competition=competition.value)
    output.document |= {
        "archive": made.path,
        "competition": made.competition,
        "masks": made.masks,
        "num_masks": made.num_masks,
        "size_bytes": made.num_bytes,
        "sha256": made.sha256,
        "warnings": made.warnings,
    }
    text = f"{made.path}: {made.num_masks:,} masks for {made.competition}, checked\n  masks: {made.masks}"
    _say(output, text, made.warnings)


def _check(output: Output, words: _Words, file: Path, competition: CompetitionName | None) -> None:
    output.document = {"archive": file, "problems": [], "warnings": []}

    from pipeline.delivery.submission import check_submission

    found = check_submission(file, words.expected(), None if competition is None else competition.value)
    output.document |= {
        "competition": found.competition,
        "num_masks": len(found.masks),
        "counts": found.counts,
        "problems": found.problems(),
        "warnings": found.warnings,
    }
    found.raise_problems(file)
    _say(output, f"{file} is fine: {len(found.masks):,} masks for {found.competition}", found.warnings)


def _say(output: Output, text: str, warnings: Sequence[str]) -> None:
    if not output.is_json:
        output.say(text)
        for warning in warnings:
            output.say(f"  warning: {warning}")
