"""``wsss artifacts`` and ``wsss config``: look at what is stored and at what a config means."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import ArtifactsOption, ConfigArgument, JsonOption, OverridesOption
from pipeline.cli.output import get_output, load_run, plain
from pipeline.engine.invocation import DEFAULT_ARTIFACTS
from stages.errors import DamagedFileError, InputError, MissingArtifactError

if TYPE_CHECKING:
    from pipeline.store.artifacts import Artifact, Store

artifacts_app = typer.Typer(help="Look after the artifact store.", no_args_is_help=True, rich_markup_mode=None)
config_app = typer.Typer(help="Look at a config.", no_args_is_help=True, rich_markup_mode=None)

StageOrKey = Annotated[str, typer.Argument(metavar="KEY", help="Key of an artifact, or its first digits.")]


@artifacts_app.command("list")
def list_artifacts(
    context: typer.Context, artifacts: ArtifactsOption = DEFAULT_ARTIFACTS, as_json: JsonOption = False
) -> None:
    """All artifacts: stage, key, size, when they were built."""
    from pipeline.report.tables import format_value
    from pipeline.store.artifacts import open_store

    output = get_output(context)
    damaged = list[str]()
    found = list(open_store(artifacts).artifacts(damaged=damaged.append))
    output.document = {"artifacts": [_describe(artifact) for artifact in found], "damaged": damaged}
    for artifact in found:
        size = format_value(artifact.size_bytes, "bytes")
        output.tell(f"{artifact.stage:18}{artifact.key}  {size:>8}  {artifact.run.get('started', '')}")
    total = format_value(sum(artifact.size_bytes for artifact in found), "bytes")
    output.tell(f"{len(found)} artifacts, {total}, in {artifacts}")
    for problem in damaged:
        output.tell(f"  warning: damaged, and left out: {problem}")


@artifacts_app.command("show")
def show_artifact(
    context: typer.Context, key: StageOrKey, artifacts: ArtifactsOption = DEFAULT_ARTIFACTS, as_json: JsonOption = False
) -> None:
    """The manifest of one artifact."""
    from pipeline.store.artifacts import open_store

    output = get_output(context)
    store = open_store(artifacts)
    stage, whole_key = _find(store, key)
    damage: list[str] = []
    artifact = store.lookup(stage, whole_key, damaged=damage.append)
    if artifact is None:
        found = damage[0] if damage else f"{stage} {whole_key} is not there any more"
        raise MissingArtifactError(f"{found}; run the stage {stage} again")
    output.document = {**_describe(artifact), "manifest": dict(artifact.manifest)}
    output.tell(json.dumps(plain(output.document), indent=1, ensure_ascii=False))


@artifacts_app.command("verify")
def verify_artifacts(
    context: typer.Context,
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="One artifact; default all.")] = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Read every file and compare it with its manifest, and the records of runs; exit 4 when one differs."""
    from pipeline.engine.records import read_runs
    from pipeline.store.artifacts import open_store

    output = get_output(context)
    store = open_store(artifacts)
    found = list(store.folders()) if key is None else [_find(store, key)]
    problems = [problem for where in found for problem in store.verify(*where)]
    if key is None:
        read_runs(store, damaged=problems.append)
    output.document = {"verified": len(found), "problems": problems}
    if problems:
        raise DamagedFileError("not as it was written; remove each artifact or file named here and run again", problems)
    output.tell(f"{len(found)} artifacts are as they were written")


@artifacts_app.command("prune")
def prune_artifacts(
    context: typer.Context,
    keep: Annotated[int | None, typer.Option(min=0, help="Newest runs to keep; default all.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it only say what would be removed.")] = False,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Remove what no kept run needs: artifacts, unfinished work, what was set aside."""
    from pipeline.engine.records import prune
    from pipeline.report.tables import format_value
    from pipeline.store.artifacts import open_store

    output = get_output(context)
    store = open_store(artifacts)
    if store.is_mirrored:
        raise InputError(
            f"{store.location}: prune works on folders only, since it cannot know the runs of every machine; see what "
            "is there with `wsss artifacts list`, and remove STAGE/KEY folders with the tool of your object store"
        )
    removals = prune(store, keep=keep, dry_run=not yes)
    size = sum(removal.size_bytes for removal in removals)
    output.document = {"removed": yes, "size_bytes": size, "entries": [dataclasses.asdict(r) for r in removals]}
    for removal in removals:
        output.tell(f"{format_value(removal.size_bytes, 'bytes'):>8}  {removal.path}  ({removal.reason})")
    verb = "removed" if yes else "would be removed; add --yes to remove it"
    output.tell(f"{format_value(size, 'bytes')} in {len(removals)} places {verb}")


def _describe(artifact: Artifact) -> dict[str, Any]:
    return {
        "stage": artifact.stage,
        "key": artifact.key,
        "path": artifact.path,
        "size_bytes": artifact.size_bytes,
        "started": artifact.run.get("started"),
        "seconds": artifact.run.get("seconds"),
    }


def _find(store: Store, text: str) -> tuple[str, str]:
    """Stage and key of the one artifact that ``text`` means: a key, its first digits, or stage/key."""
    stage, _, key = text.strip("/").rpartition("/")
    stage = Path(stage).name
    found = [where for where in store.folders() if where[1].startswith(key) and stage in ("", where[0])]
    if not found:
        raise MissingArtifactError(f"no artifact {text} in {store.location}; `wsss artifacts list` shows what is there")
    if len(found) > 1:
        raise InputError(f"{text} means {len(found)} artifacts; give more digits", ["/".join(where) for where in found])
    return found[0]


@config_app.command("show")
def show_config(
    context: typer.Context,
    config: ConfigArgument,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """The whole config with every default, as YAML."""
    import yaml

    output = get_output(context)
    values = load_run(config, overrides, artifacts).model_dump(mode="json")
    output.document = {"config": config, "values": values}
    output.tell(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())


@config_app.command("check")
def check_config(
    context: typer.Context,
    config: ConfigArgument,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Check a config, its data lists, weights and networks, without decoding an image."""
    from pipeline.config.preflight import preflight
    from pipeline.engine.tracking import check_trackers

    output = get_output(context)
    output.document = {"config": config}
    run = load_run(config, overrides, artifacts)
    check_trackers(run.track)
    listing = preflight(run)
    splits = {name: len(ids) for name, ids in listing.splits.items()}
    output.document |= {"classes": list(listing.classes.names), "images": splits, "warnings": list(listing.warnings)}
    images = ", ".join(f"{count} {name}" for name, count in splits.items())
    output.tell(f"{config} is fine: {len(listing.classes.names)} classes; images: {images}")
    for warning in listing.warnings:
        output.tell(f"  warning: {warning}")
