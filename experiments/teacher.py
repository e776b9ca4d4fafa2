"""The demo's teacher: hashed embeddings, the household's counts and an MLP, trained in a single pass over the stream.

Kunlun will take its place; what stays is its contract: keyword tensors `cat` and `dense` in, `logit_purchase` and the
embedding `z` out. With 3.5 M parameters and 94,000 multiplications a row it is more than a student could afford, and it
fits a demo: about 35 s on one core for the 1.8 M rows of weeks 1-26.

It goes on with what closes, from where it stands. Training goes through the rows once, in the order of event_time, in
batches that never cut a tie; each batch is predicted before it is trained on, so that the metrics reported are of rows
that the module had not seen (progressive validation). `trained_through` is exclusive: one microsecond after the last
event that was trained on.

Shapes: B rows, F categories, D width of an embedding, C floats.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.data.complete_journey import DATASET_SPEC, EXAMPLE_COLUMNS, LABEL_COLUMN
from fm_inference import Signature
from fm_inference.features import build_tensors
from schemas.dataset import DatasetSpec
from schemas.snapshot import Embedding, FloatEncode, HashEncode, Input, Outputs
from vm_training.metrics import auc, normalized_entropy

EMBEDDING_SIZE: Final = 64
MAX_BATCH: Final = 16_384
BUCKETS: Final = 131_072

_CATEGORIES = tuple(f["name"] for f in DATASET_SPEC["features"] if f["type"] == "category")
_FLOATS = tuple(f["name"] for f in DATASET_SPEC["features"] if f["type"] == "float")
# Rows of each category's table, a power of two: the index modulo BUCKETS is folded to it. Others have few values.
_TABLE_ROWS = {
    "product_id": BUCKETS, "user_id": 16_384, "manufacturer_id": 16_384, "product_type": 16_384,
    "product_category": 4_096, "store_id": 4_096,
}  # fmt: skip
_TABLE_ROWS_OTHERS = 1_024
_BATCH_ROWS = 4_096
_FIRST_LOGIT = -2.3  # one positive in eleven rows: else every category's bias learns the base rate
_TABLE_ACCUMULATOR = 1e-10  # gradients are means over the batch, about 1e-4: more than this slows rare values down
_LAST_RATE_RATIO = 0.02
TABLE_RATE: Final = 0.03
LAYER_RATE: Final = 3e-3
AGAIN_RATE: Final = 3e-4
"""Of the layers, when it goes on with four more weeks. `python -m experiments.tune_teacher` chose all three."""

INPUTS: Final = (
    Input(tensor="cat", features=_CATEGORIES, encode=HashEncode(kind="hash", buckets=BUCKETS)),
    Input(tensor="dense", features=_FLOATS, encode=FloatEncode(kind="float", null=0.0)),
)
OUTPUTS: Final = Outputs(
    logits={LABEL_COLUMN: f"logit_{LABEL_COLUMN}"},
    embeddings={"hidden": Embedding(tensor="z", size=EMBEDDING_SIZE, codec="float16")},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSize:
    """The width of each category's embedding, and of the two hidden layers."""

    width: int = 16
    hidden: tuple[int, int] = (192, 128)


