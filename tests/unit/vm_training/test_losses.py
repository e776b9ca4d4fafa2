"""The losses and their gradients against a plain restatement, row by row."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.autograd import gradcheck

from tests.plain import cross_entropy, logits, mean, probability, shifted
from vm_training.losses import auxiliary_loss, distillation_loss, label_loss

rows = st.lists(
    st.tuples(logits, st.sampled_from([0.0, 1.0]), st.booleans(), logits, st.booleans()), min_size=1, max_size=20
)
scales = st.floats(0.05, 20)
rates = st.floats(0.01, 1)
Row = tuple[float, float, bool, float, bool]
Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tensors(pairs: list[Row]) -> Given:
    """logit_B, label_B, labeled_B, teacher_logit_B, present_B"""
    columns = [tensor(column) for column in zip(*pairs, strict=True)]
    return tuple(column if column.dtype == torch.bool else column.double() for column in columns)  # type: ignore[return-value]


def plain_label_loss(pairs: list[Row]) -> float:
    return mean(cross_entropy(z, y) for z, y, labeled, _, _ in pairs if labeled)


def plain_auxiliary_loss(pairs: list[Row], *, alpha: float = 1.0, rate: float = 1.0) -> float:
    targets = [(z, min(1.0, alpha * shifted(probability(t), rate))) for z, _, _, t, present in pairs if present]
    return mean(cross_entropy(z, target) for z, target in targets)


@given(rows)
def test_the_label_loss_is_the_mean_over_the_rows_labelled(pairs: list[Row]) -> None:
    logit_B, label_B, labeled_B, *_ = tensors(pairs)
    expected = pytest.approx(plain_label_loss(pairs), rel=1e-9, abs=1e-12)
    assert label_loss(logit_B, label_B, labeled_B).item() == expected
    assert label_loss(logit_B, torch.where(labeled_B, label_B, math.nan)).item() == expected


@given(rows, scales, rates)
def test_the_auxiliary_loss_is_the_mean_over_the_rows_present(pairs: list[Row], alpha: float, rate: float) -> None:
    logit_B, _, _, teacher_B, present_B = tensors(pairs)
    found = auxiliary_loss(logit_B, teacher_B, present_B, alpha=alpha, sampling_rate=rate)
    assert found.item() == pytest.approx(plain_auxiliary_loss(pairs, alpha=alpha, rate=rate), rel=1e-9, abs=1e-9)


@given(rows, scales, rates)
def test_the_plain_loss_is_both_one_of_them_weighted(pairs: list[Row], weight: float, rate: float) -> None:
    logit_B, label_B, labeled_B, teacher_B, present_B = tensors(pairs)
    found = distillation_loss(
        logit_B, label_B, teacher_B, present_B, labeled_B=labeled_B, weight=weight, sampling_rate=rate
    )
    expected = plain_label_loss(pairs) + weight * plain_auxiliary_loss(pairs, rate=rate)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(rows)
def test_its_gradient_pulls_each_row_to_its_label_and_a_present_one_to_the_teacher_too(pairs: list[Row]) -> None:
    logit_B, label_B, labeled_B, teacher_B, present_B = tensors(pairs)
    logit_B.requires_grad_()
    distillation_loss(logit_B, label_B, teacher_B, present_B, labeled_B=labeled_B).backward()
    num_labeled, num_present = sum(row[2] for row in pairs), sum(row[4] for row in pairs)
    expected = [
        (labeled and (probability(z) - y) / num_labeled) + (present and (probability(z) - probability(t)) / num_present)
        for z, y, labeled, t, present in pairs
    ]
    assert logit_B.grad is not None
    assert logit_B.grad.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_gradients_are_those_of_the_numbers_around() -> None:
    generator = torch.Generator().manual_seed(0)
    logit_B, teacher_B = (4 * torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    label_B, mask_B = tensor([0.0, 1.0] * 3).double(), tensor([True, True, False] * 2)
    logit_B.requires_grad_()
    assert gradcheck(lambda z: label_loss(z, label_B, mask_B), logit_B)
    assert gradcheck(lambda z: auxiliary_loss(z, teacher_B, mask_B, alpha=3, sampling_rate=0.2), logit_B)
    assert gradcheck(lambda z: distillation_loss(z, label_B, teacher_B, mask_B, weight=7), logit_B)


@given(rows, st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_what_stands_in_rows_without_label_or_supervision_changes_nothing(pairs: list[Row], anything: float) -> None:
    def loss_and_gradient(label_B: Tensor, teacher_B: Tensor) -> tuple[float, list[float]]:
        leaf_B = logit_B.clone().requires_grad_()
        loss = distillation_loss(leaf_B, label_B, teacher_B, present_B, labeled_B=labeled_B)
        loss.backward()
        assert leaf_B.grad is not None
        return loss.item(), leaf_B.grad.tolist()

    logit_B, label_B, labeled_B, teacher_B, present_B = tensors(pairs)
    others = torch.where(labeled_B, label_B, anything), torch.where(present_B, teacher_B, anything)
    assert loss_and_gradient(*others) == loss_and_gradient(label_B, teacher_B)


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_costs_nothing_where_it_is_masked(logit: float) -> None:
    logit_B, mask_B = tensor([0.5, logit], requires_grad=True), tensor([True, False])
    loss = auxiliary_loss(logit_B, tensor([1.0, 1.0]), mask_B) + label_loss(logit_B, tensor([1.0, 0.0]), mask_B)
    loss.backward()
    assert logit_B.grad is not None
    assert loss.isfinite()
    assert logit_B.grad[1] == 0


@pytest.mark.parametrize("teacher", [math.inf, -math.inf, 1e4])
def test_a_teacher_that_is_sure_is_a_target_like_any_other(teacher: float) -> None:
    loss = auxiliary_loss(tensor([0.5]), tensor([teacher]), tensor([True]), alpha=0.5)
    assert loss.item() == pytest.approx(cross_entropy(0.5, 0.5 * (teacher > 0)))


def test_no_gradient_flows_to_the_teacher() -> None:
    logit_B, teacher_B = tensor([0.5], requires_grad=True), tensor([1.0], requires_grad=True)
    distillation_loss(logit_B, tensor([1.0]), teacher_B, tensor([True])).backward()
    assert teacher_B.grad is None


def test_half_precision_logits_are_taken() -> None:
    loss = distillation_loss(tensor([0.5]).bfloat16(), tensor([1.0]), tensor([1.0]), tensor([True]))
    assert loss.item() == pytest.approx(cross_entropy(0.5, 1.0) + cross_entropy(0.5, probability(1.0)), rel=1e-2)


def _of_all(logit_B: Tensor, label_B: Tensor, teacher_B: Tensor, mask_B: Tensor) -> Tensor:
    return distillation_loss(logit_B, label_B, teacher_B, mask_B)


def _of_labels(logit_B: Tensor, label_B: Tensor, _: Tensor, mask_B: Tensor) -> Tensor:
    return label_loss(logit_B, label_B, mask_B)


@pytest.mark.parametrize("loss", [_of_all, _of_labels])
@pytest.mark.parametrize("shapes", [((2,), (2,), (2,), (1,)), ((2, 1), (2,), (2,), (2,)), ((2, 1),) * 4, ((0,),) * 4])
def test_shapes_that_would_be_broadcast_are_refused(
    loss: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]
) -> None:
    logit_B, label_B, teacher_B, present_B = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="at least one row are needed, the shapes are"):
        loss(logit_B, label_B, teacher_B, present_B.bool())
