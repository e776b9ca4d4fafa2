"""Two small students of the demo, each with its own rows: products on display, and products in the mailer.

A student is wide and deep over eight hashed ids and three crosses of the household with what it is shown: one table of
2**20 rows for all of them, a hidden layer of 32, and a bias per value. It does not get the counts of the household's
earlier purchases, which the teacher lives on and which a serving path would have to look up for every impression.

All runs start where the student of weeks 1-26 stands: it is trained once on the labels of those weeks, without
supervision, because those are the labels that the teacher has seen. A student that began at week 27 would get them
through the teacher alone, and what it gained would be those labels, not the teacher's better use of them. Then come the
weeks of the stream, once, as training batches of the service, in the order in which rows became ready: without
supervision, with it (plain distillation, weight 1), and with the teacher's word shuffled over the rows of each batch.
The three begin with the same weights and optimizer state, and read the same batches at the same rates. A batch is
predicted before it is trained on; metrics are of these predictions, and of the labels as they were closed. An earlier
version read no training batches (`AugmentedDataset`) but sent its tables to `augment`: both give the same supervision.

The rates were tuned without supervision, on weeks 14-26 of a student of weeks 1-13, by `experiments.tune_students`; no
week that is reported chose anything. Shapes: B rows, F hashed ids and crosses, W width of an embedding.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.data.complete_journey import LABEL_COLUMN
from experiments.teacher import iter_cuts, torch_settings
from fm_inference.features import build_tensors
from schemas.hashing import feature_seed, xxh64_int64
from schemas.snapshot import HashEncode, Input
from vm_training import AugmentedDataset
from vm_training.losses import distillation_loss
from vm_training.tensors import Batch

STUDENTS: Final = {"display": "products on display", "mailer": "products in the mailer"}  # by the feature; "0" is none
RUNS: Final = ("without", "with", "shuffled")

IDS = (
    "user_id", "product_id", "manufacturer_id", "product_category", "product_type", "store_id", "display", "mailer",
)  # fmt: skip
_CROSSES = (("user_id", "product_type"), ("user_id", "product_category"), ("user_id", "product_id"))
_NUM_INDICES = len(IDS) + len(_CROSSES)
_BITS = 20
_INPUT = Input(tensor="ids", features=IDS, encode=HashEncode(kind="hash", buckets=1 << _BITS))
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
class StudentRuns:
    """One student on the weeks of the stream: its rows in ready order, and each run's progressive logits, all (B,).

    event_times: microseconds since 1970. teacher_logits are meant where present.
    """

    event_times: npt.NDArray[np.int64]
    weeks: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]
    teacher_logits: npt.NDArray[np.float32]
    present: npt.NDArray[np.bool_]
    logits: dict[str, npt.NDArray[np.float32]]

    def with_weeks(self, starts: npt.NDArray[np.int64], weeks: npt.NDArray[np.int64]) -> "StudentRuns":
        """Give the same with each row's week; starts: the first times of these weeks, in order."""
        return replace(self, weeks=weeks[np.searchsorted(starts, self.event_times, side="right") - 1])

    def to_table(self) -> pa.Table:
        """Give all of it as columns."""
        return pa.table(
            {
                "event_time": pa.array(self.event_times).cast(pa.timestamp("us", "UTC")),
                "week": self.weeks,
                LABEL_COLUMN: self.labels,
                "teacher_logit": pa.array(self.teacher_logits, mask=~self.present),
                **{f"logit_{run}": values for run, values in self.logits.items()},
            }
        )


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

    def train(self, rows: Rows, *, on_progress: Callable[[int], None] | None = None) -> npt.NDArray[np.float32]:
        """Train on the labels of rows once, in their order; give each row's logit (B,) from before it was trained on.

        on_progress receives the number of rows of each batch as it is trained on.
        """
        logits = [np.empty(0, np.float32)]
        for start, stop in iter_cuts(rows.event_times, batch_rows=_BATCH_ROWS):
            part = slice(start, stop)
            logits.append(self.train_batch(rows.indices[part], rows.labels[part]))
            if on_progress is not None:
                on_progress(stop - start)
        return np.concatenate(logits)

    def train_batch(
        self, index_BF: Tensor, label_B: Tensor, supervision: tuple[Tensor, Tensor] | None = None
    ) -> npt.NDArray[np.float32]:
        """Train on a batch; give its logits (B,) from before. supervision: the teacher's logits, and where they are."""
        logit_B = self.student(index_BF)
        if supervision is None:
            loss = functional.binary_cross_entropy_with_logits(logit_B, label_B)
        else:
            loss = distillation_loss(logit_B, label_B, *supervision)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self._optimizers:
            optimizer.step()
        return logit_B.detach().numpy()


def read_table(paths: Sequence[Path], *, student: str) -> pa.Table:
    """Give a student's own table from the week files: keys, the features that it uses, label and week."""
    columns = ["example_id", "event_time", *IDS, LABEL_COLUMN, "week"]
    return pq.read_table(list(paths), columns=columns, filters=pc.field(student) != "0")


