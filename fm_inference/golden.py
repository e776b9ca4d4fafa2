"""Golden rows: examples kept in a snapshot folder with the answers that the eager model gave for them.

golden.arrow is an Arrow IPC file: the feature columns, `expected__{task}__logit` float32 for each task, and
`expected__{embedding}` fixed_size_list<float32> for each embedding, before its codec.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from das_service.snapshot_folder import SnapshotError
from schemas.snapshot import GOLDEN_FILE, Input, OutputColumns

GOLDEN_MAX_BYTES = 256 << 20
_PREFIX = "expected__"
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A model's answers for some rows: logits (B,) by task, embeddings (B, D) by name, not encoded."""

    logits: Mapping[str, Floats]
    embeddings: Mapping[str, Floats]

    def take(self, places: NDArray[np.int64]) -> "Answers":
        """Give the answers for the rows at these places."""
        return Answers(
            logits={task: values[places] for task, values in self.logits.items()},
            embeddings={name: values[places] for name, values in self.embeddings.items()},
        )


def used_features(inputs: Iterable[Input]) -> list[str]:
    """Give the names of the features that the inputs use, each once, in order."""
    return list(dict.fromkeys(name for wanted in inputs for name in wanted.features))


def golden_table(rows: pa.Table, answers: Answers) -> pa.Table:
    """Give the rows with their answers appended.

    Raises:
        SnapshotError: A feature's name begins like the answers' columns.
    """
    taken = [name for name in rows.column_names if name.startswith(_PREFIX)]
    if taken:
        raise SnapshotError(
            [f"golden rows cannot hold the column {name!r}: {_PREFIX} is for answers" for name in taken]
        )
    for task, logit_B in answers.logits.items():
        rows = rows.append_column(f"{_PREFIX}{task}__logit", pa.array(logit_B, pa.float32()))
    for name, vectors_BD in answers.embeddings.items():
        flat = pa.array(vectors_BD.reshape(-1), pa.float32())
        rows = rows.append_column(f"{_PREFIX}{name}", pa.FixedSizeListArray.from_arrays(flat, vectors_BD.shape[1]))
    return rows


def write_golden(table: pa.Table, path: Path) -> None:
    """Write golden.arrow."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_golden(folder: Path, outputs: OutputColumns) -> tuple[pa.Table, Answers]:
    """Give the golden rows of a folder and the answers expected for them.

    Raises:
        SnapshotError: The file is too large, no Arrow IPC file, empty, or lacks the answers to an output.
    """
    path = folder / GOLDEN_FILE
    if path.stat().st_size > GOLDEN_MAX_BYTES:
        raise SnapshotError([f"{GOLDEN_FILE} is larger than {GOLDEN_MAX_BYTES} bytes"])
    try:
        with pa.OSFile(str(path), "rb") as source:
            table = pa.ipc.open_file(source).read_all()
        table.validate(full=True)
        answers = _read_answers(table, outputs)
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise SnapshotError([f"{GOLDEN_FILE} cannot be read: {error}"]) from None
    if table.num_rows == 0:
        raise SnapshotError([f"{GOLDEN_FILE} has no rows; leave it out"])
    return table.select([name for name in table.column_names if not name.startswith(_PREFIX)]), answers


def _read_answers(table: pa.Table, outputs: OutputColumns) -> Answers:
    logits = {task: _floats(table, f"{_PREFIX}{task}__logit", pa.float32()) for task in outputs.tasks}
    vectors = {
        name: _floats(table, f"{_PREFIX}{name}", pa.list_(pa.float32(), size)).reshape(table.num_rows, size)
        for name, (size, _) in outputs.embeddings.items()
    }
    return Answers(logits=logits, embeddings=vectors)


def _floats(table: pa.Table, name: str, kind: pa.DataType) -> Floats:
    column = table.column(name)
    if column.type != kind:
        raise ValueError(f"column {name!r} is {column.type}, not {kind}")
    array = column.combine_chunks()
    flat = array.flatten() if pa.types.is_fixed_size_list(kind) else array
    if array.null_count or flat.null_count:
        raise ValueError(f"column {name!r} holds nulls")
    values: Floats = flat.to_numpy(zero_copy_only=False)
    return values


def differences(expected: Answers, given: Answers, *, relative: float, absolute: float) -> list[str]:
    """Give a sentence per output whose values differ: how many, the worst, where."""
    reasons = [
        _difference(f"logit {task!r}", values, given.logits[task], relative, absolute)
        for task, values in expected.logits.items()
    ]
    reasons += [
        _difference(f"embedding {name!r}", values, given.embeddings[name], relative, absolute)
        for name, values in expected.embeddings.items()
    ]
    return [reason for reason in reasons if reason]


def _difference(what: str, expected: Floats, given: Floats, relative: float, absolute: float) -> str | None:
    close = np.isclose(given, expected, rtol=relative, atol=absolute, equal_nan=False)
    if close.all():
        return None
    gap = np.where(close, -1.0, np.abs(given.astype(np.float64) - expected))
    place = np.unravel_index(np.nanargmax(np.where(np.isnan(gap), np.inf, gap)), gap.shape)
    return (
        f"{what} differs in {int((~close).sum())} of {close.size} values, most in row {int(place[0])}: "
        f"{float(given[place]):.6g} and not {float(expected[place]):.6g}"
    )
