"""Metrics against values computed by hand and against ten-line references."""

import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_training.metrics import auc, calibration, log_loss, normalized_entropy

LN2 = math.log(2.0)
rows = st.lists(st.tuples(st.integers(-6, 6), st.booleans()), min_size=2, max_size=40).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_log_loss_of_two_rows_is_what_a_hand_computes() -> None:
    assert log_loss([_logit(0.8), _logit(0.4)], [1, 0]) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)


def test_entropy_is_one_when_only_the_base_rate_is_known() -> None:
    assert normalized_entropy(np.full(8, _logit(0.25)), [1, 1, 0, 0, 0, 0, 0, 0]) == pytest.approx(1.0)


def test_entropy_of_four_rows_is_what_a_hand_computes() -> None:
    logits, labels = [_logit(0.5), _logit(0.75), _logit(0.25), 0.0], [True, True, False, False]
    assert normalized_entropy(logits, labels) == pytest.approx((2 * LN2 + 2 * math.log(4 / 3)) / 4 / LN2)


def test_a_confident_mistake_costs_its_logit_and_not_infinity() -> None:
    assert log_loss([800.0, -800.0], [0, 1]) == pytest.approx(800.0)
    assert log_loss([800.0, -800.0], [1, 0]) == 0.0


def test_auc_counts_ordered_pairs_and_half_of_the_ties() -> None:
    assert auc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1]) == (1 + 1 + 0.5 + 1) / 4


@given(rows)
def test_auc_equals_the_count_over_all_pairs(pairs: list[tuple[int, bool]]) -> None:
    positives = [score for score, label in pairs if label]
    negatives = [score for score, label in pairs if not label]
    won = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert auc(*zip(*pairs, strict=True)) == won / (len(positives) * len(negatives))


@given(rows)
def test_auc_of_turned_scores_is_the_rest_to_one(pairs: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([s for s, _ in pairs]), np.array([label for _, label in pairs])
    assert auc(-scores, labels) == pytest.approx(1 - auc(scores, labels))


@given(rows, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(pairs: list[tuple[int, bool]], random: Random) -> None:
    shuffled = random.sample(pairs, len(pairs))
    for metric in (normalized_entropy, auc, calibration):
        assert metric(*zip(*pairs, strict=True)) == pytest.approx(metric(*zip(*shuffled, strict=True)))


def test_calibration_is_the_sum_of_predictions_over_the_sum_of_labels() -> None:
    assert calibration([_logit(0.5), _logit(0.7), _logit(0.3)], [1, 0, 0]) == pytest.approx(1.5)
    assert calibration([-1000.0, 1000.0], [0, 1]) == 1.0


def test_calibration_takes_labels_that_are_all_positive() -> None:
    assert calibration([0.0, 0.0], [1, 1]) == 0.5


@pytest.mark.parametrize("metric", [normalized_entropy, auc])
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_refused(metric: Callable[..., float], label: int) -> None:
    with pytest.raises(ValueError, match=f"both classes are needed, all 2 labels are {label}"):
        metric([0.0, 1.0], [label, label])


def test_calibration_without_a_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a positive label"):
        calibration([0.0], [0])


@pytest.mark.parametrize("metric", [normalized_entropy, log_loss, auc, calibration])
@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        ([], [], "there are no rows"),
        ([0.0, 1.0], [1], "the shapes are"),
        ([[0.0]], [[1]], "the shapes are"),
        ([0.0, float("nan")], [0, 1], "1 of 2 values are NaN"),
        ([0.0, 0.0], [0, 0.5], "not 0 or 1"),
        ([0.0, 0.0], [0, float("nan")], "not 0 or 1"),
    ],
)
def test_rows_that_cannot_be_evaluated_are_refused(
    metric: Callable[..., float], values: list[float], labels: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(values, labels)