def count_trained(first: Sequence[Path], stream: Sequence[Path]) -> int:
    """Give how many rows train_students goes through, in all runs of all students, if all of the stream has closed."""
    before, after = ds.dataset(list(first)), ds.dataset(list(stream))
    return sum(
        before.count_rows(filter=pc.field(name) != "0") + len(RUNS) * after.count_rows(filter=pc.field(name) != "0")
        for name in STUDENTS
    )


def train_students(
    first: Sequence[Path],
    stream: Sequence[Path],
    *,
    open_batches: Callable[[str], Iterable[Batch]],
    fm: str,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, StudentRuns]:
    """Give each student's runs on its training batches, after the labels of the first weeks; the students side by side.

    stream: week files, which say when a week begins. open_batches: gives a student's batches (`student_batches`).
    on_progress receives the number of rows of each batch as it is trained on, from two threads.

    Raises:
        ValueError: Rows of the first weeks are not in the order of event_time, or a student has no closed rows.
    """
    first_rows = [pq.read_table(path, columns=["event_time", "week"]).slice(0, 1) for path in stream]
    starts = np.array([int(row["event_time"].cast(pa.int64())[0].as_py()) for row in first_rows])
    weeks = np.array([int(row["week"][0].as_py()) for row in first_rows])
    with torch_settings(seed=seed, num_threads=1), ThreadPoolExecutor(len(STUDENTS)) as pool:
        started = {
            name: pool.submit(_train_runs, Trainer(), first, name, open_batches(name), fm=fm, on_progress=on_progress)
            for name in STUDENTS
        }
        runs = {name: future.result() for name, future in started.items()}
    return {name: run.with_weeks(starts, weeks) for name, run in runs.items()}


def student_batches(url: str, dataset: str, student: str, *, fm: str) -> AugmentedDataset:
    """Give a student's training batches: its closed rows, with the features that it uses and the teacher's logit."""
    return AugmentedDataset(
        url,
        dataset,
        fms=[fm],
        outputs=[LABEL_COLUMN],
        columns=[*IDS, LABEL_COLUMN],
        filter=[[student, "!=", "0"]],
        batch_rows=_BATCH_ROWS,
        buckets=1 << _BITS,
    )


def _train_runs(
    trainer: Trainer,
    first: Sequence[Path],
    student: str,
    batches: Iterable[Batch],
    *,
    fm: str,
    on_progress: Callable[[int], None] | None,
) -> StudentRuns:
    trainer.train(build_rows(read_table(first, student=student)), on_progress=on_progress)
    trainers = {run: trainer.copy() for run in RUNS}
    random = torch.Generator().manual_seed(_SHUFFLE_SEED)
    kept: dict[str, list[npt.NDArray[Any]]] = {}
    for batch in batches:
        index_BF, label_B, said = build_indices(batch.categories_BC.numpy()), batch.labels[LABEL_COLUMN], batch.fms[fm]
        logit_B, present_B = said.logits[LABEL_COLUMN], said.present_B
        order_B = torch.randperm(len(batch), generator=random)
        told = {"without": None, "with": (logit_B, present_B), "shuffled": (logit_B[order_B], present_B[order_B])}
        found: dict[str, Any] = {run: trainers[run].train_batch(index_BF, label_B, told[run]) for run in RUNS}
        found |= {"event_time": batch.event_time_B, "label": label_B, "teacher": logit_B, "present": present_B}
        for name, values in found.items():
            kept.setdefault(name, []).append(np.asarray(values))
        if on_progress is not None:
            on_progress(len(RUNS) * len(batch))
    if not kept:
        raise ValueError(f"student {student!r} has no closed rows to train on")
    columns = {name: np.concatenate(parts) for name, parts in kept.items()}
    return StudentRuns(
        event_times=columns["event_time"],
        weeks=np.zeros(len(columns["label"]), np.int64),
        labels=columns["label"],
        teacher_logits=columns["teacher"],
        present=columns["present"],
        logits={run: columns[run] for run in RUNS},
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
        indices=build_indices(build_tensors(table, (_INPUT,))[_INPUT.tensor].numpy()),
        labels=torch.from_numpy(table[LABEL_COLUMN].to_numpy().copy()),
        event_times=time_B,
    )


def build_indices(id_BF: npt.NDArray[np.int64]) -> Tensor:
    """Give int32 (B, F): each id's hash, as it is, then each cross's, the hash of its two ids' hashes."""
    index_BF = np.empty((len(id_BF), _NUM_INDICES), np.int32)
    index_BF[:, : len(IDS)] = id_BF
    for place, names in enumerate(_CROSSES, start=len(IDS)):
        left_B, right_B = (id_BF[:, IDS.index(name)] for name in names)
        hash_B = xxh64_int64((left_B << _BITS) | right_B, feature_seed("*".join(names)))
        index_BF[:, place] = hash_B & np.uint64((1 << _BITS) - 1)
    return torch.from_numpy(index_BF)
