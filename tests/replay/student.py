"""A small student: logistic regression over ids and price, in one pass; what the teacher says is a feature.

It has two sets of weights, one for rows without a word of the teacher and one for rows with it: a masked row is
predicted as if there were no teacher. Each row is predicted before it is trained on, so that the AUC is that of rows it
has not seen. Plain floats in a fixed order: the numbers are the same each time.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_RATE = 0.3


class _Weights:
    """Logistic regression by Adagrad."""

    def __init__(self) -> None:
        self._weights: dict[str, float] = {}
        self._squares: dict[str, float] = {}

    def logit(self, features: Mapping[str, float]) -> float:
        return sum(self._weights.get(name, 0.0) * value for name, value in features.items())

    def learn(self, features: Mapping[str, float], label: float) -> None:
        error = 1 / (1 + math.exp(-self.logit(features))) - label
        for name, value in features.items():
            gradient = error * value
            self._squares[name] = self._squares.get(name, 1.0) + gradient * gradient
            self._weights[name] = self._weights.get(name, 0.0) - _RATE * gradient / math.sqrt(self._squares[name])


def train(rows: Sequence[Mapping[str, Any]], teacher_logits: Sequence[float | None]) -> list[float]:
    """Give each row's logit from before it was trained on. teacher_logits: None where nothing is said."""
    alone, told = _Weights(), _Weights()
    logits = []
    for row, teacher_logit in zip(rows, teacher_logits, strict=True):
        own = {"bias": 1.0, "price": row["price"], f"user {row['user_id']}": 1.0, f"item {row['item']}": 1.0}
        logit = alone.logit(own)
        alone.learn(own, row["click"])
        if teacher_logit is not None:
            with_teacher = {**own, "teacher": teacher_logit}
            logit = told.logit(with_teacher)
            told.learn(with_teacher, row["click"])
        logits.append(logit)
    return logits


def auc(logits: Sequence[float], labels: Sequence[float]) -> float:
    """Give the share of pairs of a click and none that are in the right order, ties counted by half."""
    clicks = [logit for logit, label in zip(logits, labels, strict=True) if label > 0.5]
    others = [logit for logit, label in zip(logits, labels, strict=True) if label <= 0.5]
    right = sum((click > other) + (click == other) / 2 for click in clicks for other in others)
    return right / (len(clicks) * len(others))
