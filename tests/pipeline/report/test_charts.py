"""The picture of a confusion matrix: where its cells are, what they say, and what becomes of many classes."""

import numpy as np
import pytest

from pipeline.report.charts import MOST_CLASSES, matrix_picture


def test_rows_are_true_classes_and_add_up_to_one() -> None:
    picture = matrix_picture("x", np.array([[60, 20, 20], [0, 30, 10], [5, 0, 0]]), ["background", "cat", "dog"])
    assert [label["name"] for label in picture["labels"]] == ["background", "cat", "dog"]
    size = picture["cell_px"]
    found = {(round(cell["y"] / size), round(cell["x"] / size)): cell for cell in picture["cells"]}
    assert {place: cell["share"] for place, cell in found.items()} == pytest.approx(
        {(0, 0): 0.6, (0, 1): 0.2, (0, 2): 0.2, (1, 1): 0.75, (1, 2): 0.25, (2, 0): 1.0}
    )
    assert found[1, 2]["text"] == "25"
    assert found[1, 2]["hint"] == "cat taken for dog: 25.00 % of its pixels (10)"
    assert found[1, 1]["hint"] == "cat: 75.00 % of its pixels found (30)"
    assert [found[place]["is_dark"] for place in ((0, 0), (1, 1), (1, 2))] == [False, True, False]
    assert picture["labels"][1]["at"] == 1.5 * size
    assert (picture["width"], picture["height"]) == (picture["left"] + 3 * size + 10, picture["top"] + 3 * size + 10)


def test_a_share_that_rounds_to_nothing_has_a_cell_and_no_number() -> None:
    picture = matrix_picture("x", np.array([[9999, 1], [0, 5]]), ["background", "cat"])
    assert [cell["text"] for cell in picture["cells"]] == ["100", "", "100"]


def test_a_class_that_is_nowhere_is_left_out_and_a_predicted_one_is_not() -> None:
    matrix = np.zeros((4, 4), np.int64)
    matrix[0, 0], matrix[0, 3] = 5, 5
    picture = matrix_picture("x", matrix, ["background", "cat", "dog", "owl"])
    assert [label["name"] for label in picture["labels"]] == ["background", "owl"]
    assert [cell["share"] for cell in picture["cells"]] == [0.5, 0.5]


def test_of_many_classes_the_worst_are_shown() -> None:
    count = MOST_CLASSES + 20
    matrix = np.diag(np.full(count, 1000))
    worst = list(range(5, 5 + MOST_CLASSES - 2))
    matrix[worst, 0] = 500
    picture = matrix_picture("x", matrix, [f"c{index}" for index in range(count)])
    names = [label["name"] for label in picture["labels"]]
    assert names == ["c0", *(f"c{index}" for index in worst), "21 better ones"]
    shares: dict[int, float] = {}
    for cell in picture["cells"]:
        row = round(cell["y"] / picture["cell_px"])
        shares[row] = shares.get(row, 0) + cell["share"]
    assert shares == pytest.approx(dict.fromkeys(range(MOST_CLASSES), 1.0))


def test_nothing_counted_is_an_empty_picture() -> None:
    assert matrix_picture("x", np.zeros((3, 3), np.int64), ["background", "a", "b"])["cells"] == []
