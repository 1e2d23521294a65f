"""SEC's cues by hand on grids of a few cells."""

import numpy as np

from stages.ops.cues import CUE_SIZE, background_cues, combine_cues, foreground_cues


def test_foreground_is_above_a_fifth_of_each_maximum() -> None:
    """2 of 10 is a fifth and not above it; the second map has a maximum of its own; the third says nothing."""
    maps = np.array([[[10, 2, 2.1, -5]], [[0.5, 0.1, 0.09, 0.2]], [[0, 0, -1, 0]]], np.float32)
    cues = foreground_cues(maps, size=(1, 4))
    assert cues[0].tolist() == [[True, False, True, False]]
    assert cues[1].tolist() == [[True, False, False, True]]
    assert not cues[2].any()


def test_another_share_and_no_labels() -> None:
    maps = np.array([[[10, 6, 4, 5]]], np.float32)
    assert foreground_cues(maps, size=(1, 4), ratio=0.5)[0].tolist() == [[True, True, False, False]]
    assert foreground_cues(np.empty((0, 3, 3)), size=(2, 2)).shape == (0, 2, 2)


def test_background_is_the_lowest_tenth_of_the_medians() -> None:
    """Saliency grows by rows; 10 % of 5 × 6 = 3 cells: of the first row's equal medians the first three.

    The single zero in the middle is no background: the median of its neighbourhood is not small.
    """
    saliency = np.repeat(np.arange(1, 6, dtype=np.float32)[:, None], 6, axis=1)
    saliency[3, 3] = 0
    cues = background_cues(saliency, size=(5, 6))
    assert cues.sum() == 3
    assert cues[0].tolist() == [True, True, True, False, False, False]


def test_background_takes_exactly_the_share() -> None:
    saliency = np.random.default_rng(0).random((60, 80)).astype(np.float32)
    cues = background_cues(saliency)
    assert cues.shape == CUE_SIZE
    assert cues.sum() == 168, "10 % of 1681, rounded down"
    assert background_cues(np.zeros((41, 41), np.float32)).sum() == 168
    assert background_cues(saliency, ratio=0.3).sum() == 504
    assert not background_cues(saliency, ratio=0).any()


def test_medians_by_hand() -> None:
    """Nine cells of 1 … 9; the corner's neighbourhood is 1 1 2 1 1 2 4 4 5 with the border repeated: median 2."""
    saliency = np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    one, two = (background_cues(saliency, size=(3, 3), ratio=count / 9) for count in (1, 2))
    assert np.argwhere(one).tolist() == [[0, 0]]
    assert np.argwhere(two).tolist() == [[0, 0], [0, 1]], "1 2 3 1 2 3 4 5 6: median 3, against 4 below the corner"


def test_the_smallest_area_wins_and_foreground_beats_background() -> None:
    cat = np.array([[True, True, True, True, False, False]])
    dog = np.array([[False, False, True, True, True, False]])
    bird = np.array([[False, False, False, True, False, False]])
    background = np.array([[True, False, False, False, True, True]])
    cues = combine_cues(np.stack([cat, dog, bird]), background, (0, 1, 4))
    assert cues.tolist() == [[1, 1, 2, 5, 2, 0]]
    assert combine_cues(np.stack([cat & ~background]), background & False, (7,)).tolist() == [[255, 8, 8, 8, 255, 255]]


def test_of_equal_areas_the_first_label_wins() -> None:
    both = np.ones((2, 1, 2), bool)
    assert combine_cues(both, np.zeros((1, 2), bool), (3, 5)).tolist() == [[4, 4]]


def test_an_image_without_labels_has_background_cues_alone() -> None:
    background = np.array([[True, False]])
    assert combine_cues(np.zeros((0, 1, 2), bool), background, ()).tolist() == [[0, 255]]
