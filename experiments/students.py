"""Two small students of the demo, each with its own rows: products on display, and products in the mailer.

A student is wide and deep over eight hashed ids and three crosses of the household with what it is shown: one table of
2**20 rows for all of them, a hidden layer of 32, and a bias per value. It does not get the counts of the household's
earlier purchases, which the teacher lives on and which a serving path would have to look up for every impression.

All runs start where the student of weeks 1-26 stands: it is trained once on the labels of those weeks, without
supervision, because those are the labels that the teacher has seen. A student that began at week 27 would get them
through the teacher alone, and what it gained would be those labels, not the teacher's better use of them. Then come the
weeks of the stream, once, in the order of event_time: without supervision, with it (plain distillation, weight 1), and
with the teacher's word shuffled over the rows. The three begin with the same weights and optimizer state, and their
batches and rates are the same. A batch ends where the time changes and is predicted before it is trained on; metrics
are of these predictions.

The rates were tuned without supervision, on weeks 14-26 of a student of weeks 1-13, by `experiments.tune_students`; no
week that is reported chose anything. Shapes: B rows, F hashed ids and crosses, W width of an embedding.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.complete_journey import LABEL_COLUMN
from experiments.teacher import iter_cuts, torch_settings
from fm_inference.features import build_tensors
from schemas.hashing import feature_seed, xxh64_int64
from schemas.snapshot import HashEncode, Input
from vm_training.losses import distillation_loss

STUDENTS: Final = {"display": "products on display", "mailer": "products in the mailer"}  # by the feature; "0" is none
RUNS: Final = ("without", "with", "shuffled")

_IDS = (
    "user_id", "product_id", "manufacturer_id", "product_category", "product_type", "store_id", "display", "mailer",
)  # fmt: skip
_CROSSES = (("user_id", "product_type"), ("user_id", "product_category"), ("user_id", "product_id"))
_NUM_INDICES = len(_IDS) + len(_CROSSES)
_BITS = 20
_INPUT = Input(tensor="ids", features=_IDS, encode=HashEncode(kind="hash", buckets=1 << _BITS))
_WIDTH = 8
_HIDDEN = 32
_BATCH_ROWS = 2_048
_FIRST_LOGIT = -2.3  # one positive in eleven rows
_TABLE_ACCUMULATOR = 1e-10  # as the teacher's: gradients are means over the batch
_SHUFFLE_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The learning rates, of the table (Adagrad) and of the layers (Adam)."""

    table: float = 0.1
    layers: float = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """B rows of one student, in the order of event_time; indices (B, F), the others (B,)."""

    indices: Tensor
    labels: Tensor
    event_times: npt.NDArray[np.int64]
    """Microseconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """What the teacher said of the rows: its logit, and whether there is a valid one; both (B,)."""

    logits: Tensor
    present: Tensor

    def shuffled(self, seed: int) -> "Supervision":
        """Give the same pairs on other rows."""
        order = torch.randperm(len(self.logits), generator=torch.Generator().manual_seed(seed))
        return Supervision(logits=self.logits[order], present=self.present[order])


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRuns:
    """One student on the weeks of the stream: rows, labels and each run's progressive logits, all (B,)."""

    weeks: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]
    logits: dict[str, npt.NDArray[np.float32]]


class Student(nn.Module):
    """One table for all ids and crosses; beside its embedding each value has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1 << _BITS, 1 + _WIDTH, sparse=True)
        self.hidden = nn.Linear(_NUM_INDICES * _WIDTH, _HIDDEN)
        self.logit = nn.Linear(_HIDDEN, 1)
        nn.init.normal_(self.table.weight, std=0.01)
        nn.init.zeros_(self.table.weight[:, 0].detach())
        nn.init.constant_(self.logit.bias, _FIRST_LOGIT)

    def forward(self, index_BF: Tensor) -> Tensor:
        """Give the logit (B,) for int32 indices (B, F) of the table."""
        value_BFW = self.table(index_BF)
        hidden_BD = functional.relu(self.hidden(value_BFW[:, :, 1:].flatten(1)))
        return self.logit(hidden_BD).squeeze(1) + value_BFW[:, :, 0].sum(dim=1)


class Trainer:
    """A student and its optimizers; a copy goes on from the same state."""

    def __init__(self, rates: Rates | None = None) -> None:
        rates = rates or Rates()
        self.student = Student()
        layers = [weight for name, weight in self.student.named_parameters() if not name.startswith("table.")]
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Adagrad(
                self.student.table.parameters(), lr=rates.table, initial_accumulator_value=_TABLE_ACCUMULATOR
            ),
            torch.optim.Adam(layers, lr=rates.layers),
        )

    def copy(self) -> "Trainer":
        """Give a trainer of the same weights and optimizer state that shares nothing with this one."""
        return copy.deepcopy(self)

    def train(
        self, rows: Rows, supervision: Supervision | None = None, *, on_progress: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        """Train on the rows once, in their order; give each row's logit (B,) from before it was trained on.

        on_progress receives the number of rows of each batch as it is trained on.
        """
        logits = [np.empty(0, np.float32)]
        for start, stop in iter_cuts(rows.event_times, batch_rows=_BATCH_ROWS):
            logits.append(self._train_batch(rows, supervision, slice(start, stop)))
            if on_progress is not None:
                on_progress(stop - start)
        return np.concatenate(logits)

    def _train_batch(self, rows: Rows, supervision: Supervision | None, part: slice) -> npt.NDArray[np.float32]:
        logit_B, label_B = self.student(rows.indices[part]), rows.labels[part]
        if supervision is None:
            loss = functional.binary_cross_entropy_with_logits(logit_B, label_B)
        else:
            loss = distillation_loss(logit_B, label_B, supervision.logits[part], supervision.present[part])
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self._optimizers:
            optimizer.step()
        return logit_B.detach().numpy()


def read_table(paths: Sequence[Path], *, student: str) -> pa.Table:
    """Give a student's own table from the week files: keys, the features that it uses, label and week."""
    columns = ["example_id", "event_time", *_IDS, LABEL_COLUMN, "week"]
    return pq.read_table(list(paths), columns=columns, filters=pc.field(student) != "0")


