"""A caller's own table with supervision appended: the same rows in the same order, some thousand rows at a time.

The table is checked as a whole before the answer starts, so that what is wrong with it is an error and not a broken
stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from das_service.door.arrow_body import Budget, measure_stream
from das_service.door.columns import FIRST_US, LAST_US, augment_differences, canonical_times, refuse_differences
from das_service.door.row_errors import RowErrors
from das_service.door.spool import BY_REFERENCE, Spool
from das_service.errors import BadRequestError, InvalidRowsError, TooLargeError
from das_service.supervision.join import Joined, OfflineJoin
from das_service.supervision.windows import BatchRows, Int64s, as_microseconds, iter_windows

ANSWER_ROWS = 16_384
_MOST_ROWS = 1 << 31
_MOST_BATCH_BYTES = 256 * 1024 * 1024
_Reason: TypeAlias = tuple[str, str, str]  # column, code, what it is
_INEXACT: _Reason = ("event_time", "inexact_time", "is finer than a microsecond; round it first")
_OUTSIDE: _Reason = ("event_time", "out_of_range", "is outside the years 1 to 9999")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A table that was checked. The batches are read again for each pass; `source` is an IPC stream or a table."""

    schema: pa.Schema
    source: pa.Buffer | pa.Table

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Give the batches of the table."""
        if isinstance(self.source, pa.Table):
            yield from self.source.to_batches()
            return
        with pa.ipc.open_stream(self.source) as reader:
            yield from reader

    def iter_rows(self) -> Iterator[BatchRows]:
        """Give the rows with their times."""
        for batch in self.batches():
            errors = RowErrors(batch.num_rows)
            yield BatchRows(batch=batch, event_time=_times(batch, errors))


def open_upload(spool: Spool, *, added: Sequence[str], max_bytes: int) -> Upload:
    """Give the table of an Arrow body once all of it is found good.

    added: names of the columns that the answer has beside the caller's.

    Raises:
        BadRequestError: The stream is damaged or was cut.
        InvalidRowsError: schema_mismatch, or invalid_rows: an id or a time is null or can't be said in microseconds.
        TooLargeError: It takes more than max_bytes once decoded.
    """
    budget = Budget(max_bytes)
    try:
        measure_stream(spool.data, budget=budget, max_rows=_MOST_ROWS, max_batch_bytes=_MOST_BATCH_BYTES)
    except TooLargeError as error:
        if budget.spent_bytes <= max_bytes:  # it is the batches: sent in another way, the table fits
            raise
        raise TooLargeError(f"{error.detail}; {BY_REFERENCE}") from error
    try:
        with pa.ipc.open_stream(spool.buffer()) as reader:
            schema = reader.schema
            refuse_differences(augment_differences(schema, added))
            upload = Upload(schema=schema, source=spool.buffer())
            refuse_bad_rows(upload.batches())
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InvalidRowsError):
            raise
        line = str(error).split("\n", 1)[0][:300]
        raise BadRequestError(f"the Arrow stream is damaged: {line}") from error
    return upload


def refuse_bad_rows(batches: Iterator[pa.RecordBatch]) -> None:
    """Raise if a row has no id or no time that can be joined on.

    Raises:
        InvalidRowsError: invalid_rows, with the number of rows and the first of them, per reason; so do its `errors`.
    """
    problems: dict[_Reason, tuple[int, int]] = {}
    start = 0
    for batch in batches:
        batch.validate(full=True)
        errors = RowErrors(batch.num_rows)
        ids, times = batch.column("example_id"), batch.column("event_time")
        for name, column in (("example_id", ids), ("event_time", times)):
            if column.null_count:
                _note(problems, (name, "null", "is null"), np.asarray(column.is_null()), start)
        microseconds = _times(batch, errors)
        _note(problems, _INEXACT, ~errors.good(), start)
        outside = (microseconds < FIRST_US) | (microseconds > LAST_US)
        _note(problems, _OUTSIDE, outside & ~np.asarray(times.is_null()), start)
        start += batch.num_rows
    if problems:
        told = [
            f"{at} {what}: {count} rows, the first is row {row}" for (at, _, what), (count, row) in problems.items()
        ]
        found = [
            {"row": row, "example_id": None, "column": at, "code": code, "message": f"it {what}: {count} rows"}
            for (at, code, what), (count, row) in problems.items()
        ]
        raise InvalidRowsError("; ".join(told), code="invalid_rows", extra={"errors": found})


def _note(problems: dict[_Reason, tuple[int, int]], reason: _Reason, rows: np.ndarray, start: int) -> None:
    places = np.flatnonzero(rows)
    if len(places):
        count, first = problems.get(reason, (0, start + int(places[0])))
        problems[reason] = (count + len(places), first)


def _times(batch: pa.RecordBatch, errors: RowErrors) -> Int64s:
    times = canonical_times(batch.column("event_time"), errors)
    return as_microseconds(times.fill_null(0) if times.null_count else times)


def iter_augmented(
    upload: Upload, join: OfflineJoin, *, window_rows: int, echo: bool
) -> Iterator[tuple[list[pa.RecordBatch], Joined]]:
    """Give per window the batches of the answer, in the caller's order, and what was joined.

    echo: whether the caller's columns come first.
    """
    for window in iter_windows(upload.iter_rows(), most_rows=window_rows, granularity=join.spec.table_granularity):
        joined = join.join(window)
        table = joined.columns
        if echo:
            mine = pa.Table.from_batches(window.batches(), schema=upload.schema)
            table = pa.Table.from_arrays(
                [*mine.columns, *table.columns], schema=answer_schema(upload.schema, join, echo=True)
            )
        yield table.to_batches(max_chunksize=ANSWER_ROWS), joined


def answer_schema(schema: pa.Schema, join: OfflineJoin, *, echo: bool) -> pa.Schema:
    """Give the columns of the answer; echo: with the caller's, first."""
    return pa.schema([*(schema if echo else ()), *join.schema])
