"""The threshold rule on tiny arrays, by hand: levels, thresholds by class, conflicts, what enters a key."""

import numpy as np
import pytest
from pydantic import ValidationError

from stages.contracts import AttentionRecord, ClassList
from stages.data.subsets import SweepConfig
from stages.masks.label_rules import (
    ConfidentThresholds,
    SeedConfig,
    background_level,
    contested_pixels,
    cut_byte,
    favour_small_areas,
    foreground_level,
    initial_mask,
    map_probabilities,
    settle_classes,
    stretch_table,
    upsample_maps,
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


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds by class and conflicts by area
# ---------------------------------------------------------------------------------------------------------------------


CLASSES = ClassList(names=("cat", "dog", "bird"))


def labels_of(record: AttentionRecord, config: SeedConfig) -> list[int]:
    return initial_mask(settle_classes(record, config, CLASSES), config)[0].tolist()


def test_a_plain_rule_leaves_the_record_alone() -> None:
    record = record_of([[[255, 0]]], (1,))
    assert settle_classes(record, SeedConfig(), CLASSES) is record
    assert settle_classes(record, SeedConfig(conflict="unsure"), CLASSES) is record
    assert settle_classes(record, SeedConfig(thresholds={"cat": 0.9}), CLASSES) is record, "the image has no cat"


def test_each_class_is_cut_at_its_own_threshold() -> None:
    """0.2 is byte 51 and 0.8 byte 204: what exceeds them is exact."""
    config = SeedConfig(threshold=0.4, thresholds={"cat": 0.2, "bird": 0.8})
    assert labels_of(record_of([[[51, 52, 102, 103]]], (0,)), config) == [0, 1, 1, 1]
    assert labels_of(record_of([[[51, 52, 102, 103]]], (1,)), config) == [0, 0, 0, 2]
    assert labels_of(record_of([[[103, 204, 205, 255]]], (2,)), config) == [0, 0, 3, 3]


def test_classes_compete_by_how_far_each_is_above_its_own_threshold() -> None:
    """Cat needs 0.2 and bird 0.8; a bird of 0.75 is stronger than a cat of 0.3 and loses, for it is no bird.

    Where both exceed: cat 0.4 is a quarter of the way from 0.2 to 1, bird 0.9 half of the way from 0.8.
    """
    config = SeedConfig(threshold=0.4, thresholds={"cat": 0.2, "bird": 0.8})
    cat, bird = [77, 102, 230], [191, 230, 207]
    assert labels_of(record_of([[cat], [bird]], (0, 2)), config) == [1, 3, 1]


def test_the_unary_of_settled_maps_has_the_labels_of_the_rule() -> None:
    config = SeedConfig(threshold=0.4, thresholds={"cat": 0.2, "bird": 0.8})
    record = record_of(np.random.default_rng(0).integers(0, 256, (2, 6, 7)), (0, 2))
    settled = settle_classes(record, config, CLASSES)
    chosen = np.array([0, 1, 3])[map_probabilities(upsample_maps(settled), config).argmax(axis=0)]
    np.testing.assert_array_equal(chosen, initial_mask(settled, config))
    assert {0, 1, 3} == set(np.unique(chosen).tolist())


def test_thresholds_go_with_a_power() -> None:
    """x = (1 - x)^1 is 0.5; dog has it at 0.9 (byte 229)."""
    config = SeedConfig(background="power", background_power=1, thresholds={"dog": 0.9})
    assert labels_of(record_of([[[127, 128, 229, 230]]], (1,)), config) == [0, 0, 0, 2]
    assert labels_of(record_of([[[127, 128, 229, 230]]], (0,)), config) == [0, 1, 1, 1]


@pytest.mark.parametrize(("own", "common"), [(0, 0), (0, 254), (254, 0), (76, 76), (51, 102), (204, 102)])
def test_a_stretch_keeps_order_and_both_sides_of_the_cut(own: int, common: int) -> None:
    table = stretch_table(own, common).astype(int)
    assert len(table) == 256
    assert (np.diff(table) >= 0).all()
    assert table[: own + 1].max() <= common < table[own + 1 :].min()
    assert (table[0], table[255]) == (0, 255)
    if own == common:
        assert table.tolist() == list(range(256))


def test_the_class_of_the_smallest_area_takes_what_both_claim() -> None:
    """Above byte 76: cat on four pixels, dog on two, bird on three; dog, then bird, then cat."""
    cat, dog, bird = [255, 200, 200, 200, 0, 0], [0, 0, 80, 80, 0, 0], [0, 77, 0, 250, 76, 77]
    record = record_of([[cat], [dog], [bird]], (0, 1, 2))
    assert labels_of(record, SeedConfig(conflict="strongest")) == [1, 1, 1, 3, 0, 3]
    assert labels_of(record, SeedConfig(conflict="smallest_area")) == [1, 3, 2, 2, 0, 3]
    settled = settle_classes(record, SeedConfig(conflict="smallest_area"), CLASSES).maps
    assert settled[:, 0].tolist() == [[255, 76, 76, 76, 0, 0], dog, [0, 77, 0, 76, 76, 77]]
    assert record.maps[0, 0].tolist() == cat, "the input stays as it is"


def test_of_equal_areas_the_first_wins() -> None:
    maps = np.array([[[9, 9, 0]], [[0, 9, 9]]], np.uint8)
    assert favour_small_areas(maps, 5)[:, 0].tolist() == [[9, 9, 0], [0, 5, 9]]


def test_areas_are_counted_at_the_threshold_of_each_class() -> None:
    """Dog at 0.3 has three pixels and cat two; with dog at 0.8 it has one, and takes it."""
    record = record_of([[[255, 200, 0, 0]], [[0, 255, 100, 100]]], (0, 1))
    assert labels_of(record, SeedConfig(conflict="smallest_area")) == [1, 1, 2, 2]
    rule = SeedConfig(conflict="smallest_area", thresholds={"dog": 0.8})
    assert labels_of(record, rule) == [1, 2, 0, 0]


def test_confident_conflicts_are_settled_at_the_stricter_threshold() -> None:
    """At 0.4 (102): cat on three pixels, dog on one; the other claim of dog, 90, only makes its pixel unsure."""
    two = ConfidentThresholds(foreground_threshold=0.4, background_threshold=0.2)
    record = record_of([[[255, 200, 200, 0, 0]], [[0, 110, 0, 90, 20]]], (0, 1))
    assert labels_of(record, SeedConfig(confident=two, conflict="smallest_area")) == [1, 2, 1, 255, 0]
    assert labels_of(record, SeedConfig(confident=two)) == [1, 1, 1, 255, 0]