class Teacher(nn.Module):
    """Tables folded from one index space, log-scaled counts, two hidden layers; each category value has a bias too."""

    fold: Tensor
    first_row: Tensor

    def __init__(self, size: TeacherSize | None = None) -> None:
        super().__init__()
        size = size or TeacherSize()
        rows_F = torch.tensor([_TABLE_ROWS.get(name, _TABLE_ROWS_OTHERS) for name in _CATEGORIES])
        self.register_buffer("fold", rows_F - 1)
        self.register_buffer("first_row", rows_F.cumsum(0) - rows_F)
        self.table = nn.Embedding(int(rows_F.sum()), 1 + size.width, sparse=True)
        self.first = nn.Linear(len(_CATEGORIES) * size.width + 2 * len(_FLOATS), size.hidden[0])
        self.norm = nn.LayerNorm(size.hidden[0])
        self.second = nn.Linear(*size.hidden)
        self.embed = nn.Linear(size.hidden[1], EMBEDDING_SIZE)
        self.logit = nn.Linear(EMBEDDING_SIZE, 1)
        nn.init.normal_(self.table.weight, std=0.01)
        nn.init.zeros_(self.table.weight[:, 0].detach())
        nn.init.constant_(self.logit.bias, _FIRST_LOGIT)

    def forward(self, cat: Tensor, dense: Tensor) -> dict[str, Tensor]:
        """Give logit_purchase (B,) and z (B, 64), float32, for cat int64 (B, F) and dense float32 (B, C)."""
        rows_BFD = self.table((cat & self.fold) + self.first_row)
        bias_B = rows_BFD[:, :, 0].sum(dim=1)
        counts_BC = torch.log1p(torch.nan_to_num(dense).clamp(0.0, 1e4))
        shares_BC = counts_BC / (1.0 + counts_BC)
        input_BD = torch.cat([rows_BFD[:, :, 1:].flatten(1), counts_BC, shares_BC], dim=1)
        hidden_BD = functional.relu(self.norm(self.first(input_BD)))
        z_BD = self.embed(functional.relu(self.second(hidden_BD)))
        logit_B = self.logit(functional.relu(z_BD)).squeeze(1) + bias_B
        return {f"logit_{LABEL_COLUMN}": logit_B, "z": z_BD}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows in the order of event_time that share no time with another batch."""

    tensors: dict[str, Tensor]
    labels: Tensor
    last_event_time: int
    """Microseconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTeacher:
    """A frozen teacher in eval mode; its metrics are progressive (each row predicted before it was trained on)."""

    module: Teacher
    trained_through: datetime
    num_rows: int
    normalized_entropy: float
    auc: float


class TeacherTrainer:
    """A teacher in training, which goes on with what closes. Equal seeds and num_threads give equal bits.

    The process's own random state and number of torch threads stay as they were. Two threads take 0.6 of the time on
    two idle cores, and several times as long on busy ones: OpenMP waits by spinning.
    """

    def __init__(
        self, *, seed: int = 0, num_threads: int = 1, size: TeacherSize | None = None, table_rate: float = TABLE_RATE
    ) -> None:
        self._seed = seed
        self._num_threads = num_threads
        with torch_settings(seed=seed, num_threads=num_threads):
            self._module = Teacher(size)
        self._optimizers = build_optimizers(self._module, table_rate=table_rate)
        self._last_event_time = 0

    def train(
        self,
        batches: Iterable[Batch],
        *,
        num_rows: int,
        layer_rate: float = LAYER_RATE,
        on_progress: Callable[[int], None] | None = None,
    ) -> TrainedTeacher:
        """Give the teacher after these num_rows rows too, each seen once, in the order of event_time.

        The layers' learning rate falls linearly over the pass, so that the last batches do not decide the calibration.
        on_progress receives the number of rows of each batch as it is trained on.

        Raises:
            ValueError: There are no rows, or all labels are equal.
        """
        if num_rows == 0:
            raise ValueError("there are no rows to train on")
        logits, labels = [], []
        num_seen = 0
        _, layers = self._optimizers
        with torch_settings(seed=self._seed, num_threads=self._num_threads):
            for batch in batches:
                layers.param_groups[0]["lr"] = layer_rate * max(1 - num_seen / num_rows, _LAST_RATE_RATIO)
                logits.append(train_batch(self._module, batch, self._optimizers))
                labels.append(batch.labels.numpy())
                num_seen += len(batch.labels)
                self._last_event_time = max(self._last_event_time, batch.last_event_time)
                if on_progress is not None:
                    on_progress(len(batch.labels))
        logit, label = np.concatenate(logits), np.concatenate(labels)
        return TrainedTeacher(
            module=self._frozen(),
            trained_through=datetime.fromtimestamp(0, UTC) + timedelta(microseconds=self._last_event_time + 1),
            num_rows=num_rows,
            normalized_entropy=normalized_entropy(logit, label),
            auc=auc(logit, label),
        )

    def _frozen(self) -> Teacher:
        module = copy.deepcopy(self._module)
        module.table.sparse = False  # it was for the gradient, and a frozen table has none
        module.eval().requires_grad_(requires_grad=False)
        return module


def train_teacher(
    paths: Sequence[Path], *, seed: int = 0, num_threads: int = 1, on_progress: Callable[[int], None] | None = None
) -> TrainedTeacher:
    """Give the teacher trained on the rows of these week files, as TeacherTrainer does.

    Raises:
        ValueError: There are no rows, all labels are equal, or the files are not in the order of event_time.
    """
    trainer = TeacherTrainer(seed=seed, num_threads=num_threads)
    return trainer.train(iter_batches(paths), num_rows=count_rows(paths), on_progress=on_progress)


