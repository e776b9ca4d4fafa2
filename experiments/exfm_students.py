"""The students of the ExFM experiment: one cell is one of them, trained once in ready order by one method.

`small` is an MLP, `large` a DCNv2, both of `vm_training.students`, over eight hashed ids and three crosses, each value
an embedding in one sparse table. They do not get the counts that the teachers live on. A batch is predicted before it
is trained on; the metrics of a cell are of these predictions over the weeks of the report.

All methods of a student and seed begin with the same weights and optimizer state: those of a student that has seen the
labels of all earlier weeks, without supervision. Shapes: B rows, F ids and crosses.
"""

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from experiments.exfm_plan import Cell, Knobs
from experiments.students import build_rows, read_table
from vm_training import AuxiliaryHead, StudentAdapter
from vm_training.losses import distillation_loss, label_loss
from vm_training.students.dcnv2 import Dcnv2
from vm_training.students.mlp import Mlp
from vm_training.tensors import Supervision

TASK: Final = "purchase"
BATCH_ROWS: Final = 2_048
_TEACHER: Final = "teacher"  # whichever FM it is just now
# Rows of each id's table, by place in experiments.students.build_indices, which gives 20 bits; then of the crosses'.
_NUM_ROWS: Final = (16_384, 131_072, 16_384, 4_096, 16_384, 4_096, 64, 64, *(1 << 18,) * 3)
_FIRST_LOGIT: Final = -2.3
_TABLE_ACCUMULATOR: Final = 1e-10  # gradients are means over the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """N rows in ready order: indices int32, labels float32; logits float32 and present bool (N,) by FM."""

    indices: npt.NDArray[np.int32]
    labels: npt.NDArray[np.float32]
    logits: dict[str, npt.NDArray[np.float32]]
    present: dict[str, npt.NDArray[np.bool_]]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, mask_N: npt.NDArray[np.bool_]) -> "Rows":
        """Give the rows of the mask."""
        return Rows(
            indices=self.indices[mask_N],
            labels=self.labels[mask_N],
            logits={fm: values[mask_N] for fm, values in self.logits.items()},
            present={fm: values[mask_N] for fm, values in self.present.items()},
        )


def build_student(name: str) -> Mlp | Dcnv2:
    """Give a student with fresh weights."""
    if name == "small":
        student: Mlp | Dcnv2 = Mlp(num_dense=0, num_rows=_NUM_ROWS, width=8, hidden=(32,), sparse=True)
    else:
        student = Dcnv2(
            num_dense=0, num_rows=_NUM_ROWS, width=16, num_crosses=2, rank=32, hidden=(128, 64), sparse=True
        )
    nn.init.constant_(student.head.bias, _FIRST_LOGIT)
    return student