def count_trained(first: Sequence[Path], augmented: Mapping[str, pa.Table]) -> int:
    """Give how many rows train_students goes through, in all runs of all students."""
    weeks = ds.dataset(list(first))
    return sum(
        weeks.count_rows(filter=pc.field(name) != "0") + len(RUNS) * len(table) for name, table in augmented.items()
    )


def train_students(
    first: Sequence[Path],
    augmented: Mapping[str, pa.Table],
    *,
    fm: str,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, StudentRuns]:
    """Give each student's runs on its augmented table, after the labels of the first weeks; the students side by side.

    on_progress receives the number of rows of each batch as it is trained on, from two threads.

    Raises:
        ValueError: Rows are not in the order of event_time.
    """
    with torch_settings(seed=seed, num_threads=1), ThreadPoolExecutor(len(augmented)) as pool:
        started = [
            pool.submit(_train_runs, Trainer(), first, name, table, fm=fm, on_progress=on_progress)
            for name, table in augmented.items()
        ]
        return {name: future.result() for name, future in zip(augmented, started, strict=True)}


def _train_runs(
    trainer: Trainer,
    first: Sequence[Path],
    student: str,
    augmented: pa.Table,
    *,
    fm: str,
    on_progress: Callable[[int], None] | None,
) -> StudentRuns:
    trainer.train(build_rows(read_table(first, student=student)), on_progress=on_progress)
    rows, supervision = build_rows(augmented), parse_supervision(augmented, fm=fm)
    told = {"without": None, "with": supervision, "shuffled": supervision.shuffled(_SHUFFLE_SEED)}
    return StudentRuns(
        weeks=augmented["week"].to_numpy(),
        labels=rows.labels.numpy(),
        logits={run: trainer.copy().train(rows, told[run], on_progress=on_progress) for run in RUNS},
    )


def build_rows(table: pa.Table) -> Rows:
    """Give a student's table as tensors.

    Raises:
        ValueError: The rows are not in the order of event_time.
    """
    time_B = table["event_time"].cast(pa.int64()).to_numpy()
    if np.any(np.diff(time_B) < 0):
        raise ValueError("a student's rows are not in the order of event_time")
    return Rows(
        indices=_build_indices(table),
        labels=torch.from_numpy(table[LABEL_COLUMN].to_numpy().copy()),
        event_times=time_B,
    )


def _build_indices(table: pa.Table) -> Tensor:
    """Give int32 (B, F): each id's hash, then each cross's, the hash of its two ids' hashes."""
    id_BF = build_tensors(table, (_INPUT,))[_INPUT.tensor].numpy()
    index_BF = np.empty((len(id_BF), _NUM_INDICES), np.int32)
    index_BF[:, : len(_IDS)] = id_BF
    for place, names in enumerate(_CROSSES, start=len(_IDS)):
        left_B, right_B = (id_BF[:, _IDS.index(name)] for name in names)
        hash_B = xxh64_int64((left_B << _BITS) | right_B, feature_seed("*".join(names)))
        index_BF[:, place] = hash_B & np.uint64((1 << _BITS) - 1)
    return torch.from_numpy(index_BF)


def parse_supervision(augmented: pa.Table, *, fm: str) -> Supervision:
    """Give what the service appended to a student's table."""
    present = pc.equal(augmented[f"{fm}__status"].cast(pa.string()), "present")
    return Supervision(
        logits=torch.from_numpy(augmented[f"{fm}__{LABEL_COLUMN}__logit"].to_numpy().copy()),
        present=torch.from_numpy(present.to_numpy().copy()),
    )
