"""What is wrong with an archive for PASCAL VOC's test server: kinds of problems, their numbers, what to do.

Pure records; nothing is read or written here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stages.errors import DataError
from stages.scoring.submission.archive import Competition
from stages.scoring.submission.masks import Size

SHOWN = 5
"""Files of one kind of problem that are named."""

REMEDIES: dict[str, str] = {
    "wrong kind of file": "make it with `tar czf results.tar.gz results`",
    "not readable": "pack it again, and compare the sizes if it was copied",
    "too large": "pack the masks alone: together they stay far below 512 MiB, each below 4",
    "unsafe path": "pack from the folder that holds results/, with relative names",
    "link": "pack the files themselves (tar --dereference)",
    "no plain file": "pack the masks alone",
    "two competitions": "send one archive for each",
    "other member": "pack nothing but the masks, e.g. on macOS with COPYFILE_DISABLE=1",
    "duplicate name": "keep one of them",
    "missing image": "add its mask",
    "extra image": "remove it: it is not in the list",
    "wrong name": "a mask is called as its image, e.g. 2008_000006.png",
    "wrong count": "predict every image of ImageSets/Segmentation/test.txt",
    "no PNG": "save masks as PNG",
    "damaged PNG": "write it again",
    "wrong mode": "save class indices with VOC's palette (mode P), not colours, and without convert('P')",
    "wrong palette": "use VOC's 256 colours in VOC's order; the server reads the indices behind them",
    "wrong value": "the server knows 0 (background) to 20; a prediction has no void (255)",
    "wrong size": "a mask has the size of its image: undo padding and scaling",
}
"""What can be wrong, in the order of the report, with what to do."""


@dataclass
class Findings:
    """What was found in an archive; problems are counted by kind and the first few kept."""

    masks: dict[str, None] = field(default_factory=dict)
    """Ids of the masks in the archive's order."""
    competition: Competition | None = None
    sizes: set[Size] = field(default_factory=set)
    """Every size that a mask has."""
    num_unsized: int = 0
    """Masks whose image's size is not known."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of problems by kind."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, kind: str, text: str) -> None:
        """Count one problem."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.texts.setdefault(kind, [])
        if len(shown) < SHOWN:
            shown.append(text.encode(errors="backslashreplace").decode())

    def problems(self) -> list[str]:
        """One line for each kind: how many, the first few, what to do."""
        return [self._line(kind) for kind in REMEDIES if kind in self.counts]

    def raise_problems(self, path: Path, outcome: str = "") -> None:
        """End with all problems of the archive at ``path``, where there are any.

        Raises:
            DataError: there are.
        """
        count = sum(self.counts.values())
        if count:
            raise DataError(
                f"{path}: {count:,} problem{'s' if count > 1 else ''} in the archive{outcome}", self.problems()
            )

    def _line(self, kind: str) -> str:
        count, shown = self.counts[kind], self.texts[kind]
        more = f"; … {count - len(shown):,} more" if count > len(shown) else ""
        return f"{kind} ({count:,}): {'; '.join(shown)}{more}. {REMEDIES[kind][0].upper()}{REMEDIES[kind][1:]}"
