"""List any data set without opening an image, and digest it for the cache key.

Reads: lists, label files, folders' names; for the digest every listed image and mask as bytes.
Writes: the cache of file digests, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.contracts import write_atomic
from stages.data.adapters.synthetic import GENERATOR_VERSION, SyntheticConfig
from stages.data.config import DataConfig
from stages.data.records import PROBLEMS_SHOWN, DataListing, ListedImage, some
from stages.errors import DataError

__all__ = ["DataListing", "ListedImage", "digest_data", "list_data"]

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


def digest_data(
    listing: DataListing,
    config: DataConfig,
    cache_file: Path,
    *,
    warn: Callable[[str], None] | None = None,
) -> str:
    """Digest what the data set is: classes, splits, labels, and the contents of every image and mask.

    Absolute paths do not enter: a copied or moved data set has the same digest.  The digest of a file is kept in
    ``cache_file`` and used again while its size and modification time stay the same.

    Args:
        listing: From ``list_data(config)``.
        config: The config it was listed by.
        cache_file: JSON file, made when absent.
        warn: Hears of images that stand in both train and val under two ids.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: a listed file disappeared or cannot be read.
    """
    if isinstance(config, SyntheticConfig) or listing.root is None:
        # The pictures follow from the config; how a bad image is treated changes no picture.
        parts: object = [GENERATOR_VERSION, config.model_dump(mode="json", exclude={"on_bad_image"})]
        return _sha256_json(parts)
    digests = _file_digests(listing.root, listing.files, cache_file)
    if warn is not None:
        for text in _same_contents(listing, dict(digests)):
            warn(text)
    return _sha256_json([_describe(listing), digests])


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


def _describe(listing: DataListing) -> dict[str, object]:
    described: dict[str, object] = {
        "classes": listing.classes.names,
        "splits": listing.splits,
        "mask_values": sorted(listing.mask_values.items()),
        "images": [[i.id, i.image, i.labels, i.mask, i.full_mask] for i in listing.images],
    }
    # absent where a data set has neither: its digest is what it was before there were any
    boxes = {image.id: image.boxes for image in listing.images if image.boxes is not None}
    if boxes:
        described["boxes"] = boxes
    if listing.has_object_masks:
        described["has_object_masks"] = True
    return described


def _file_digests(root: Path, files: Iterable[str], cache_file: Path) -> list[tuple[str, str]]:
    """(relative path, sha256) of every file; what is not in the cache is hashed, several files at once."""
    cache = _read_cache(cache_file)
    base = root.resolve()
    fresh: dict[str, list[object]] = {}

    def digest(relative: str) -> tuple[str, str]:
        path = base / relative
        try:
            stat = path.stat()
            known = cache.get(str(path))
            if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
                return relative, str(known[2])
            with path.open("rb") as file:
                value = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); restore the file or its permission") from error
        if time.time_ns() - stat.st_mtime_ns > _SETTLED_NS:
            fresh[str(path)] = [stat.st_size, stat.st_mtime_ns, value]
        return relative, value

    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(digest, files))
    if fresh:
        # A store that cannot be written costs the next run some seconds of hashing, not this one its result.
        with contextlib.suppress(OSError):
            write_atomic(cache_file, json.dumps({**cache, **fresh}, sort_keys=True).encode())
    return digests


def _read_cache(cache_file: Path) -> dict[str, list[object]]:
    """The cache; an absent or damaged one counts as empty, since it only saves time."""
    try:
        cache = json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(cache, dict):
        return {}
    return {path: entry for path, entry in cache.items() if isinstance(entry, list) and len(entry) == 3}