class Trainer:
    """A student, what its method adds to it, and their optimizers."""

    def __init__(self, cell: Cell, knobs: Knobs) -> None:
        self.student = build_student(cell.student)
        self.fm = cell.fm
        self._method, self._knobs, self._control = cell.method, knobs, cell.control
        table = self.student.ids.table
        layers = [weight for weight in self.student.parameters() if weight is not table.weight]
        self._table = torch.optim.Adagrad(
            table.parameters(), lr=knobs.table_rate, initial_accumulator_value=_TABLE_ACCUMULATOR
        )
        self._layers = torch.optim.Adam(layers, lr=knobs.layer_rate)
        self._heads = nn.ModuleList()
        self._adapter: StudentAdapter | None = None
        self._random = np.random.default_rng(cell.seed)

    def add_method(self) -> None:
        """Put the heads and the adapter of the method beside the student: behind the labels of earlier weeks."""
        tasks, knobs, width = {_TEACHER: [TASK]}, self._knobs, self.student.backbone_width
        if self._method.startswith("ah"):
            self._heads.append(
                AuxiliaryHead(width, tasks, alpha=knobs.alpha, beta=knobs.beta, weight=knobs.weight)
            )  # fmt: skip
        if self._method == "ah_sa":
            self._heads.append(AuxiliaryHead(width, tasks, weight=knobs.adapter_weight))
        if self._method.endswith("_sa"):
            self._adapter = StudentAdapter(tasks)
        if len(self._heads):
            self._layers.add_param_group({"params": list(self._heads.parameters()), "lr": knobs.layer_rate})

    def save(self) -> bytes:
        """Give the student and its optimizers' state."""
        file = io.BytesIO()
        states = [part.state_dict() for part in (self.student, self._table, self._layers)]
        torch.save(states, file)
        return file.getvalue()

    def load(self, state: bytes) -> None:
        """Go on from a saved state, at this trainer's own rates."""
        student, table, layers = torch.load(io.BytesIO(state), weights_only=True)
        self.student.load_state_dict(student)
        self._table.load_state_dict(table)
        self._layers.load_state_dict(layers)
        self._table.param_groups[0]["lr"] = self._knobs.table_rate
        self._layers.param_groups[0]["lr"] = self._knobs.layer_rate

    def copy(self, *, fm: str) -> "Trainer":
        """Give a trainer in the same state that shares nothing with this one, on what another FM says from now on."""
        other = copy.deepcopy(self)
        other.fm = fm
        return other

    def train(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Train on the rows once, in their order; give each one's logit (N,) from before."""
        logits = [np.empty(0, np.float32)]
        for start in range(0, len(rows), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            index_BF, label_B = torch.from_numpy(rows.indices[part]), torch.from_numpy(rows.labels[part])
            logits.append(self._train_batch(index_BF, label_B, self._said(rows, part)))
        return np.concatenate(logits)

    def _said(self, rows: Rows, part: slice) -> Supervision | None:
        if not self.fm:
            return None
        logit_B = torch.from_numpy(rows.logits[self.fm][part])
        present_B = torch.from_numpy(rows.present[self.fm][part])
        if self._control == "shuffled":
            order_B = torch.from_numpy(self._random.permutation(len(logit_B)))
            logit_B, present_B = logit_B[order_B], present_B[order_B]
        if self._control == "constant":
            logit_B = torch.zeros_like(logit_B)
        return Supervision(present_B, {TASK: logit_B})

    def _train_batch(self, index_BF: Tensor, label_B: Tensor, said: Supervision | None) -> npt.NDArray[np.float32]:
        x_BD = self.student.backbone(index_BF.new_zeros((len(label_B), 0), dtype=torch.float32), index_BF)
        logit_B = self.student.logit(x_BD)
        loss = label_loss(logit_B, label_B) if said is None else self._loss(x_BD, logit_B, label_B, said)
        for optimizer in (self._table, self._layers):
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in (self._table, self._layers):
            optimizer.step()
        return logit_B.detach().numpy()

    def _loss(self, x_BD: Tensor, logit_B: Tensor, label_B: Tensor, said: Supervision) -> Tensor:
        raw = {_TEACHER: said}
        adapted = raw if self._adapter is None else self._adapter.step(raw, {TASK: label_B})
        if self._method.startswith("single"):
            teacher = adapted[_TEACHER]
            return distillation_loss(
                logit_B, label_B, teacher.logits[TASK], teacher.present_B, weight=self._knobs.weight
            )  # fmt: skip
        targets = (raw, adapted)
        terms = [head(x_BD, target) for head, target in zip(self._heads, targets, strict=False)]
        return label_loss(logit_B, label_B) + torch.stack(terms).sum()


def save_rows(folder: Path, rows: Rows) -> None:
    """Keep rows as arrays that several processes can map."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, npt.NDArray[Any]] = {"index": rows.indices, "label": rows.labels}
    arrays |= {f"logit_{fm}": values for fm, values in rows.logits.items()}
    arrays |= {f"present_{fm}": values for fm, values in rows.present.items()}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


def load_rows(folder: Path) -> Rows:
    """Give the rows that were kept."""
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    return Rows(
        indices=arrays["index"],
        labels=arrays["label"],
        logits={name.removeprefix("logit_"): values for name, values in arrays.items() if name.startswith("logit_")},
        present={name.removeprefix("present_"): v for name, v in arrays.items() if name.startswith("present_")},
    )


def build_first_rows(paths: Sequence[Path], *, student: str) -> Rows:
    """Give a student's rows of week files, in the order of event_time, without supervision."""
    rows = build_rows(read_table(paths, student=student))
    return Rows(indices=rows.indices.numpy(), labels=rows.labels.numpy(), logits={}, present={})
