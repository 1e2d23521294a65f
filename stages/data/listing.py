"""List any data set without opening an image, and digest it, or what somebody reads of it, for cache keys.

Reads: lists, label files, folders' names; for the digest every listed image and mask as bytes.
Writes: the cache of file digests, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stages.contracts import write_atomic
from stages.data.adapters.synthetic import GENERATOR_VERSION, SyntheticConfig
from stages.data.config import DataConfig
from stages.data.records import PROBLEMS_SHOWN, DataListing, ListedImage, some
from stages.errors import DataError

__all__ = ["DataDigests", "DataListing", "DataView", "ListedImage", "digest_data", "list_data"]

_SETTLED_NS = 2_000_000_000
"""A file younger than this is hashed each time: a second write within the clock's step would go unseen."""


def list_data(config: DataConfig) -> DataListing:
    """List the data set: ids, files, labels and splits.

    Raises:
        DataError: with every problem that shows without decoding an image, e.g. a missing list or image, a label
            without an image, an unknown class name, an overlap of train and val.
    """
    scan = config.scan()
    if scan.problems:
        where = "" if scan.listing.root is None else f" in {scan.listing.root}"
        raise DataError(f"the data set{where} cannot be used:", scan.problems.lines(PROBLEMS_SHOWN))
    return scan.listing


@dataclass(frozen=True)
class DataView:
    """The part of a data set that somebody reads, by image ids; where it lies and what files are called is no part."""

    splits: Mapping[str, Sequence[str]]
    """Split name to ids in list order: of these the labels and the image's bytes."""
    masks: Collection[str] = ()
    """Whose true masks for scores."""
    full_masks: Collection[str] = ()
    """Whose true masks for ``supervision: full``."""
    boxes: Collection[str] = ()
    """Whose true boxes."""


@dataclass(frozen=True)
class DataDigests:
    """A data set's lists with the digest of each file: says of any part of it whether it is still the same."""

    listing: DataListing
    files: Mapping[str, str]
    """Relative path of every image and mask to the digest of what is in it."""

    def whole(self) -> str:
        """Digest of everything: classes, splits, labels, boxes, files with their relative paths."""
        listing = self.listing
        described = [
            listing.classes.names,
            listing.splits,
            sorted(listing.mask_values.items()),
            listing.has_object_masks,
            [[i.id, i.image, i.labels, i.mask, i.full_mask, i.boxes] for i in listing.images],
        ]
        return _sha256_json([described, sorted(self.files.items())])

    def files_of(self, view: DataView | None) -> tuple[str, ...]:
        """Relative paths of the images and masks in ``view``, sorted; None stands for everything."""
        if view is None:
            return self.listing.files
        images = {image.id: image for image in self.listing.images}
        names = {images[image_id].image for ids in view.splits.values() for image_id in ids}
        names |= {images[image_id].mask or "" for image_id in view.masks}
        names |= {images[image_id].full_mask or "" for image_id in view.full_masks}
        return tuple(sorted(names - {""}))

    def of(self, view: DataView) -> str:
        """Digest of the part: the class list, what ``view`` names, and what mask values mean where it has masks."""
        images = {image.id: image for image in self.listing.images}
        seen = [images[image_id] for image_id in sorted(set().union(*view.splits.values()))]
        scored = {i: self.files.get(images[i].mask or "") for i in view.masks}
        full = {i: self.files.get(images[i].full_mask or "") for i in view.full_masks}
        values = [sorted(self.listing.mask_values.items()), self.listing.has_object_masks]
        described = {
            "classes": self.listing.classes.names,
            "splits": {name: list(ids) for name, ids in view.splits.items()},
            "images": [[image.id, image.labels, self.files[image.image]] for image in seen],
            "masks": scored,
            "full_masks": full,
            "boxes": {i: images[i].boxes for i in view.boxes},
            "mask_values": values if any(scored.values()) or any(full.values()) else None,
        }
        return _sha256_json(described)


