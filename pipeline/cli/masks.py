"""``wsss masks``: hand masks to an annotation tool, take corrected ones back, and say which are worth it."""

from __future__ import annotations

import enum
import shlex
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import ArtifactsOption, ConfigArgument, JsonOption, OverridesOption, as_path
from pipeline.cli.output import Output, get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS
from stages.errors import InputError

if TYPE_CHECKING:
    from pipeline.delivery.masks import RunMasks
    from stages.contracts import ClassList, ImageRecord

masks_app = typer.Typer(help="Masks to annotators and back.", no_args_is_help=True, rich_markup_mode=None)


class Format(enum.StrEnum):
    """Whose format."""

    COCO = "coco"
    VOC = "voc"
    LABELSTUDIO = "labelstudio"
    CVAT = "cvat"


class Shapes(enum.StrEnum):
    """How a mask is written."""

    MASKS = "masks"
    POLYGONS = "polygons"


FormatOption = Annotated[Format, typer.Option("--format", help="Of which tool.")]
ImagesOption = Annotated[
    Path | None, typer.Option("--images", parser=as_path, metavar="DIR", help="Images, without a config.")
]
ClassesOption = Annotated[
    str | None, typer.Option("--classes", metavar="A,B,…", help="Their foreground classes in order.")
]


@masks_app.command("export")
def export_masks(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="CONFIG|FOLDER", help="A run, or a folder of masks of indices.")],
    format: FormatOption,
    out: Annotated[Path, typer.Option("--out", parser=as_path, metavar="DIR", help="New folder to write to.")],
    shapes: Annotated[Shapes, typer.Option(help="Exact masks, or polygons (IoU at least 0.97).")] = Shapes.MASKS,
    predictions: Annotated[
        bool, typer.Option("--predictions", help="The run's predictions of val and test, not its pseudo-masks.")
    ] = False,
    ids: Annotated[
        Path | None, typer.Option(parser=as_path, metavar="FILE", help="These images alone, an id a line.")
    ] = None,
    images: ImagesOption = None,
    classes: ClassesOption = None,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Write masks as annotations for COCO tools, Label Studio or CVAT, or as VOC's folder."""
    from stages.annotation.exchange import export_masks, find_masks
    from stages.data.subsets import read_ids

    output = get_output(context)
    output.document = {"source": source, "format": format.value, "out": out}
    folder = as_path(source)
    if folder.is_dir():
        if predictions or overrides:
            raise InputError(f"{source} is a folder of masks; --predictions and --set belong to a CONFIG")
        masks = find_masks(folder)
        records, names = _named(images, classes)
        root = images
    else:
        from pipeline.delivery.masks import open_masks

        _refuse_named(images, classes)
        found = open_masks(source, overrides, artifacts, doing="masks export")
        masks = found.predictions() if predictions else found.pseudo_masks()
        records, names, root = found.images.index.images, found.images.index.classes, found.images.root
    if ids is not None:
        wanted = read_ids(ids, "--ids")
        if missing := [f"{image_id}: there is no mask of it" for image_id in wanted if image_id not in masks]:
            raise InputError(f"{ids}: names images that have no mask; remove their lines", missing[:20])
        masks = {image_id: masks[image_id] for image_id in wanted}
    with output.progress("masks export") as progress:
        done = export_masks(
            masks, records, names, out, format=format.value, shapes=shapes.value, root=root, progress=progress
        )
    output.document |= {"images": done.num_images, "objects": done.num_objects, "files": list(done.files)}
    output.tell(f"{done.num_images:,} masks, {done.num_objects:,} objects: {', '.join(done.files)} in {out}")
    if format is Format.LABELSTUDIO and done.image_folder is not None:
        root = shlex.quote(str(done.image_folder.parent))
        output.tell(
            "start Label Studio with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true "
            f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={root}\nand give the project the source storage 'Local files' "
            f"with the path {done.image_folder}; then import tasks.json"
        )


