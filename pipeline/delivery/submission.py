"""The test server's archive of a run: from cached predictions to one checked file.

Reads the artifacts of ``prepare_data`` and ``evaluate``; writes one tar.gz, atomically and only if it passes the check.
"""

from __future__ import annotations

import hashlib
import io
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.run_config import RunConfig
from pipeline.engine.plan import Plan
from pipeline.engine.run import Run
from pipeline.store.artifacts import Store
from stages.contracts import open_image_set, write_atomic
from stages.data.adapters.voc import VOC_CLASSES, VocConfig
from stages.data.records import some
from stages.errors import ConfigError, DamagedFileError, DataError, InputError, MissingArtifactError
from stages.scoring.submission.archive import Competition, build_archive, voc_values
from stages.scoring.submission.check import Findings, check_archive, check_stream
from stages.scoring.submission.reference import Expected

SUFFIXES = (".tar.gz", ".tgz")


@dataclass(frozen=True)
class Submission:
    """An archive that was written."""

    archive: Path
    competition: Competition
    masks: str
    """Which masks were packed, in words."""
    num_masks: int
    size_bytes: int
    sha256: str
    warnings: tuple[str, ...]


def archive_command(run: RunConfig, invocation: str = "CONFIG") -> str | None:
    """The command that makes the archive of ``run``; None for one that predicts no images of VOC's test list."""
    if not isinstance(run.data, VocConfig) or "test" not in run.evaluate.splits or not run.evaluate.segmentation:
        return None
    return f"wsss submission {invocation} --out {shlex.quote(f'{run.name}.tar.gz')}"


def submit_run(run: RunConfig, store: Store, invocation: str, out: Path, *, competition: Competition) -> Submission:
    """Write the archive of the predictions that the store holds; builds nothing.

    ``invocation`` is config and options as the user wrote them, for the command in an error.

    Raises:
        InputError: ``out`` has another ending, or the data is not VOC's.
        MissingArtifactError: the test images have not been predicted; the command that does is in the message.
        DamagedFileError: the predictions do not read back; the command that makes them anew is in the message.
    """
    _require_test_split(run, _require_voc(run, out), invocation)
    finished = Run(run, store)
    if not {"prepare_data", "evaluate"} <= set(finished.finished_artifacts()):
        command = f"wsss run {invocation}"
        raise MissingArtifactError(f"the test images have not been predicted yet; predict them with: {command}")
    folder = store.require("evaluate", finished.plan.keys["evaluate"]).path / "predictions"
    try:
        masks = run.evaluate.describe_predictions()
        expected = _test_images(finished.plan, store)
        return make_submission(run, folder, expected, out, competition=competition, masks=masks)
    except DataError as error:
        command = f"wsss run {invocation} --force evaluate"
        text = f"the cached predictions are damaged: {error.message}; make them anew with: {command}"
        raise DamagedFileError(text, error.problems) from error


def make_submission(
    run: RunConfig,
    predictions: Path,
    expected: Expected,
    out: Path,
    *,
    competition: Competition,
    masks: str | None = None,
) -> Submission:
    """Write the archive of ``predictions``, with ``<id>.png`` of every expected image, once it passes the check.

    ``run`` is the one whose class indices they have.  ``competition`` names the folder inside; ``masks`` says what the
    masks are, by default where they lie.

    Raises:
        InputError: ``out`` has another ending, the data is not VOC's, or a prediction is missing or wrong.
    """
    class_names = _require_voc(run, out).class_names
    if not predictions.is_dir():
        raise DataError(f"expected a folder of predictions, found no folder {predictions}; correct the path")
    there = {file.stem: file for file in sorted(predictions.glob("*.png"))}
    wanted = tuple(there) if expected.ids is None else tuple(expected.ids)
    if missing := [image_id for image_id in wanted if image_id not in there]:
        count = f"{len(missing):,} of {len(wanted):,} images"
        raise DataError(f"{predictions} has no prediction of {count}: {some(missing)}")
    data = build_archive([(image_id, there[image_id]) for image_id in wanted], voc_values(class_names), competition)
    found = check_stream(io.BytesIO(data), out.name, replace(expected, competition=competition))
    found.raise_problems(out, "; it was not written")
    write_atomic(out, data)
    warnings = [*found.warnings]
    if len(class_names) < len(VOC_CLASSES):
        warnings.append(f"the run knows {len(class_names)} of VOC's {len(VOC_CLASSES)} classes: the others score 0")
    if competition == "comp5":
        warnings.append(
            "comp5 is for methods trained on VOC's own trainval images alone: ImageNet weights, or trainaug with SBD's "
            "images, make it comp6"
        )
    masks, digest = masks or f"those of {predictions}", hashlib.sha256(data).hexdigest()
    return Submission(out, competition, masks, len(wanted), len(data), digest, tuple(warnings))


def check_submission(file: Path, expected: Expected, competition: Competition | None = None) -> Findings:
    """Check anybody's archive against a list and sizes; problems are in what is returned.

    Raises:
        DataError: there is no such file.
    """
    if not file.is_file():
        raise DataError(f"expected an archive, found no file {file}; correct the path")
    return check_archive(file, replace(expected, competition=competition))


def expected_of_run(run: RunConfig, store: Store, invocation: str) -> Expected:
    """The test images of a run with their sizes, as ``prepare_data`` found them.

    Raises:
        InputError: the data is not VOC's, or names no test list.
        MissingArtifactError: ``prepare_data`` has not run.
    """
    if _require_voc(run).test_list is None:
        raise ConfigError("data.test_list is null, so there is nothing to compare with; set data.test_list=test")
    finished = Run(run, store)
    if "prepare_data" not in finished.finished_artifacts():
        command = f"wsss run {invocation} --until prepare_data"
        raise MissingArtifactError(f"the images have not been indexed yet; index them with: {command}")
    return _test_images(finished.plan, store)


def _require_voc(run: RunConfig, out: Path | None = None) -> VocConfig:
    """The data section of ``run``, which must be VOC's; ``out`` must have an archive's name."""
    if out is not None and not out.name.endswith(SUFFIXES):
        raise InputError(f"--out {out}: expected a name that ends in {' or '.join(SUFFIXES)}; the server takes these")
    if not isinstance(run.data, VocConfig):
        raise ConfigError(
            f"data.format is {run.data.format}: the archive is for PASCAL VOC 2012's test server and its 20 classes; "
            "it needs data.format=voc (all of VOC's classes, or some by their names)"
        )
    return run.data


def _require_test_split(run: RunConfig, data: VocConfig, invocation: str) -> None:
    if not run.evaluate.segmentation:
        raise ConfigError("evaluate.segmentation is false: this run predicts no masks, so there is nothing to send")
    if data.test_list is not None and "test" in run.evaluate.splits:
        return
    splits = dict.fromkeys([*run.evaluate.splits, "test"])
    more = [f"evaluate.splits=[{','.join(splits)}]", *(["data.test_list=test"] if data.test_list is None else [])]
    command = " ".join(["wsss run", invocation, *(f"--set {shlex.quote(override)}" for override in more)])
    costs = "; the list is part of the data, so that all stages are made again" if data.test_list is None else ""
    raise MissingArtifactError(
        f"this run predicts no test images (evaluate.splits has no test{costs}); predict them with: {command}"
    )


def _test_images(plan: Plan, store: Store) -> Expected:
    prepared = store.require("prepare_data", plan.keys["prepare_data"])
    sizes = {record.id: record.size for record in open_image_set(prepared.path, plan.data.root).index.split("test")}
    return Expected(ids=tuple(sizes), size_of=sizes.get)
