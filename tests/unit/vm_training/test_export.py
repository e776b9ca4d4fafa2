"""The served graph has nothing of the heads that nobody serves, and says so of one that has."""

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vm_training import AuxiliaryHead, StudentAdapter
from vm_training.export import export_served, refuse_unserved
from vm_training.students.mlp import Mlp

CLICK = {"teacher": ["click"]}
MARK = 12_345.678  # stands in every weight of the heads, so that a file is searched for it


class Taught(nn.Module):
    """A student that holds what it learns with, as many trainers do; `leak` is how it serves that too."""

    def __init__(self, leak: str = "") -> None:
        super().__init__()
        self.student = Mlp(num_dense=2, num_rows=[11, 7], hidden=[6])
        self.heads = AuxiliaryHead(6, CLICK)
        self.adapter = StudentAdapter(CLICK)
        self.extra = nn.Linear(6, 1)
        self.leak = leak
        with torch.no_grad():
            for module in (self.heads, self.adapter, self.extra):
                for weight in module.parameters():
                    weight.fill_(MARK)

    def forward(self, dense_BF: Tensor, categories_BC: Tensor) -> Tensor:
        x_BD = self.student.backbone(dense_BF, categories_BC)
        if self.leak == "call":
            x_BD = x_BD + self.extra(x_BD)
        if self.leak == "part":
            x_BD = x_BD + self.heads.heads["teacher__click"](x_BD)
        return self.student.logit(x_BD)


class Smuggler(nn.Module):
    """Serves a head that it does not hold as a module."""

    def __init__(self, heads: AuxiliaryHead) -> None:
        super().__init__()
        self.held = (heads,)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.held[0].heads["teacher__click"](x_BD).squeeze(1)


def example(num_rows: int = 5) -> dict[str, Tensor]:
    return {"dense_BF": torch.rand(num_rows, 2), "categories_BC": torch.arange(2 * num_rows).reshape(num_rows, 2)}


def test_the_graph_has_the_served_parameters_and_no_other() -> None:
    taught = Taught()
    program = export_served(taught, example(), unserved=[taught.extra])
    served = {f"student.{name}" for name, _ in taught.student.named_parameters()}
    assert set(program.graph_signature.inputs_to_parameters.values()) == served
    assert set(program.state_dict) == served
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    assert len(inputs) == len(served) + len(program.graph_signature.inputs_to_buffers) + 2
    assert all(node.users for node in inputs)


def test_the_file_has_not_one_weight_of_the_heads(tmp_path: Path) -> None:
    def holds_mark(program: torch.export.ExportedProgram) -> bool:
        torch.export.save(program, str(tmp_path / "model.pt2"))
        with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
            return any(struct.pack("<f", MARK) in archive.read(name) for name in archive.namelist())

    taught = Taught()
    assert not holds_mark(export_served(taught, example(), unserved=[taught.extra]))
    with_extra = export_served(taught, example())
    assert holds_mark(with_extra)  # which torch carries along though nothing uses it


def test_the_graph_serves_what_the_student_says_for_any_number_of_rows() -> None:
    taught = Taught()
    run = export_served(taught, example()).module()
    for num_rows in (1, 2, 64):
        rows = example(num_rows)
        torch.testing.assert_close(run(**rows), taught.student(**rows))


def test_the_student_is_left_as_it_was() -> None:
    taught = Taught()
    before = {name: id(module) for name, module in taught.named_modules()}
    export_served(taught, example(), unserved=[taught.extra])
    assert {name: id(module) for name, module in taught.named_modules()} == before
    assert taught.training
    taught.eval()
    export_served(taught, example())
    assert not taught.training


def test_the_example_is_not_in_the_file() -> None:
    rows = {"dense_BF": torch.full((5, 2), MARK), "categories_BC": example()["categories_BC"]}
    buffer = io.BytesIO()
    torch.export.save(export_served(Mlp(num_dense=2, num_rows=[11, 7]), rows), buffer)
    with zipfile.ZipFile(buffer) as archive:
        assert not any(struct.pack("<f", MARK) in archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize(("leak", "error"), [("call", ValueError), ("part", AttributeError)])
def test_a_student_that_serves_a_head_is_refused_and_left_as_it_was(leak: str, error: type[Exception]) -> None:
    taught = Taught(leak)
    with pytest.raises(error, match="the student's forward uses a head that nobody serves"):
        export_served(taught, example(), unserved=[taught.extra])
    assert isinstance(taught.heads, AuxiliaryHead)
    assert taught.training


@pytest.mark.parametrize("is_named", [True, False])
def test_a_head_that_comes_by_another_way_is_found_in_the_graph(is_named: bool) -> None:
    heads = AuxiliaryHead(3, CLICK)
    if is_named:
        student: nn.Module = nn.Sequential(heads.heads["teacher__click"], nn.Flatten(0))
        rows = {"input": torch.rand(5, 3)}
    else:
        student, rows = Smuggler(heads), {"x_BD": torch.rand(5, 3)}
    with pytest.raises(ValueError, match="of a head that nobody serves"):
        export_served(student, rows, unserved=[heads])


def test_a_graph_made_elsewhere_is_searched_too() -> None:
    taught = Taught()
    with_all = torch.export.export(taught, (), kwargs=example(), strict=False)
    with pytest.raises(ValueError, match=r"heads.teacher__click.0.weight of a head that nobody serves"):
        refuse_unserved(with_all, [taught.heads])
    refuse_unserved(export_served(taught, example()), [taught.heads, taught.adapter])