@masks_app.command("import")
def import_masks(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(parser=as_path, metavar="FILE|FOLDER", help="What the tool wrote, or a zip.")
    ],
    format: FormatOption,
    out: Annotated[Path, typer.Option("--out", parser=as_path, metavar="DIR", help="Folder of masks to write to.")],
    config: Annotated[
        str | None, typer.Option("--config", metavar="CONFIG", help="Whose images and classes they must fit.")
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(parser=as_path, metavar="FILE", help="Write the ids here, for gain_ext's pixel_list."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace masks and list that are there.")] = False,
    images: ImagesOption = None,
    classes: ClassesOption = None,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Read corrected annotations as masks of class indices; all of them fit, or nothing is written."""
    from stages.annotation.exchange import import_masks
    from stages.contracts import write_atomic

    output = get_output(context)
    output.document = {"source": source, "format": format.value, "out": out}
    found = None
    if config is None:
        if overrides:
            raise InputError("--set changes a config; name it with --config")
        records, names = _named(images, classes)
    else:
        from pipeline.delivery.masks import open_masks

        _refuse_named(images, classes)
        found = open_masks(config, overrides, artifacts, doing="masks import")
        records, names = found.images.index.images, found.images.index.classes
    if ids is not None and ids.exists() and not force:
        raise InputError(f"{ids}: is there already; name another file, or replace it with --force")
    with output.progress("masks import") as progress:
        read = import_masks(source, records, names, format=format.value, progress=progress)
    read.write(out, force=force)
    if ids is not None:
        write_atomic(ids, "".join(f"{image_id}\n" for image_id in read.masks).encode())
    output.document |= {
        "images": len(read.masks),
        "empty": list(read.empty),
        "open": read.num_open,
        "other_classes": {image_id: list(names) for image_id, names in read.strange.items()},
    }
    output.tell(f"{len(read.masks):,} masks in {out}" + ("" if ids is None else f", their ids in {ids}"))
    if read.empty:
        output.tell(f"  nothing is drawn in {_some(read.empty)}: background")
    if read.num_open:
        output.tell(f"  {read.num_open} images wait for somebody to submit them")
    if read.strange:
        some = _some([f"{image_id}: {', '.join(names)}" for image_id, names in read.strange.items()])
        output.tell(f"  warning: classes are drawn that the images are not labelled with ({some}); correct the labels")
    _tell_use(output, found, out, ids, read.masks)


def _tell_use(output: Output, found: RunMasks | None, out: Path, ids: Path | None, image_ids: Collection[str]) -> None:
    """What to add to the command of a run, so that it learns the masks."""
    from pipeline.delivery.masks import as_value

    segmenter = [f"train_segmenter.corrected_masks={as_value(out)}"]
    output.document |= {"use": {"segmenter": segmenter}}
    output.tell(f"the segmenter learns them with\n  {_as_options(segmenter)}")
    if found is None:
        return
    if others := sorted(set(image_ids) - set(found.images.index.splits["train"])):
        output.tell(
            f"  warning: {_some(others)}: no training image, which no training takes; move such masks out of {out}"
        )
    if ids is None:
        output.tell("with --ids FILE also gain_ext's classifier learns them")
    elif (use := found.pixel_labels_use(out, ids)) is not None:
        output.document["use"]["gain_ext"] = list(use.overrides)
        output.tell(f"gain_ext's classifier learns them{use.first} with\n  {_as_options(use.overrides)}")


def _as_options(overrides: Iterable[str]) -> str:
    return " ".join(f"--set {shlex.quote(override)}" for override in overrides)


@masks_app.command("suggest")
def suggest_masks(
    context: typer.Context,
    config: ConfigArgument,
    count: Annotated[int, typer.Argument(metavar="N", min=1, help="How many images.")],
    out: Annotated[Path | None, typer.Option("--out", parser=as_path, metavar="FILE", help="For their ids.")] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(parser=as_path, metavar="DIR", help="<id>.png of the training images; else made now."),
    ] = None,
    overrides: OverridesOption = None,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Name the training images that are worth a correction: attention, pseudo-mask and prediction agree least."""
    from pipeline.delivery.masks import open_masks
    from stages.contracts import write_atomic

    output = get_output(context)
    output.document = {"config": config, "out": out}
    if out is not None and out.exists():
        raise InputError(f"{out}: is there already; name another file")
    with output.progress("masks suggest") as progress:
        found = open_masks(config, overrides, artifacts, doing="masks suggest").least_agreed(
            count, predictions, progress
        )
    if out is not None:
        write_atomic(out, "".join(f"{one.image_id}\n" for one in found).encode())
    output.document |= {"images": [{"id": one.image_id, "agreement": one.value, "why": one.why} for one in found]}
    width = max((len(one.image_id) for one in found), default=0)
    for one in found:
        output.tell(f"{one.image_id:{width}}  {one.value * 100:5.1f} %  {one.why}")


def _named(images: Path | None, classes: str | None) -> tuple[Sequence[ImageRecord], ClassList]:
    """Images and classes of the command line."""
    if images is None or classes is None:
        raise InputError(
            "without a config, say where the images are (--images DIR) and what the classes are (--classes)"
        )
    from stages.annotation.exchange import check_class_names, list_images

    return list_images(images), check_class_names([name.strip() for name in classes.split(",")])


def _refuse_named(images: Path | None, classes: str | None) -> None:
    if images is not None or classes is not None:
        raise InputError("--images and --classes stand instead of a config, which knows its own; leave them out")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
