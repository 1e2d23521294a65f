import numpy as np
import pytest
import torch

from stages.ops.metrics.multilabel import (
    average_precision,
    dead_classes,
    label_accuracy,
    leads,
    mean_average_precision,
    multi_hot,
    top1_accuracy,
)


def test_multi_hot():
    assert multi_hot((0, 2), 4).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert multi_hot((), 2).tolist() == [0.0, 0.0]


def test_average_precision_by_hand():
    # ranked: hit (1/1), miss, hit (2/3), miss, hit (3/5)
    logits = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    labels = np.array([True, False, True, False, True])
    assert average_precision(logits, labels) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_equal_logits_enter_together():
    # all five at once: precision 3/5 at recall 1, whatever their order in the list
    assert average_precision(np.zeros(5), np.array([True, True, True, False, False])) == pytest.approx(0.6)
    assert average_precision(np.zeros(5), np.array([False, False, True, True, True])) == pytest.approx(0.6)


def test_average_precision_without_a_positive_is_nan():
    assert np.isnan(average_precision(np.array([1.0, 2.0]), np.array([False, False])))


def test_mean_is_over_classes_that_occur():
    logits = np.array([[1.0, 5.0], [0.0, 5.0]])
    labels = np.array([[False, False], [True, False]])
    assert mean_average_precision(logits, labels) == pytest.approx(0.5)
    assert np.isnan(mean_average_precision(logits, np.zeros((2, 2), dtype=bool)))


@pytest.mark.parametrize("seed", range(5))
def test_mean_average_precision_agrees_with_torchmetrics(seed):
    from torchmetrics.functional.classification import multilabel_average_precision

    generator = np.random.default_rng(seed)
    logits = np.round(generator.normal(size=(40, 5)), 1).astype(np.float32)  # rounding makes ties
    labels = generator.random((40, 5)) < 0.3
    labels[0] = True
    expected = multilabel_average_precision(
        torch.sigmoid(torch.from_numpy(logits)), torch.from_numpy(labels).long(), num_labels=5
    )
    assert mean_average_precision(logits, labels) == pytest.approx(expected.item(), abs=1e-6)


def test_label_accuracy_by_hand():
    logits = np.array([[1.0, -1.0, 0.0], [-2.0, 3.0, 1.0]])  # yes no no / no yes yes
    labels = np.array([[True, False, True], [False, True, False]])
    assert label_accuracy(logits, labels) == pytest.approx(4 / 6)


def test_a_dead_class_occurs_and_is_never_predicted():
    logits = np.array([[1.0, -1.0, -1.0], [-1.0, 0.0, -1.0]])
    labels = np.array([[False, True, False], [True, False, False]])
    assert dead_classes(logits, labels) == [1]  # class 2 does not occur, class 0 is predicted, if on the wrong image


def test_only_the_first_of_exclusive_classes_leads():
    logits = np.array([[5.0, 3.0, -1.0], [-4.0, -2.0, -2.5], [1.0, 1.0, 0.0]])
    np.testing.assert_allclose(leads(logits), [[2.0, -2.0, -6.0], [-2.0, 0.5, -0.5], [0.0, 0.0, -1.0]])
    assert leads(np.array([[3.0], [-3.0]])).tolist() == [[1.0], [1.0]]
    labels = np.array([[True, False, False], [False, False, True], [True, False, False]])
    assert top1_accuracy(logits, labels) == pytest.approx(2 / 3)
