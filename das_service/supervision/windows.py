"""A caller's rows, a window of them at a time, in the caller's order.

A window is what one query of the join has as its build side, so its rows bound the join's memory. It ends where the
event day changes, if that happens in its second half: then the tables of a day are read once and not twice.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from das_service.door.arrow_body import Budget
from das_service.door.columns import id_column
from das_service.tables.duck import quoted_path
from schemas.dataset import TIMESTAMP
from schemas.tables import EXAMPLE_HASH, event_days

Int64s: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRows:
    """Rows of a Parquet file from number `first` on; event_time in microseconds, one per row."""

    path: str
    first: int
    event_time: Int64s

    def part(self, start: int, stop: int) -> "FileRows":
        """Give the rows from start to stop."""
        return FileRows(path=self.path, first=self.first + start, event_time=self.event_time[start:stop])


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRows:
    """Rows of an Arrow batch; event_time in microseconds, one per row."""

    batch: pa.RecordBatch
    event_time: Int64s

    def part(self, start: int, stop: int) -> "BatchRows":
        """Give the rows from start to stop."""
        return BatchRows(batch=self.batch.slice(start, stop - start), event_time=self.event_time[start:stop])


Rows: TypeAlias = FileRows | BatchRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Rows that are joined at once. event_day: one per row, as days since 1970.

    Of rows that come from our own tables more is known: their partitions, and the first and the last event_time in
    microseconds, which are those of their supervision too. hashes: their `_example_hash`, where each stands for one
    example between these times; it is joined by then, and ids need not be read.
    """

    parts: tuple[Rows, ...]
    event_day: Int64s
    partition: Int64s | None = None
    times: tuple[int, int] | None = None
    hashes: pa.Array | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the window."""
        return len(self.event_day)

    def days(self) -> Int64s:
        """Give the event days of the rows, each once; quick where neighbours are of one day."""
        changes = np.flatnonzero(self.event_day[1:] != self.event_day[:-1])
        return np.unique(self.event_day[np.concatenate([[0], changes + 1])])

    def span(self) -> tuple[int, int]:
        """Give the first and the last event_time of the rows as the caller has them, in microseconds."""
        times = [part.event_time for part in self.parts if len(part.event_time)]
        return int(min(each.min() for each in times)), int(max(each.max() for each in times))

    def batches(self) -> list[pa.RecordBatch]:
        """Give all columns of the rows; of a window of Arrow batches only."""
        return [part.batch for part in self.parts if isinstance(part, BatchRows)]

    @property
    def key(self) -> str:
        """The column that the rows are joined by."""
        return "example_id" if self.hashes is None else EXAMPLE_HASH

    def register(
        self, cursor: duckdb.DuckDBPyConnection, *, max_id_bytes: int, more: Mapping[str, Int64s] | None = None
    ) -> None:
        """Make the view `asked` of the cursor: row (number in the window, from 0), example_id and the key.

        more: other columns of it, by name; of a window of Arrow batches only.

        Raises:
            TooLargeError: The ids of an Arrow window take more than max_id_bytes once each row has its own.
        """
        if any(isinstance(part, BatchRows) for part in self.parts):
            batches = self.batches()
            ids = id_column(batches[0].schema, batches, Budget(max_id_bytes))
            cursor.register(
                "asked",
                pa.table(
                    {
                        "row": pa.array(np.arange(len(ids), dtype=np.int32)),
                        "example_id": ids,
                        **({} if self.hashes is None else {EXAMPLE_HASH: self.hashes}),
                        **{name: pa.array(values) for name, values in (more or {}).items()},
                    }
                ),
            )
            return
        cursor.execute(f"CREATE OR REPLACE TEMP VIEW asked AS {' UNION ALL '.join(self._selects())}")

    def _selects(self) -> Iterator[str]:
        """Give a SELECT per run of rows of one file; DuckDB reads only the row groups that a run lies in."""
        row = 0
        for path, first, num_rows in _runs([part for part in self.parts if isinstance(part, FileRows)]):
            yield (
                f"SELECT CAST(file_row_number - {first - row} AS INTEGER) AS row, example_id "  # noqa: S608 - numbers, and a quoted path
                f"FROM read_parquet([{quoted_path(path)}], file_row_number = true, hive_partitioning = false) "
                f"WHERE file_row_number BETWEEN {first} AND {first + num_rows - 1}"
            )
            row += num_rows


def iter_windows(rows: Iterable[Rows], *, most_rows: int, granularity: str) -> Iterator[Window]:
    """Give windows of at most most_rows rows; granularity of the dataset's event days."""
    held: list[Rows] = []
    days: list[Int64s] = []
    for part in rows:
        held.append(part)
        days.append(days_of(part.event_time, granularity))
        while sum(map(len, days)) >= most_rows:
            event_day = np.concatenate(days)
            at = cut_place(event_day, most_rows)
            window, held = _cut(held, at)
            yield Window(parts=window, event_day=event_day[:at])
            days = [event_day[at:]]
    if held and sum(map(len, days)):
        yield Window(parts=tuple(held), event_day=np.concatenate(days))


def cut_place(event_day: Int64s, most_rows: int) -> int:
    """Give how many of these rows make a window: up to the last change of day in the second half of most_rows."""
    window = event_day[: most_rows + 1]
    changes = np.flatnonzero(window[1:] != window[:-1]) + 1
    changes = changes[changes > most_rows // 2]
    return int(changes[-1]) if len(changes) else min(most_rows, len(event_day))


def days_of(event_time: Int64s, granularity: str) -> Int64s:
    """Give the event day of times in microseconds, as days since 1970."""
    if granularity == "day":
        return event_time // 86_400_000_000
    days = event_days(pa.array(event_time).cast(TIMESTAMP), granularity).cast(pa.int32())
    return days.to_numpy().astype(np.int64)


def as_microseconds(event_time: pa.Array) -> Int64s:
    """Give times of a column in microseconds UTC without nulls as integers."""
    values: NDArray[Any] = pc.cast(event_time, pa.int64()).to_numpy(zero_copy_only=False)
    return values


def _cut(held: Sequence[Rows], at: int) -> tuple[tuple[Rows, ...], list[Rows]]:
    """Give the first `at` rows and the others."""
    first: list[Rows] = []
    rest: list[Rows] = []
    for part in held:
        num_rows = len(part.event_time)
        here = min(max(at, 0), num_rows)
        if here:
            first.append(part.part(0, here))
        if here < num_rows:
            rest.append(part.part(here, num_rows))
        at -= num_rows
    return tuple(first), rest


def _runs(parts: Sequence[FileRows]) -> Iterator[tuple[str, int, int]]:
    """Give (path, first row, rows) with neighbouring parts of one file as one run."""
    run: tuple[str, int, int] | None = None
    for part in parts:
        num_rows = len(part.event_time)
        if run is not None and run[0] == part.path and run[1] + run[2] == part.first:
            run = (run[0], run[1], run[2] + num_rows)
            continue
        if run is not None:
            yield run
        run = (part.path, part.first, num_rows)
    if run is not None:
        yield run