def digest_data(
    listing: DataListing,
    config: DataConfig,
    cache_file: Path,
    *,
    warn: Callable[[str], None] | None = None,
) -> DataDigests:
    """Digest every image and mask of the data set.

    The digest of a file is kept in ``cache_file`` and used again while its size and modification time stay the same.

    Args:
        listing: From ``list_data(config)``.
        config: The config it was listed by.
        cache_file: JSON file, made when absent.
        warn: Hears of images that stand in both train and val under two ids.

    Raises:
        DataError: a listed file disappeared or cannot be read.
    """
    if isinstance(config, SyntheticConfig) or listing.root is None:
        # A picture follows from these options and its own name: how many others there are changes nothing in it.
        options = config.model_dump(mode="json", exclude={"num_train", "num_val", "on_bad_image"})
        drawn = _sha256_json([GENERATOR_VERSION, options])
        return DataDigests(listing, {path: f"{drawn}/{path}" for path in listing.files})
    files, problems = _file_digests(listing.root, listing.files, cache_file)
    if problems:
        raise DataError("files of the data set cannot be read; restore them or their permission", problems)
    digests = DataDigests(listing, files)
    if warn is not None:
        for text in _same_contents(listing, digests.files):
            warn(text)
    return digests


def find_changed_files(digests: DataDigests, view: DataView | None, cache_file: Path) -> list[str]:
    """Which files of the user's are not what ``digests`` says any more, one line each; every byte of them is read.

    Args:
        digests: From ``digest_data``.
        view: The part of the data to look at; None for all of it.
        cache_file: The cache of ``digest_data``, which must not say the old digest again.
    """
    root = digests.listing.root
    if root is None:  # pictures that prepare_data draws are in its own artifact
        return []
    found, problems = _file_digests(root, digests.files_of(view), cache_file, is_trusted=False)
    changed = [name for name, digest in found.items() if digest != digests.files[name]]
    return [*problems, *(f"{root / name}: the content was changed" for name in changed)]


def _same_contents(listing: DataListing, digests: Mapping[str, str]) -> list[str]:
    """A line where images of train and val have different ids and the same bytes."""
    content = {image.id: digests[image.image] for image in listing.images}
    trained = {content[image_id]: image_id for image_id in reversed(listing.splits["train"])}
    pairs = [
        f"{trained[content[image_id]]} = {image_id}"
        for image_id in listing.splits["val"]
        if content[image_id] in trained
    ]
    if not pairs:
        return []
    return [
        f"{len(pairs):,} images of val are the same file as an image of train under another name: {some(pairs)}; "
        "scores on trained images are worthless, remove one of each pair"
    ]


def _sha256_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _file_digests(
    root: Path, files: Iterable[str], cache_file: Path, *, is_trusted: bool = True
) -> tuple[dict[str, str], list[str]]:
    """Relative path to sha256 of every file, and a line for each that cannot be read.

    What is not in the cache is hashed, several files at once; all of it where the cache is not trusted.
    """
    cache = _read_cache(cache_file)
    base = root.resolve()
    fresh: dict[str, list[object]] = {}

    def digest(relative: str) -> str | OSError:
        path = base / relative
        try:
            stat = path.stat()
            known = cache.get(str(path))
            if is_trusted and known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
                return str(known[2])
            with path.open("rb") as file:
                value = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return error
        if time.time_ns() - stat.st_mtime_ns > _SETTLED_NS:
            fresh[str(path)] = [stat.st_size, stat.st_mtime_ns, value]
        return value

    names = tuple(files)
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = dict(zip(names, pool.map(digest, names), strict=True))
    if any(cache.get(path) != entry for path, entry in fresh.items()):
        # A store that cannot be written costs the next run some seconds of hashing, not this one its result.
        with contextlib.suppress(OSError):
            write_atomic(cache_file, json.dumps({**cache, **fresh}, sort_keys=True).encode())
    problems = [f"{base / name}: cannot be read ({e.strerror})" for name, e in found.items() if isinstance(e, OSError)]
    return {name: digest for name, digest in found.items() if isinstance(digest, str)}, problems


def _read_cache(cache_file: Path) -> dict[str, list[object]]:
    """The cache; an absent or damaged one counts as empty, since it only saves time."""
    try:
        cache = json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(cache, dict):
        return {}
    return {path: entry for path, entry in cache.items() if isinstance(entry, list) and len(entry) == 3}
