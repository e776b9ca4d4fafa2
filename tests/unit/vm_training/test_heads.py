"""Auxiliary heads and adapters against a plain restatement: values, gradients, masks, FMs and tasks."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, tensor
from torch.autograd import gradcheck

from tests.plain import cross_entropy, gradients, logits, mean, network, probability, shifted
from vm_training import AuxiliaryHead, GradScale, StudentAdapter, Supervision
from vm_training.losses import auxiliary_loss, distillation_loss

WIDTH, ROWS = 3, 7
TASKS = {"small": ["click"], "large": ["click", "buy"]}
CLICK = {"small": ["click"]}
scales = st.floats(0.05, 20)
rates = st.floats(0.01, 1)


@st.composite
def supervision(draw: st.DrawFn) -> dict[str, Supervision]:
    """What the FMs of TASKS said; NaN where they said nothing."""

    def said(tasks: list[str]) -> Supervision:
        present_B = tensor(draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)))
        columns = [draw(st.lists(logits, min_size=ROWS, max_size=ROWS)) for _ in tasks]
        masked = [torch.where(present_B, tensor(column).double(), math.nan) for column in columns]
        return Supervision(present_B, dict(zip(tasks, masked, strict=True)))

    return {fm: said(tasks) for fm, tasks in TASKS.items()}


@st.composite
def labels(draw: st.DrawFn) -> dict[str, Tensor]:
    """Labels of both tasks, NaN where there is none."""
    label = st.sampled_from([0.0, 1.0, math.nan])
    return {task: tensor(draw(st.lists(label, min_size=ROWS, max_size=ROWS))).double() for task in ("click", "buy")}


def backbone_output(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


def one_fm() -> dict[str, Supervision]:
    present_B = tensor([True] * (ROWS - 2) + [False] * 2)
    return {"small": Supervision(present_B, {"click": torch.linspace(-3, 3, ROWS).double()})}


def pairs() -> list[tuple[str, str]]:
    return [(fm, task) for fm, tasks in TASKS.items() for task in tasks]


def rows_of(said: Supervision, task: str) -> list[tuple[int, float]]:
    """The rows present, and their logits."""
    return [(row, said.logits[task][row].item()) for row in range(ROWS) if said.present_B[row]]


@given(supervision(), scales, scales, rates)
def test_the_term_is_the_weighted_sum_of_each_fms_and_tasks_mean(
    fms: dict[str, Supervision], alpha: float, weight: float, rate: float
) -> None:
    x_BD = backbone_output()
    heads = AuxiliaryHead(
        WIDTH, TASKS, hidden=[4], alpha=alpha, beta=3, weight=weight, sampling_rates={"buy": rate}
    ).double()
    expected = 0.0
    for fm, task in pairs():
        kept = rate if task == "buy" else 1.0
        rows = [
            (network(heads.heads[f"{fm}__{task}"], x_BD[row].tolist())[0], shifted(probability(logit), kept))
            for row, logit in rows_of(fms[fm], task)
        ]
        expected += weight * mean(cross_entropy(z, min(1.0, alpha * p)) for z, p in rows)
    assert heads(x_BD, fms).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(supervision(), scales)
def test_beta_scales_the_gradient_into_the_backbone_and_no_other(fms: dict[str, Supervision], beta: float) -> None:
    plain = AuxiliaryHead(WIDTH, TASKS, hidden=[4]).double()
    scaled = copy.deepcopy(plain)
    scaled.scale = GradScale(beta)
    x_BD = backbone_output()
    terms = plain(x_BD, fms), scaled(x_BD, fms)
    into = [torch.autograd.grad(term, x_BD, retain_graph=True)[0] for term in terms]
    assert terms[0].item() == terms[1].item()
    torch.testing.assert_close(into[1], beta * into[0], rtol=1e-12, atol=1e-15)
    own, others = gradients(terms[0], plain), gradients(terms[1], scaled)
    assert all(torch.equal(own[name], others[name]) for name in own)
    assert all(value.isfinite().all() for value in (*into, *own.values()))


@given(supervision())
def test_with_all_scales_at_one_a_head_is_the_single_head_loss_beside_the_labels(fms: dict[str, Supervision]) -> None:
    heads = AuxiliaryHead(WIDTH, CLICK).double()
    student, x_BD = heads.heads["small__click"], backbone_output()
    label_B, said = torch.ones(ROWS).double(), fms["small"]
    logit_B = student(x_BD).squeeze(1)
    by_head = nn.functional.binary_cross_entropy_with_logits(logit_B, label_B) + heads(x_BD, fms)
    single = distillation_loss(logit_B, label_B, said.logits["click"], said.present_B)
    assert by_head.item() == pytest.approx(single.item(), rel=1e-12)
    into = [torch.autograd.grad(loss, x_BD, retain_graph=True)[0] for loss in (by_head, single)]
    torch.testing.assert_close(*into, rtol=1e-12, atol=1e-15)


def test_gradients_are_those_of_the_numbers_around() -> None:
    heads = AuxiliaryHead(WIDTH, CLICK, hidden=[4], alpha=2, weight=5, sampling_rates={"click": 0.3}).double()
    assert gradcheck(lambda x_BD: heads(x_BD, one_fm()), backbone_output())
    assert gradcheck(GradScale(1.0), backbone_output())
    x_BD = backbone_output()
    assert torch.equal(GradScale(20.0)(x_BD), x_BD)
    (gradient,) = torch.autograd.grad((GradScale(20.0)(x_BD) ** 2).sum(), x_BD)
    torch.testing.assert_close(gradient, 40 * x_BD)


def test_a_batch_without_any_supervision_adds_zero_and_no_gradient() -> None:
    heads, x_BD = AuxiliaryHead(WIDTH, CLICK).double(), backbone_output()
    nothing = {"small": Supervision(torch.zeros(ROWS, dtype=torch.bool), {"click": torch.full((ROWS,), math.nan)})}
    term = heads(x_BD, nothing)
    term.backward()
    assert term.item() == 0
    assert x_BD.grad is not None
    assert not x_BD.grad.any()


def test_the_served_head_has_no_gradient_from_what_the_fms_said() -> None:
    backbone, served = nn.Linear(2, WIDTH).double(), nn.Linear(WIDTH, 1).double()
    heads, second, adapter = AuxiliaryHead(WIDTH, CLICK), AuxiliaryHead(WIDTH, CLICK), StudentAdapter(CLICK)
    heads.double(), second.double(), adapter.double()
    x_BD = backbone(torch.ones(ROWS, 2).double())
    adapted = adapter.step(one_fm(), {"click": torch.ones(ROWS).double()})
    loss = heads(x_BD, one_fm()) + second(x_BD, adapted) + 0 * served(x_BD).sum()
    loss.backward()
    assert not any(weight.grad.any() for weight in served.parameters() if weight.grad is not None)
    assert all(weight.grad is None for weight in adapter.parameters())
    assert all(weight.grad is not None and weight.grad.any() for weight in backbone.parameters())


# ---- the adapter


@given(supervision(), labels(), rates)
def test_an_adapter_steps_on_the_mean_over_rows_with_label_and_supervision(
    fms: dict[str, Supervision], label: dict[str, Tensor], rate: float
) -> None:
    adapter = StudentAdapter(TASKS, sampling_rates={"click": rate}).double()
    adapter.optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    before = copy.deepcopy(adapter)
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in before.named_parameters()}

    loss = sum((0 * leaf.sum() for leaf in leaves.values()), torch.zeros((), dtype=torch.float64))
    for fm, task in pairs():
        shift = math.log(rate) if task == "click" else 0.0
        kept = [(logit - shift, label[task][row].item()) for row, logit in rows_of(fms[fm], task)]
        start = f"adapters.{fm}__{task}."
        own = {name.removeprefix(start): leaf for name, leaf in leaves.items() if name.startswith(start)}
        each = [_adapter_loss(own, logit, y) for logit, y in kept if not math.isnan(y)]
        loss = loss + sum(each) / max(1, len(each))
    found = torch.autograd.grad(loss, list(leaves.values()))
    stepped = {name: leaf - 0.1 * gradient for (name, leaf), gradient in zip(leaves.items(), found, strict=True)}

    adapter.step(fms, label)
    for name, weight in adapter.named_parameters():
        torch.testing.assert_close(weight, stepped[name], rtol=1e-6, atol=1e-8)


def _adapter_loss(weights: dict[str, Tensor], logit: float, label: float) -> Tensor:
    hidden = nn.functional.silu(weights["0.weight"][:, 0] * logit + weights["0.bias"])
    z = (weights["2.weight"][0] * hidden).sum() + weights["2.bias"][0]
    return nn.functional.softplus(z) - label * z


@given(supervision(), st.sampled_from([(), (2,), (8,), (4, 3)]))
def test_an_adapter_gives_back_what_it_gets_until_it_has_learnt(
    fms: dict[str, Supervision], hidden: tuple[int, ...]
) -> None:
    adapter = StudentAdapter(TASKS, hidden=hidden).double()
    for fm, task in pairs():
        said = fms[fm]
        found = adapter(fms)[fm].logits[task]
        assert torch.allclose(found, torch.where(said.present_B, said.logits[task], 0.0), atol=1e-12)


def test_an_adapter_learns_with_all_its_units() -> None:
    adapter = StudentAdapter(CLICK, hidden=(8,)).double()
    before = [weight.clone() for weight in adapter.parameters()]
    for _ in range(2):
        adapter.step(one_fm(), {"click": torch.ones(ROWS)})
    changed = [(weight != was).flatten(1).all(dim=1) if weight.dim() > 1 else weight != was
               for weight, was in zip(adapter.parameters(), before, strict=True)]  # fmt: skip
    assert all(bool(each.all()) for each in changed)


def test_a_layer_of_one_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="two units"):
        StudentAdapter(CLICK, hidden=(4, 1))


@given(supervision(), labels())
def test_an_adapter_gives_its_logits_from_after_the_step_detached_in_place_of_the_fms(
    fms: dict[str, Supervision], label: dict[str, Tensor]
) -> None:
    adapter = StudentAdapter(TASKS, sampling_rates={"buy": 0.5}).double()
    adapted = adapter.step(fms, label)
    assert adapted.keys() == fms.keys()
    for fm, task in pairs():
        assert adapted[fm].present_B is fms[fm].present_B
        assert not adapted[fm].logits[task].requires_grad
        shift = math.log(2) if task == "buy" else 0.0
        for row, logit in rows_of(fms[fm], task):
            (expected,) = network(adapter.adapters[f"{fm}__{task}"], [logit + shift])
            assert adapted[fm].logits[task][row].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(supervision(), labels())
def test_a_head_on_adapted_logits_learns_the_adapters_probability(
    fms: dict[str, Supervision], label: dict[str, Tensor]
) -> None:
    heads, adapter, x_BD = AuxiliaryHead(WIDTH, CLICK).double(), StudentAdapter(CLICK).double(), backbone_output()
    adapted = adapter.step(fms, label)
    expected = mean(
        cross_entropy(heads.heads["small__click"](x_BD[row]).item(), probability(logit))
        for row, logit in rows_of(adapted["small"], "click")
    )
    assert heads(x_BD, adapted).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_an_adapter_learns_the_bias_that_its_teacher_has() -> None:
    generator = torch.Generator().manual_seed(0)
    logit_B = torch.randn(4096, generator=generator) * 2
    label_B = torch.bernoulli((logit_B - 2).sigmoid(), generator=generator)  # the teacher says two too much
    fms = {"small": Supervision(torch.ones(4096, dtype=torch.bool), {"click": logit_B})}
    torch.manual_seed(0)
    adapter = StudentAdapter(CLICK)
    for _ in range(200):
        adapted = adapter.step(fms, {"click": label_B})["small"].logits["click"]
    bias = (adapted.sigmoid().mean() / label_B.mean()).item()
    assert bias == pytest.approx(1, abs=0.05)
    assert (logit_B.sigmoid().mean() / label_B.mean()).item() > 1.5


def test_an_adapters_parameters_among_the_students_are_left_alone_by_its_optimizer() -> None:
    served, adapter = nn.Linear(WIDTH, 1).double(), StudentAdapter(CLICK).double()
    optimizer = torch.optim.AdamW([*served.parameters(), *adapter.parameters()], lr=0.1, weight_decay=0.5)
    adapter.step(one_fm(), {"click": torch.ones(ROWS).double()})
    before = copy.deepcopy(adapter.state_dict())
    optimizer.zero_grad()
    served(backbone_output()).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


def test_a_copy_of_an_adapter_goes_on_alone_from_the_same_state() -> None:
    torch.manual_seed(0)
    adapter, label = StudentAdapter(CLICK), {"click": torch.ones(ROWS)}
    fms = {"small": Supervision(one_fm()["small"].present_B, {"click": one_fm()["small"].logits["click"].float()})}
    adapter.step(fms, label)
    other = copy.deepcopy(adapter)
    expected = adapter.step(fms, label)["small"].logits["click"]
    assert torch.equal(other.step(fms, label)["small"].logits["click"], expected)


def test_a_mask_of_labels_is_used_where_it_is_given() -> None:
    label_B, labeled_B = torch.zeros(ROWS).double(), tensor([True] * 3 + [False] * (ROWS - 3))
    by_mask = StudentAdapter(CLICK).double()
    by_nan = copy.deepcopy(by_mask)
    found = by_mask.step(one_fm(), {"click": label_B}, {"click": labeled_B})["small"].logits["click"]
    masked = {"click": torch.where(labeled_B, label_B, math.nan)}
    assert torch.equal(found, by_nan.step(one_fm(), masked)["small"].logits["click"])
    assert auxiliary_loss(label_B, found, labeled_B).isfinite()


# ---- what is refused


def test_names_that_torch_has_for_itself_are_names_like_others() -> None:
    heads = AuxiliaryHead(WIDTH, {"keys": ["train", "type"]})
    present_B = torch.ones(ROWS, dtype=torch.bool)
    fms = {"keys": Supervision(present_B, {"train": torch.zeros(ROWS), "type": torch.zeros(ROWS)})}
    assert heads(backbone_output().float(), fms).isfinite()


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ({}, {}, "no FM has a task"),
        ({"small": []}, {}, "no FM has a task"),
        (CLICK, {"alpha": 0.0}, "alpha=0.0"),
        (CLICK, {"beta": -1.0}, "beta=-1.0"),
        (CLICK, {"weight": -1.0}, "weight=-1.0"),
        (CLICK, {"sampling_rates": {"click": 0.0}}, "sampling rate 0.0 of task click"),
        (CLICK, {"sampling_rates": {"buy": 0.5}}, "given for buy, which is no task here"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tasks: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuxiliaryHead(WIDTH, tasks, **options)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"large": ["click"]}, "FM large said nothing in this batch, it has small: ask for fms="),
        ({"small": ["buy"]}, "FM small has no logit of task buy in this batch, it has click"),
    ],
)
def test_an_fm_or_task_that_is_not_in_the_batch_is_named(tasks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuxiliaryHead(WIDTH, tasks).double()(backbone_output(), one_fm())
    with pytest.raises(ValueError, match=message):
        StudentAdapter(tasks).double()(one_fm())
    with pytest.raises(ValueError, match=message):
        StudentAdapter(tasks).double().step(one_fm(), {"click": torch.zeros(ROWS), "buy": torch.zeros(ROWS)})
