"""``wsss submission``: make the archive for PASCAL VOC's test server, or check anybody's."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import ArtifactsOption, JsonOption, OverridesOption, as_path
from pipeline.cli.output import get_output, load_run
from pipeline.engine.invocation import DEFAULT_ARTIFACTS, write_invocation

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.store.artifacts import Store


class CompetitionName(enum.StrEnum):
    """Which of VOC's segmentation competitions."""

    COMP5 = "comp5"
    COMP6 = "comp6"


def submission(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="Pack this run's predictions, or check against its images.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", parser=as_path, help="The .tar.gz to write.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=as_path, help="Check this archive, whoever made it.")
    ] = None,
    competition: Annotated[
        CompetitionName | None, typer.Option(help="comp5: trained on VOC trainval alone; comp6 (default): more.")
    ] = None,
    image_list: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=as_path, help="The test list, one id a line.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=as_path, help="The images, to compare sizes with.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=as_path, help="Pack these <id>.png instead.")
    ] = None,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Pack the test predictions of a run (see evaluate.predictions) for VOC2012's test server, or check an archive.

    --image-list and --images go with --check and --predictions; --predictions takes what wsss predict CONFIG wrote.

    \b
    wsss submission CONFIG --out results.tar.gz [--predictions DIR]
    wsss submission --check results.tar.gz [--image-list test.txt] [--images JPEGImages]
    wsss submission CONFIG --check results.tar.gz
    """  # noqa: D301 - \b keeps the lines apart in click's help
    files = {"--image-list": image_list, "--images": images}
    if check is not None:
        _refuse({"--out": out, "--predictions": predictions}, "--check writes nothing; leave one of the two away")
        _refuse(files if config is not None else {}, "CONFIG knows its own; leave one of the two away")
    elif config is None or out is None:
        raise typer.BadParameter("expected CONFIG --out FILE.tar.gz, or --check FILE")
    else:
        _refuse({} if predictions else files, "it belongs to --check or --predictions; CONFIG knows its own")

    from pipeline.delivery.submission import check_submission, expected_of_run, make_submission, submit_run
    from pipeline.store.artifacts import open_store
    from stages.scoring.submission.reference import Expected, ImageFolder, read_test_list

    def open_run() -> tuple[RunConfig, Store, str]:
        invocation = write_invocation(str(config), overrides, artifacts)
        return load_run(str(config), overrides, artifacts), open_store(artifacts), invocation

    def expected() -> Expected:
        if config is None or image_list is not None or images is not None:
            ids = None if image_list is None else read_test_list(image_list)
            return Expected(ids=ids, size_of=None if images is None else ImageFolder(images).size_of)
        return expected_of_run(*open_run())

    output = get_output(context)
    if check is not None:
        output.document = {"archive": check, "problems": [], "warnings": []}
        found = check_submission(check, expected(), None if competition is None else competition.value)
        output.document |= {
            "competition": found.competition,
            "num_masks": len(found.masks),
            "counts": found.counts,
            "problems": found.problems(),
            "warnings": found.warnings,
        }
        found.raise_problems(check)
        output.tell(f"{check} is fine: {len(found.masks):,} masks for {found.competition}")
    elif out is not None:
        output.document = {"config": config, "archive": None}
        run, for_ = open_run(), (competition or CompetitionName.COMP6).value
        if predictions is None:
            made = submit_run(*run, out, competition=for_)
        else:
            made = make_submission(run[0], predictions, expected(), out, competition=for_)
        output.document |= dataclasses.asdict(made)
        output.tell(f"{made.archive}: {made.num_masks:,} masks for {made.competition}, checked\n  masks: {made.masks}")
    for warning in output.document["warnings"]:
        output.tell(f"  warning: {warning}")


def _refuse(options: dict[str, Path | None], why: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(why, param_hint=name)
