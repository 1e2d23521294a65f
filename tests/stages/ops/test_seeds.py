"""The threshold rule on tiny arrays, by hand: levels, conflicts, what enters a key."""

import numpy as np
import pytest
from pydantic import ValidationError

from stages.contracts import AttentionRecord
from stages.ops.seeds import (
    ConfidentThresholds,
    SeedConfig,
    SweepConfig,
    background_level,
    contested_pixels,
    cut_byte,
    foreground_level,
    initial_mask,
    map_probabilities,
)


def record_of(maps: object, labels: tuple[int, ...]) -> AttentionRecord:
    values = np.array(maps, np.uint8)
    return AttentionRecord("x", values.shape[1:], labels, values, np.ones(len(labels), np.float32))


PAIR = record_of([[[255, 200, 100, 50, 0]], [[0, 210, 90, 120, 20]]], (0, 2))
"""Two classes (indices 1 and 3) in one row of five pixels."""


def test_the_strongest_wins_where_both_exceed() -> None:
    assert initial_mask(PAIR, SeedConfig(threshold=0.3)).tolist() == [[1, 3, 1, 3, 0]]
    assert initial_mask(PAIR, SeedConfig(threshold=0.45)).tolist() == [[1, 3, 0, 3, 0]], "byte 114 is the last below"


def test_a_conflict_can_be_unsure() -> None:
    """At 0.3 (byte 76) both exceed at the second and third pixel."""
    config = SeedConfig(threshold=0.3, conflict="unsure")
    assert contested_pixels(PAIR.maps, config).tolist() == [[False, True, True, False, False]]
    assert initial_mask(PAIR, config).tolist() == [[1, 255, 255, 3, 0]]


def test_a_conflict_of_confident_labels_is_one_at_the_stricter_threshold() -> None:
    """At 0.4 (byte 102) only the second pixel has two claims; 100 is above 0.2 alone, so unsure anyway."""
    two = ConfidentThresholds(foreground_threshold=0.4, background_threshold=0.2)
    config = SeedConfig(confident=two, conflict="unsure")
    assert foreground_level(config) == 0.4
    assert initial_mask(PAIR, config).tolist() == [[1, 255, 255, 3, 0]]
    assert contested_pixels(PAIR.maps, config).tolist() == [[False, True, False, False, False]]


def test_an_image_without_labels_is_background_whatever_the_rule() -> None:
    empty = record_of(np.zeros((0, 2, 3)), ())
    for conflict in ("strongest", "unsure"):
        assert not initial_mask(empty, SeedConfig(conflict=conflict)).any()


def test_the_level_of_a_power_is_where_the_two_scores_tie() -> None:
    level = background_level(SeedConfig(background="power", background_power=4))
    assert level == pytest.approx((1 - level) ** 4)
    assert foreground_level(SeedConfig(threshold=0.25)) == 0.25


def test_probabilities_agree_with_the_labels() -> None:
    for config in (SeedConfig(threshold=0.45), SeedConfig(background="power", background_power=2)):
        winner = map_probabilities(PAIR.maps, config).argmax(axis=0)
        assert np.array([0, 1, 3])[winner].tolist() == initial_mask(PAIR, config).tolist()


@pytest.mark.parametrize("threshold", [0, 0.3, 0.999])
def test_cut_byte_is_the_last_byte_below(threshold: float) -> None:
    assert cut_byte(threshold) / 255 <= threshold < (cut_byte(threshold) + 1) / 255


@pytest.mark.parametrize("cut", range(255))
def test_a_swept_threshold_is_the_cut_it_stands_for(cut: int) -> None:
    assert cut_byte(cut / 255) == cut


def test_options_that_do_not_go_together_are_refused() -> None:
    for wrong, words in [
        ({"thresholds": {"cat": 1.0}}, "less than 1"),
        ({"thresholds": {"cat": 0.2}, "confident": {}}, "thresholds do not go with confident"),
        ({"sweep": {}, "confident": {}}, "which confident does not use"),
        ({"sweep": {}, "background": "power"}, "which background: power does not use"),
        ({"sweep": {"num_images": None}}, "exactly one of num_images and image_list"),
        ({"sweep": {"num_images": 3, "image_list": "x"}}, "exactly one of num_images and image_list"),
        ({"conflict": "weakest"}, "smallest_area"),
    ]:
        with pytest.raises(ValidationError, match=words):
            SeedConfig.model_validate(wrong)


def test_a_list_stands_instead_of_the_number() -> None:
    sweep = SweepConfig.model_validate({"image_list": "ids.txt"})
    assert sweep.num_images is None
    assert SweepConfig.model_validate(sweep.model_dump(mode="json")) == sweep


def test_a_threshold_that_a_sweep_replaces_is_in_no_key() -> None:
    assert SeedConfig(threshold=0.1).key_content() != SeedConfig(threshold=0.2).key_content()
    swept = [SeedConfig(threshold=t, sweep=SweepConfig()).key_content() for t in (0.1, 0.2)]
    assert swept[0] == swept[1], "a threshold that is not used changes nothing"
