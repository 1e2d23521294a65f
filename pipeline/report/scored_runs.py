"""Find the finished evaluation that a word of the command line means, and read what it counted.

Reads the store: run records, ``evaluate`` artifacts and the index of their ``prepare_data``; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.run_config import find_config, load_config
from pipeline.engine.invocation import write_invocation
from pipeline.engine.plan import plan_run
from pipeline.engine.records import RunRecord, read_runs
from pipeline.store.artifacts import MANIFEST
from stages.contracts import ImageIndex, ImageRecord, open_image_set, read_json
from stages.errors import ConfigError, DamagedFileError, InputError, MissingArtifactError
from stages.ops.metrics.confusion import SparseConfusions, read_confusions

if TYPE_CHECKING:
    from pipeline.store.artifacts import Artifact, Store

STAGE = "evaluate"
_COUNTS = "confusions.npz"
_OUTLINES = "boundaries.npz"
"""Not in the artifacts of early versions."""


@dataclass(frozen=True)
class ScoredRun:
    """One finished evaluation."""

    word: str
    """How the user named it."""
    title: str
    """Name and key, as ``demo-1f0c23ab``; the key alone where no run of this name is known."""
    key: str
    path: Path
    classes: tuple[str, ...] | None
    """Names with background; None where the data's index is not there any more."""
    counts: Mapping[str, SparseConfusions]
    """Counts of each image by what was scored, outlines too."""
    metrics: Mapping[str, Any]
    val: tuple[ImageRecord, ...] | None = None
    """The images of val; None where the data's index is not there any more."""


def find_scored_run(word: str, store: Store) -> ScoredRun:
    """Read the evaluation that ``word`` means.

    Args:
        word: A config file or the name of a shipped config; the folder of an ``evaluate`` artifact; the name of a run
            (``demo``, ``demo-1f0c23ab``); or a run id or the key of an ``evaluate`` artifact, or the first digits of
            either.
        store: Where runs and artifacts are; a folder may also lie in another store.

    Raises:
        InputError: ``word`` means nothing, or several things.
        MissingArtifactError: the evaluation has not been made, or is gone.
        DamagedFileError: it does not read back.
    """
    path = Path(word).expanduser()
    config = None if (path / _COUNTS).is_file() else _find_config(word)  # a folder may be called as a shipped config
    if config is not None:
        run = load_config(config)
        key = plan_run(run, store.digest_cache).keys[STAGE]
        return _read_key(word, run.name, key, store, f"wsss run {write_invocation(word, None, store.location)}")
    if path.is_dir():
        return _read_folder(word, path)
    name, key = _find_key(word, store)
    return _read_key(word, name, key, store, "wsss run with its config")


def _find_config(word: str) -> Path | None:
    """The config that ``word`` means; None for a word that looks like no file."""
    try:
        return find_config(word)
    except ConfigError:
        if word.endswith((".yaml", ".yml")):
            raise
        return None


def _find_key(word: str, store: Store) -> tuple[str, str]:
    """Run name, which may be unknown, and key of the evaluation that ``word`` names, or whose id or key it begins."""
    records = [record for record in read_runs(store) if STAGE in record.keys]
    begun = [record for record in records if record.run_id.startswith(word) or record.path.stem == word]
    found = {record.keys[STAGE]: record.name for record in begun or _called(word, records, store)}
    stage, _, digits = word.strip("/").rpartition("/")
    names = {record.keys[STAGE]: record.name for record in reversed(records)}
    for other, key in store.folders():
        if key.startswith(digits) and stage in ("", other):
            if other == STAGE:
                found.setdefault(key, names.get(key, ""))
            elif not found and key == digits:
                raise InputError(f"{word} is an artifact of {other}; name one of {STAGE}, a run id or a config")
    if len(found) == 1:
        [(key, name)] = found.items()
        return name, key
    if found:
        raise InputError(f"{word} means {len(found)} evaluations; give more digits", sorted(found))
    raise InputError(
        f"'{word}' is no config, run name, run id, folder or key of an evaluation in {store.location}; "
        "`wsss artifacts list` shows what is there"
    )


def _called(word: str, records: Sequence[RunRecord], store: Store) -> list[RunRecord]:
    """The runs whose name, or name and key as in their title, is ``word``, and whose evaluation is there."""
    named = [record for record in records if word in (record.name, _title(record.name, record.keys[STAGE]))]
    return [record for record in named if store.lookup(STAGE, record.keys[STAGE]) is not None]


def _title(name: str, key: str) -> str:
    return "-".join(part for part in (name, key[:8]) if part)


def _read_key(word: str, name: str, key: str, store: Store, command: str) -> ScoredRun:
    if store.lookup(STAGE, key) is None:
        raise MissingArtifactError(
            f"the evaluation of {word} ({STAGE} {key}) is not in {store.location}; build it with: {command}"
        )
    artifact = store.require(STAGE, key)
    return _read_files(word, _title(name, key), key, artifact.path, _index_in(store, artifact))


def _index_in(store: Store, artifact: Artifact) -> ImageIndex | None:
    key = artifact.run.get("upstream", {}).get("prepare_data", "")
    if not key or store.lookup("prepare_data", key) is None:
        return None
    return _index_of(store.require("prepare_data", key).path)


def _index_of(prepared: Path) -> ImageIndex | None:
    return open_image_set(prepared, None).index if (prepared / "index.json").is_file() else None


def _read_folder(word: str, path: Path) -> ScoredRun:
    if not (path / _COUNTS).is_file():
        raise InputError(f"{word} is no folder of an {STAGE} artifact: it has no {_COUNTS}; name one, or a config")
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    upstream = manifest.get("run", {}).get("upstream", {})
    prepared = path.resolve().parent.parent / "prepare_data" / upstream.get("prepare_data", "none")
    key = str(manifest.get("content", {}).get("key", path.resolve().name))
    return _read_files(word, key[:8], key, path, _index_of(prepared))


def _read_files(word: str, title: str, key: str, path: Path, index: ImageIndex | None) -> ScoredRun:
    counts = read_confusions(path / _COUNTS)
    if (path / _OUTLINES).is_file():
        counts |= read_confusions(path / _OUTLINES)
    metrics = read_json(path / "metrics.json")
    if not isinstance(metrics, dict):
        raise DamagedFileError(f"{path / 'metrics.json'} holds no metrics; rebuild {STAGE}")
    classes = None if index is None else index.classes.names_with_background
    val = None if index is None else index.split("val")
    return ScoredRun(word, title, key, path, classes, counts, metrics, val)
