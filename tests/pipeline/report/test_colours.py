"""The palette of the pages can be told apart by readers who lack a kind of cone."""

from itertools import combinations

import numpy as np
import pytest

from pipeline.report.colours import ERRORS, VIRIDIS, Vision, _lab, safe_palette
from stages.contracts import voc_palette

VISIONS: tuple[Vision, ...] = ("normal", "protanopia", "deuteranopia")


def nearest(palette: np.ndarray, vision: Vision) -> float:
    """The smallest CIE 1976 distance of any two of VOC's twenty classes."""
    seen = _lab(palette[1:21], vision)
    return min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2))


def test_lab_of_known_colours() -> None:
    """Values of D65 sRGB, as every table of colour spaces has them."""
    found = _lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], np.uint8), "normal")
    np.testing.assert_allclose(found, [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]], atol=0.05)


@pytest.mark.parametrize("vision", VISIONS)
def test_twenty_classes_are_far_apart_for_every_reader(vision: Vision) -> None:
    assert nearest(safe_palette(), vision) > 15
    if vision != "normal":
        assert nearest(voc_palette(), vision) < 2, "VOC's palette is not told apart: this is why there is another"


def test_all_values_have_a_colour_of_their_own_that_no_error_has() -> None:
    colours = {tuple(colour) for colour in safe_palette()[1:255].tolist()}
    assert len(colours) == 254
    assert not colours & set(ERRORS.values())


@pytest.mark.parametrize("vision", VISIONS)
def test_heat_gets_lighter_for_every_reader(vision: Vision) -> None:
    lightness = _lab(VIRIDIS.astype(np.uint8), vision)[:, 0]
    assert (np.diff(lightness) > 2).all()


@pytest.mark.parametrize("vision", VISIONS)
def test_errors_stand_out_from_each_other_and_from_grey(vision: Vision) -> None:
    seen = _lab(np.array([*ERRORS.values(), (140, 140, 140)], np.uint8), vision)
    assert min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2)) > 35
