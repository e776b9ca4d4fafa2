"""The reference students against their papers' formulas row by row, on batches, in training and exported."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.plain import linear, network
from vm_training import AuxiliaryHead, Supervision
from vm_training.export import export_served
from vm_training.layers import IdTable, mlp
from vm_training.losses import label_loss
from vm_training.students.dcnv2 import Dcnv2
from vm_training.students.din import Din
from vm_training.students.mlp import Mlp

SIZES: dict[str, Any] = {"num_dense": 2, "num_rows": [5, 3], "width": 2, "hidden": [4, 3]}
LENGTHS = [2, 0, 1, 3]  # of the histories


def made(kind: type[nn.Module], **options: Any) -> Any:
    torch.manual_seed(0)
    student = kind(**SIZES, **options).double()
    with torch.no_grad():
        for weight in student.parameters():
            weight.normal_()
    return student


def inputs(student: nn.Module, num_rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = {
        "dense_BF": torch.randn(num_rows, 2, generator=generator).double(),
        "categories_BC": torch.randint(-(2**63), 2**63 - 1, (num_rows, 2), generator=generator),
    }
    if isinstance(student, Din):
        lengths = torch.tensor((LENGTHS * num_rows)[:num_rows])
        rows["item_B"] = torch.randint(0, 100, (num_rows,), generator=generator)
        rows["history_N"] = torch.randint(0, 100, (int(lengths.sum()),), generator=generator)
        rows["offsets"] = nn.functional.pad(lengths.cumsum(0), (1, 0))
    return rows


def embedded(table: IdTable, num_rows: Sequence[int], ids: Sequence[int]) -> list[float]:
    first, found = 0, []
    for size, value in zip(num_rows, ids, strict=True):
        found += table.table.weight[first + value % size].tolist()  # Python's % is never below 0 either
        first += size
    return found


def first_row(student: Any, rows: dict[str, Tensor], row: int) -> list[float]:
    return rows["dense_BF"][row].tolist() + embedded(student.ids, [5, 3], rows["categories_BC"][row].tolist())


@pytest.mark.parametrize("row", range(4))
def test_the_mlp_is_its_layers_on_floats_and_embeddings(row: int) -> None:
    student = made(Mlp)
    rows = inputs(student)
    x = network(student.layers, first_row(student, rows, row))
    assert student.backbone(rows["dense_BF"], rows["categories_BC"])[row].tolist() == pytest.approx(x)
    assert student(**rows)[row].item() == pytest.approx(linear(student.head, x)[0])


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("rank", [None, 2])
def test_dcnv2_crosses_all_inputs_with_the_first_ones_beside_the_deep_layers(rank: int | None, row: int) -> None:
    student = made(Dcnv2, num_crosses=3, rank=rank)
    rows = inputs(student)
    first = first_row(student, rows, row)
    x = first
    for cross in student.crosses:
        inner = linear(cross.weight, x) if rank is None else linear(cross.weight[1], linear(cross.weight[0], x))
        x = [start * value + before for start, value, before in zip(first, inner, x, strict=True)]
    expected = x + network(student.layers, first)
    assert len(expected) == student.backbone_width
    assert student.backbone(rows["dense_BF"], rows["categories_BC"])[row].tolist() == pytest.approx(expected)
    assert student(**rows)[row].item() == pytest.approx(linear(student.head, expected)[0])


@pytest.mark.parametrize("row", range(4))
def test_din_weighs_each_event_by_the_item_at_hand(row: int) -> None:
    student = made(Din, num_items=7, attention=[3])
    rows = inputs(student)
    query = embedded(student.items, [7], [rows["item_B"][row].item()])
    interest = [0.0, 0.0]
    for event in rows["history_N"][rows["offsets"][row] : rows["offsets"][row + 1]].tolist():
        key = embedded(student.items, [7], [event])
        pair = query + key + [q - k for q, k in zip(query, key, strict=True)]
        pair += [q * k for q, k in zip(query, key, strict=True)]
        (score,) = network(student.attention.score, pair)
        interest = [total + score * value for total, value in zip(interest, key, strict=True)]
    expected = network(student.layers, first_row(student, rows, row) + query + interest)
    assert student.backbone(**rows)[row].tolist() == pytest.approx(expected)
    assert student(**rows)[row].item() == pytest.approx(linear(student.head, expected)[0])


@given(st.lists(st.lists(st.integers(0, 10), max_size=4), min_size=1, max_size=6))
def test_a_rows_history_is_its_own_whatever_the_others_have(histories: list[list[int]]) -> None:
    student = made(Din, num_items=7)
    flat = torch.tensor([event for history in histories for event in history], dtype=torch.int64)
    offsets = nn.functional.pad(torch.tensor([len(history) for history in histories]).cumsum(0), (1, 0))
    width = student.items.table.weight.shape[1]
    item_BW = torch.ones(len(histories), width).double()
    together = student.attention(item_BW, student.items(flat[:, None]).reshape(-1, width), offsets)
    for row, history in enumerate(histories):
        own = student.items(torch.tensor(history, dtype=torch.int64)[:, None]).reshape(-1, width)
        alone = student.attention(item_BW[:1], own, torch.tensor([0, len(history)]))
        torch.testing.assert_close(together[row : row + 1], alone)


STUDENTS = [(Mlp, {}), (Dcnv2, {}), (Dcnv2, {"rank": 2}), (Din, {"num_items": 7})]


@pytest.mark.parametrize(("kind", "options"), STUDENTS)
def test_a_student_learns_its_labels_with_a_head_on_its_backbone(kind: type[nn.Module], options: Any) -> None:
    torch.manual_seed(0)
    student: Any = kind(**SIZES, **options)
    rows = {name: value.float() if value.is_floating_point() else value for name, value in inputs(student, 64).items()}
    label_B = (rows["dense_BF"][:, 0] > 0).float()
    said = {"teacher": Supervision(label_B == 1, {"click": torch.full((64,), 2.0)})}
    heads = AuxiliaryHead(student.backbone_width, {"teacher": ["click"]})
    optimizer = torch.optim.Adam([*student.parameters(), *heads.parameters()], lr=0.02)
    losses = []
    for _ in range(150):
        x_BD = student.backbone(**rows)
        served = label_loss(student.logit(x_BD), label_B)
        optimizer.zero_grad()
        (served + heads(x_BD, said)).backward()
        optimizer.step()
        losses.append(served.item())
    assert losses[-1] < 0.2 < losses[0]


@pytest.mark.parametrize(("kind", "options"), STUDENTS)
def test_a_student_exports_with_rows_and_events_free(kind: type[nn.Module], options: Any) -> None:
    student = made(kind, **options)
    run = export_served(student, inputs(student)).module()
    for num_rows in (1, 3, 17):
        rows = inputs(student, num_rows)
        torch.testing.assert_close(run(**rows), student(**rows))


def test_a_sparse_table_has_gradients_of_the_rows_that_were_used() -> None:
    table = IdTable([5, 3], 2, sparse=True)
    table(torch.tensor([[1, 2], [6, 2]])).sum().backward()
    gradient = table.table.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient.coalesce().indices().tolist() == [[1, 7]]


def test_a_table_of_no_feature_adds_nothing() -> None:
    assert IdTable([], 2)(torch.zeros((4, 0), dtype=torch.int64)).shape == (4, 0, 2)


def test_an_mlp_without_a_last_layer_ends_with_an_activation() -> None:
    assert [type(layer) for layer in mlp(3, [4])] == [nn.Linear, nn.ReLU]
    assert [type(layer) for layer in mlp(3, [], out=1)] == [nn.Linear]
