"""Torch's metrics are numpy's, and say NaN where those refuse."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor

from vm_training import metrics, torch_metrics

rows = st.lists(st.tuples(st.integers(-6, 6), st.booleans(), st.booleans()), min_size=1, max_size=40).filter(
    lambda triples: len({label for _, label, labeled in triples if labeled}) == 2
)
NAMES = ["normalized_entropy", "log_loss", "auc", "calibration"]


def tensors(triples: list[tuple[int, bool, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    logit_B, label_B, labeled_B = (tensor(column) for column in zip(*triples, strict=True))
    return logit_B.float(), label_B.float(), labeled_B


@pytest.mark.parametrize("name", NAMES)
@given(triples=rows)
def test_a_metric_is_numpys_over_the_rows_labelled(name: str, triples: list[tuple[int, bool, bool]]) -> None:
    kept = [(logit, label) for logit, label, labeled in triples if labeled]
    expected = getattr(metrics, name)(*zip(*kept, strict=True))
    logit_B, label_B, labeled_B = tensors(triples)
    masked_B = torch.where(labeled_B, label_B, math.nan)
    found: Tensor = getattr(torch_metrics, name)(logit_B, masked_B, labeled_B)
    assert (found.dtype, found.shape) == (torch.float64, ())
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert getattr(torch_metrics, name)(logit_B[labeled_B], label_B[labeled_B]).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("logit", "label"),
    [([], []), ([0.0, math.nan], [0, 1])],
)
def test_what_numpy_refuses_is_nan(name: str, logit: list[float], label: list[float]) -> None:
    assert getattr(torch_metrics, name)(tensor(logit), tensor(label, dtype=torch.float32)).isnan()


@pytest.mark.parametrize("metric", [torch_metrics.normalized_entropy, torch_metrics.auc])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_is_nan(metric: Callable[..., Any], label: float) -> None:
    assert metric(tensor([0.0, 1.0]), tensor([label, label])).isnan()


def test_calibration_without_a_positive_is_nan() -> None:
    assert torch_metrics.calibration(tensor([0.0]), tensor([0.0])).isnan()


def test_a_logit_that_is_nan_counts_nowhere_where_it_is_masked() -> None:
    logit_B, label_B, labeled_B = tensor([1.0, math.nan, -1.0]), tensor([1.0, 1.0, 0.0]), tensor([True, False, True])
    found = [getattr(torch_metrics, name)(logit_B, label_B, labeled_B).item() for name in NAMES]
    assert found == pytest.approx([getattr(metrics, name)([1.0, -1.0], [1, 0]) for name in NAMES])


def test_a_confident_logit_costs_itself() -> None:
    sure = tensor([800.0, -math.inf])
    assert torch_metrics.log_loss(sure, tensor([0.0, 0.0])).item() == 400.0
    assert torch_metrics.log_loss(sure, tensor([1.0, 1.0])).item() == math.inf


def test_no_gradient_is_kept() -> None:
    logit_B = tensor([0.5, -0.5], requires_grad=True)
    assert not any(getattr(torch_metrics, name)(logit_B, tensor([1.0, 0.0])).requires_grad for name in NAMES)
