"""Which refinements fit a pseudo-mask to its image, in which order and with which numbers.

Reads and writes no file, and needs no torch.  A new refinement is one file beside this one and its section in
``RefinementConfig``: see ``docs/refinements.md``.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stages.masks.label_rules import SeedConfig
from stages.masks.refinements.affinity import AFFINITY, AffinityConfig
from stages.masks.refinements.base import Refinement
from stages.masks.refinements.crf import CRF
from stages.masks.refinements.par import PAR
from stages.masks.refinements.random_walk import RANDOM_WALK
from stages.ops.crf.dense_crf import CrfConfig
from stages.ops.par import ParConfig
from stages.ops.random_walk import RandomWalkConfig


def _menu(schema: dict[str, Any]) -> None:
    """Put the names into the JSON schema of ``refine``."""
    one, many = schema["anyOf"]
    one["enum"], many["items"]["enum"] = ["none", *REFINEMENTS], list(REFINEMENTS)


class RefinementConfig(SeedConfig):
    """The threshold rule, and what fits its masks to the image."""

    refine: str | tuple[str, ...] = Field(default="crf", json_schema_extra=_menu)
    """none, the name of a refinement, or a list of them, applied in this order (``[random_walk, par, crf]``)."""
    crf: Annotated[CrfConfig, CRF] = CrfConfig(preset="irn")
    """Numbers of the CRF, also of the one that makes the labels for ``affinity``."""
    par: Annotated[ParConfig, PAR] = ParConfig()
    """Numbers of the pixel-adaptive refinement."""
    random_walk: Annotated[RandomWalkConfig, RANDOM_WALK] = RandomWalkConfig()
    """Numbers of the random walk."""
    affinity: Annotated[AffinityConfig, AFFINITY] = AffinityConfig()
    """What learned affinity learns from, and its walk."""
    unary: Literal["labels", "maps"] = "labels"
    """What a CRF starts from, wherever it stands in the chain: the labels that there are before it (of the threshold
    rule, or the most probable ones) with a confidence, or probabilities (the rescaled maps, or as they come)."""
    label_confidence: float = Field(default=0.7, gt=0.5, lt=1)
    """Probability that a label which a CRF starts from is right (``unary: labels``, and always with ``confident``)."""

    @field_validator("refine", mode="before")
    @classmethod
    def _check_refine(cls, value: object) -> object:
        """A list of one is its name, so that equal work has equal keys."""
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names:
            raise ValueError(f"expected none, or one or a list of {', '.join(REFINEMENTS)}")
        if names == ["none"]:
            return "none"
        problem = _chain_problem(names)
        if problem is not None:
            raise ValueError(problem)
        return names[0] if len(names) == 1 else tuple(names)

    @property
    def chain(self) -> tuple[str, ...]:
        """The refinements in order, none at all for ``none``."""
        if isinstance(self.refine, str):
            return () if self.refine == "none" else (self.refine,)
        return self.refine

    @property
    def walks(self) -> bool:
        """Whether maps walk before pixels are refined, for which the trained classifier is needed."""
        return any(REFINEMENTS[name].open is None for name in self.chain)

    @property
    def learns_affinity(self) -> bool:
        """Whether a head is trained before any mask is made."""
        return "affinity" in self.chain

    @property
    def uses_crf(self) -> bool:
        """Whether there is a dense CRF, on the masks or on the labels that affinity is learned from."""
        return "crf" in self.chain or self.learns_affinity

    @property
    def starts_from_labels(self) -> bool:
        """Whether a CRF starts from labels, which are right with ``label_confidence``."""
        is_on_labels = self.unary == "labels" or self.confident is not None
        return self.learns_affinity or ("crf" in self.chain and is_on_labels)

    @property
    def uses_torch(self) -> bool:
        """Whether a refinement works with torch on a CPU too."""
        return any(REFINEMENTS[name].uses_torch for name in self.chain)

    @property
    def pixel_chain(self) -> tuple[str, ...]:
        """The refinements of pixels, in order."""
        return tuple(name for name in self.chain if REFINEMENTS[name].open is not None)

    def key_content(self) -> dict[str, Any]:
        """What decides the masks, as JSON; the numbers of a refinement that is not in the chain do not.

        ``sweep`` and ``crf`` are left to the caller, who knows their files and the device.
        """
        unused = {name for name in REFINEMENTS if name not in (*self.chain, "crf")}
        return {name: value for name, value in super().key_content().items() if name not in unused}


REFINEMENTS: dict[str, Refinement] = {
    name: note
    for name, section in RefinementConfig.model_fields.items()
    for note in section.metadata
    if isinstance(note, Refinement)
}
"""The refinements by name: every section of ``RefinementConfig`` that has one beside it."""


def _chain_problem(names: Sequence[object]) -> str | None:
    """What is wrong with a list of refinements."""
    for name in names:
        if name == "none":
            return "none stands alone; leave it out of the list"
        if not isinstance(name, str) or name not in REFINEMENTS:
            return _unknown(name)
    repeated = sorted({str(name) for name in names if names.count(name) > 1})
    if repeated:
        return f"a refinement may stand once, found {repeated[0]} again; drop the repeated one"
    walks = [str(name) for name in names if REFINEMENTS[str(name)].open is None]
    if len(walks) > 1:
        return f"{' and '.join(walks)} both walk over the coarse maps, and one takes the other's place; drop one"
    if walks and names[0] != walks[0]:
        return f"{walks[0]} works on the coarse maps, before any pixel is refined; put it first: [{walks[0]}, …]"
    return None


def _unknown(name: object) -> str:
    """That there is no such refinement, and the nearest that there is."""
    expected = f"expected none, or one or a list of {', '.join(REFINEMENTS)}"
    if not isinstance(name, str):
        return f"a refinement is a name, not {name!r}; {expected}"
    near = difflib.get_close_matches(name.lower().replace("-", "_"), REFINEMENTS, n=1, cutoff=0.5)
    guess = f"; did you mean '{near[0]}'?" if near else ";"
    return f"there is no refinement '{name}'{guess} {expected}"