def count_rows(paths: Sequence[Path]) -> int:
    """Give how many rows the week files have."""
    return sum(pq.read_metadata(path).num_rows for path in paths)


def iter_batches(paths: Sequence[Path], *, batch_rows: int = _BATCH_ROWS) -> Iterator[Batch]:
    """Give the rows of the week files in order, about batch_rows at a time: a batch ends where the time changes.

    Raises:
        ValueError: A row is before the one above it, or at a file's first time another file ended.
    """
    previous = -1
    for path in paths:
        table = pq.read_table(path, columns=[*EXAMPLE_COLUMNS, LABEL_COLUMN])
        times = table["event_time"].cast(pa.int64()).to_numpy()
        if len(times) and (times[0] <= previous or np.any(np.diff(times) < 0)):
            raise ValueError(f"{path} is not in the order of event_time, or not after the file before it")
        for batch in iter_table(table, batch_rows=batch_rows):
            previous = batch.last_event_time
            yield batch


def iter_table(table: pa.Table, *, batch_rows: int = _BATCH_ROWS) -> Iterator[Batch]:
    """Give the rows of a table, which are in the order of event_time, in the same way."""
    times = table["event_time"].cast(pa.int64()).to_numpy()
    tensors, labels = build_tensors(table, INPUTS), torch.from_numpy(table[LABEL_COLUMN].to_numpy().copy())
    for start, stop in iter_cuts(times, batch_rows=batch_rows):
        part = {name: tensor[start:stop] for name, tensor in tensors.items()}
        yield Batch(tensors=part, labels=labels[start:stop], last_event_time=int(times[stop - 1]))


def iter_cuts(event_times: npt.NDArray[np.int64], *, batch_rows: int) -> Iterator[tuple[int, int]]:
    """Give start and stop of consecutive batches of about batch_rows; a batch ends where the (ordered) time changes."""
    start = 0
    while start < len(event_times):
        last = event_times[min(start + batch_rows, len(event_times)) - 1]
        stop = int(np.searchsorted(event_times, last, side="right"))
        yield start, stop
        start = stop


def predict_logits(module: nn.Module, columns: pa.Table, *, batch_rows: int = MAX_BATCH) -> npt.NDArray[np.float32]:
    """Give the module's logit for each row (B,), as the worker would compute it."""
    tensors = build_tensors(columns, INPUTS)
    logits = [np.empty(0, np.float32)]
    with torch.inference_mode():
        for start in range(0, columns.num_rows, batch_rows):
            part = {name: tensor[start : start + batch_rows] for name, tensor in tensors.items()}
            logits.append(module(**part)[OUTPUTS.logits[LABEL_COLUMN]].numpy())
    return np.concatenate(logits)


def build_signature(*, fm: str, snapshot_id: str, golden: pa.Table | None = None) -> Signature:
    """Give what export_snapshot needs beside the module; golden: rows to keep with the answers expected for them."""
    return Signature(
        fm=fm,
        snapshot_id=snapshot_id,
        inputs=INPUTS,
        outputs=OUTPUTS,
        max_batch=MAX_BATCH,
        golden=golden,
        dataset=DatasetSpec.model_validate(DATASET_SPEC),
    )


def build_optimizers(
    module: Teacher, *, table_rate: float = TABLE_RATE
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Give the optimizers of the table, whose gradients are sparse, and of the layers."""
    table = module.table.parameters()
    layers = [weight for name, weight in module.named_parameters() if not name.startswith("table.")]
    return (
        torch.optim.Adagrad(table, lr=table_rate, initial_accumulator_value=_TABLE_ACCUMULATOR),
        torch.optim.Adam(layers, lr=LAYER_RATE),
    )


def train_batch(module: Teacher, batch: Batch, optimizers: Sequence[torch.optim.Optimizer]) -> npt.NDArray[np.float32]:
    """Give the batch's logits from before the step that it is then used for."""
    logit_B = module(**batch.tensors)[OUTPUTS.logits[LABEL_COLUMN]]
    loss = functional.binary_cross_entropy_with_logits(logit_B, batch.labels)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
    return logit_B.detach().numpy()


@contextmanager
def torch_settings(*, seed: int, num_threads: int) -> Iterator[None]:
    """Train with this seed and number of threads; the process's own come back."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        unchecked = torch.sparse.check_sparse_tensor_invariants(enable=False)  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(devices=[]), unchecked:
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads_before)
