"""What scores can be compared: those of the same classes, on the same images, against the same truth.

Pure: evaluations in; refuses in words what differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.scored_runs import ScoredRun
from stages.errors import InputError
from stages.ops.metrics.confusion import SparseConfusions
from stages.scoring.intervals import score_of

_NAMED = 5
"""Ids and classes that a refusal names."""

_TRAINING = ("attention", "masks")
"""Scores of training images, of which each run leaves out those whose masks it was trained on."""

_LOCALIZATION = "localization."


def check_classes(runs: Sequence[ScoredRun]) -> None:
    """Refuse runs with other classes, where these are known.

    Raises:
        InputError: names the classes that only one has.
    """
    known = [run for run in runs if run.classes is not None]
    for run in known[1:]:
        first = known[0]
        if run.classes != first.classes:
            ours, others = first.classes or (), run.classes or ()
            raise InputError(
                f"{first.word} and {run.word} have other classes ({len(ours)} and {len(others)} with background) and "
                "cannot be compared; compare runs on one data set",
                [_describe(run.word, others, ours), _describe(first.word, ours, others)],
            )


def _describe(word: str, names: Sequence[str], others: Sequence[str]) -> str:
    extra = [name for name in names if name not in set(others)]
    return f"only {word}: {_shorten(extra)}" if extra else f"{word} has no class of its own; the order may differ"


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def common_ids(runs: Sequence[ScoredRun], thing: str) -> tuple[tuple[str, ...], bool]:
    """Ids that all runs with this score have, and whether none has others.

    Raises:
        InputError: runs were scored on other images of val or test.
    """
    first, *rest = [run for run in runs if thing in run.counts]
    ids = first.counts[thing].ids
    for run in rest:
        others = run.counts[thing].ids
        if not thing.startswith(_TRAINING):
            _require_same_images(thing, (first.word, ids), (run.word, others))
    common = set(ids).intersection(*(run.counts[thing].ids for run in rest))
    is_same = all(len(run.counts[thing].ids) == len(common) for run in (first, *rest))
    return tuple(image_id for image_id in ids if image_id in common), is_same


def _require_same_images(thing: str, first: tuple[str, Sequence[str]], other: tuple[str, Sequence[str]]) -> None:
    (word, ids), (other_word, others) = first, other
    if set(others) != set(ids):
        raise InputError(
            f"{word} and {other_word} were scored on other images ({thing}: {len(ids)} and {len(others)}) and cannot "
            "be compared; evaluate both on one list",
            [_describe_ids(word, ids, others), _describe_ids(other_word, others, ids)],
        )


def _describe_ids(word: str, ids: Sequence[str], others: Sequence[str]) -> str:
    known = set(others)
    extra = [image_id for image_id in ids if image_id not in known]
    return f"only {word}: {_shorten(extra) or 'none'} ({len(extra)} images)"


def check_localization(runs: Sequence[ScoredRun]) -> list[str]:
    """Refuse localisation on other images of val, or against other labels or boxes of theirs.

    It is counted over all of val and not by image: what it stands on is known from the data's index alone.

    Returns:
        A note where that index is not there any more.

    Raises:
        InputError: names the images that only one has, or those that differ.
    """
    having = [run for run in runs if any(name.startswith(_LOCALIZATION) for name in run.metrics)]
    known = [run for run in having if run.val is not None]
    for run in known[1:]:
        first, ours, others = known[0], _by_id(known[0]), _by_id(run)
        _require_same_images("localization", (first.word, list(ours)), (run.word, list(others)))
        differs = [image_id for image_id, truth in ours.items() if truth != others[image_id]]
        if differs:
            raise InputError(
                f"{first.word} and {run.word} were scored against other labels or boxes (localization: {len(differs)} "
                f"images, {_shorten(differs)}) and cannot be compared; evaluate both on the same data"
            )
    unknown = ", ".join(run.word for run in having if run.val is None)
    if not unknown or len(having) < 2:
        return []
    return [f"localisation: on which images {unknown} was scored is not in the store any more; they may be others"]


def _by_id(run: ScoredRun) -> dict[str, object]:
    """Labels and true boxes of val; masks have no digest in the index."""
    return {record.id: (record.labels, record.boxes) for record in run.val or ()}


def check_truth(runs: Sequence[ScoredRun], chosen: Sequence[SparseConfusions], thing: str) -> None:
    """Refuse scores against other true masks; counts that drop a run's unsure pixels cannot tell.

    Args:
        runs: Those that have the score.
        chosen: Their counts, of the same images in the same order.
        thing: What was counted.

    Raises:
        InputError: names the images whose masks differ.
    """
    if thing.endswith("_labelled"):
        return
    first, *rest = [counts.true_pixels()[:, : _num_classes(counts, thing)] for counts in chosen]
    for run, pixels in zip(runs[1:], rest, strict=True):
        differs = [i for i, same in zip(chosen[0].ids, (pixels == first).all(axis=1), strict=True) if not same]
        if differs:
            raise InputError(
                f"{runs[0].word} and {run.word} were scored against other true masks ({thing}: {len(differs)} images, "
                f"{_shorten(differs)}) and cannot be compared; evaluate both on the same data"
            )


def _num_classes(counts: SparseConfusions, thing: str) -> int:
    """C of the counts called ``thing``."""
    score = score_of(thing)
    return counts.num_classes if score is None else score.num_classes(counts)
