"""The distillation loss and its gradient against a plain restatement, row by row."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor

from vm_training.losses import distillation_loss

logits = st.floats(-30, 30, width=32)
rows = st.lists(st.tuples(logits, st.sampled_from([0.0, 1.0]), logits, st.booleans()), min_size=1, max_size=20)
Row = tuple[float, float, float, bool]


def tensors(pairs: list[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logit_B, label_B, teacher_B, present_B = (tensor(column) for column in zip(*pairs, strict=True))
    return logit_B.double(), label_B.double(), teacher_B.double(), present_B


def probability(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def cross_entropy(logit: float, target: float) -> float:
    return max(logit, 0) - logit * target + math.log1p(math.exp(-abs(logit)))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@given(rows)
def test_it_is_the_labels_mean_and_the_mean_over_the_rows_that_are_present(pairs: list[Row]) -> None:
    expected = mean([cross_entropy(z, y) for z, y, _, _ in pairs])
    expected += mean([cross_entropy(z, probability(t)) for z, _, t, present in pairs if present])
    assert distillation_loss(*tensors(pairs)).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(rows)
def test_its_gradient_pulls_each_row_to_its_label_and_a_present_one_to_the_teacher_too(pairs: list[Row]) -> None:
    logit_B, label_B, teacher_B, present_B = tensors(pairs)
    logit_B.requires_grad_()
    distillation_loss(logit_B, label_B, teacher_B, present_B).backward()
    num_present = sum(present for *_, present in pairs)
    expected = [
        (probability(z) - y) / len(pairs) + (present and (probability(z) - probability(t)) / num_present)
        for z, y, t, present in pairs
    ]
    assert logit_B.grad is not None
    assert logit_B.grad.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(rows, st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_what_stands_in_a_row_without_supervision_changes_nothing(pairs: list[Row], anything: float) -> None:
    def loss_and_gradient(teacher_B: Tensor) -> tuple[float, list[float]]:
        leaf_B = logit_B.clone().requires_grad_()
        loss = distillation_loss(leaf_B, label_B, teacher_B, present_B)
        loss.backward()
        assert leaf_B.grad is not None
        return loss.item(), leaf_B.grad.tolist()

    logit_B, label_B, teacher_B, present_B = tensors(pairs)
    other_B = torch.where(present_B, teacher_B, anything)
    assert loss_and_gradient(other_B) == loss_and_gradient(teacher_B)


def test_no_gradient_flows_to_the_teacher() -> None:
    logit_B, teacher_B = tensor([0.5], requires_grad=True), tensor([1.0], requires_grad=True)
    distillation_loss(logit_B, tensor([1.0]), teacher_B, tensor([True])).backward()
    assert teacher_B.grad is None


@pytest.mark.parametrize("shapes", [((2,), (2,), (2,), (1,)), ((2, 1), (2,), (2,), (2,)), ((0,),) * 4])
def test_shapes_that_would_be_broadcast_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    logit_B, label_B, teacher_B, present_B = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="at least one row are needed, the shapes are"):
        distillation_loss(logit_B, label_B, teacher_B, present_B.bool())
