"""One window of rows and one FM: what the tables, and for rows on the way the online store, say of each row.

The window is what DuckDB builds its hash table of; the files of its event days are read past it, at the window's own
times first. What is found is scattered by row number into buffers of fixed width.

Source: docs/adr/0007-the-offline-join.md
"""

import datetime as dt
from collections.abc import Sequence
from typing import Any, TypeAlias

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from das_service.errors import UnavailableError
from das_service.supervision.answer import (
    PRESENT,
    Judged,
    LookupQuery,
    judge,
)
from das_service.supervision.buffers import BufferPool
from das_service.supervision.fm_tables import FmTables, Limits
from das_service.supervision.lookup import Asked, fetch_values
from das_service.supervision.windows import Window, days_of
from das_service.tables.offline_store import ALL_KINDS, SERVED
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.snapshot import OutputColumns
from schemas.supervision import FAILED, online_layout
from schemas.tables import EXAMPLE_HASH

BATCH_ROWS = 32_768
_EPOCH = dt.date(1970, 1, 1).toordinal()
Columns: TypeAlias = "dict[str, NDArray[Any]]"
Int64s: TypeAlias = NDArray[np.int64]
RowNumbers: TypeAlias = NDArray[np.intp]


class WindowJoin:
    """One window and one FM. `asked` is registered at the cursor."""

    def __init__(
        self,
        cursor: duckdb.DuckDBPyConnection,
        window: Window,
        fm: FmTables,
        query: LookupQuery,
        spec: DatasetSpec,
        pool: BufferPool,
        limits: Limits | None,
    ) -> None:
        self._limits = limits
        self._cursor = cursor
        self._window = window
        self._fm = fm
        self._query = query
        self._spec = spec
        self._days = [dt.date.fromordinal(_EPOCH + int(day)) for day in window.days()]
        self._found = np.zeros(window.num_rows, np.bool_)
        self._values: Columns = {
            name: pool.empty((window.num_rows, *shape), kind) for name, kind, shape in fm.layout(query)
        }  # fmt: skip
        self._values["_state"][:] = 0
        order = sorted(range(len(fm.record.snapshots)), key=fm.record.snapshots.__getitem__)
        self._rank = np.empty(max(1, len(order)), np.int64)
        self._rank[order or [0]] = np.arange(max(1, len(order)))

    def judge(self) -> Judged:
        """Give status and values of every row."""
        self._find_in_tables()
        waits = np.zeros(self._window.num_rows, np.bool_)
        if self._fm.on_the_way and not self._found.all():
            self._find_on_the_way(waits)  # before the dead letters: one that is scored after all is failed no more
        if not self._found.all():
            self._find_dead_letters()
        if not self._found.all():
            for name in ("_snapshot", "_event_time"):
                self._values[name][~self._found] = 0
        status = judge(
            self._values, self._found, waits, self._fm.trained_through_us, self._query.max_freshness_gap_seconds
        )
        hidden = status != PRESENT
        if hidden.any():
            for column in self._values.values():
                column[hidden] = 0
        return Judged(status, self._values, self._fm.record.snapshots, self._fm.trained_through_us)

    # ---- the tables

    def _find_in_tables(self) -> None:
        is_pinned = self._limits is not None and self._limits.snapshot is not None
        source = self._fm.supervision.source(self._cursor, self._days, kinds=ALL_KINDS if is_pinned else SERVED)
        if source is None or self._fm.record.outputs is None:
            return
        first, last = self._window.times or self._window.span()
        self._find(source, "asked", _between(first, last))
        if self._window.times is None:
            self._find_at_other_times(source, f"NOT ({_between(first, last)})")

    def _find(self, source: str, asked: str, times: str) -> None:
        """Take what the rows of the times say of the rows of `asked`, which is what DuckDB builds its hash table of."""
        outputs = [name for name in self._values if not name.startswith("_")]
        ids = ", ".join(f"'{name}'" for name in self._fm.record.snapshots)
        columns = ", ".join(f'"{name}"' for name in outputs)
        key = self._window.key
        # The snapshots' numbers are made before the join, where DuckDB holds a file's few ids once and not per row.
        query = (
            f"SELECT a.row AS _row, s.* EXCLUDE ({key}{self._position()}) "  # noqa: S608 - declared names
            f"FROM (SELECT {key}, epoch_us(event_time) AS _event_time, epoch_us(scored_at) AS _scored_at, "
            f"CAST(enum_code(TRY_CAST(snapshot_id AS ENUM ({ids}))) AS INTEGER) AS _snapshot"
            f"{', ' if outputs else ''}{columns}{self._position()} FROM {source}"
            f"{self._condition('available_at', times)}) s "
            f"JOIN {asked} a USING ({key}){self._within('s', 'reach')}"
        )
        for batch in self._cursor.sql(query).to_arrow_reader(BATCH_ROWS):
            self._take(batch)

    def _find_at_other_times(self, source: str, times: str) -> None:
        """Look for rows at other times of their days: the caller may have another time of them.

        An example has one outcome, so there is nothing more of a row that was found, save where backfills were: of an
        example that came with two times the outcome may have one, and what a backfill says the other. Mostly nothing is
        there, so hashes alone are looked for first.
        """
        is_wanted = np.full(len(self._found), self._fm.supervision.has_backfilled(self._days)) | ~self._found
        if not is_wanted.any():
            return
        rows, digests = self._digests(is_wanted)
        hashes = pa.table({"row": pa.array(rows), EXAMPLE_HASH: pa.array(keys.example_hashes(digests))})
        self._cursor.register("hashes", hashes)
        query = (
            f"SELECT DISTINCT h.row FROM (SELECT {EXAMPLE_HASH} FROM {source}"  # noqa: S608 - declared names
            f"{self._condition('available_at', times)}) s JOIN hashes h USING ({EXAMPLE_HASH})"
        )
        there = self._cursor.sql(query).to_arrow_table()
        if there.num_rows:
            self._cursor.register("there", there)
            self._find(source, "(SELECT a.* FROM asked a JOIN there USING (row))", times)

    def _digests(self, is_wanted: NDArray[np.bool_]) -> tuple[NDArray[np.int32], pa.Array]:
        """Give the rows that are wanted and have an id, and the digests of these."""
        self._cursor.register("wanted", pa.table({"row": pa.array(np.flatnonzero(is_wanted).astype(np.int32))}))
        query = "SELECT a.row, a.example_id FROM asked a JOIN wanted USING (row) WHERE a.example_id IS NOT NULL"
        asked = self._cursor.sql(query).to_arrow_table()
        return asked["row"].to_numpy(), keys.digest_array(asked["example_id"].combine_chunks())

    def _take(self, batch: pa.RecordBatch) -> None:
        """Scatter what was found, by row number."""
        if batch.column("_snapshot").null_count:
            raise UnavailableError(
                f"the supervision of FM {self._fm.record.fm!r} names a snapshot that the registry does not know yet; "
                "try again",
                code="registry_behind",
            )
        found = {name: _values_of(batch.column(name), self._values.get(name)) for name in batch.schema.names}
        rows = found.pop("_row").astype(np.intp)  # once, and not for each column
        chosen: Any = self._same_day(rows, found["_event_time"])
        if chosen is not None:
            rows = rows[chosen]
            found = {name: values[chosen] for name, values in found.items()}
        before = self._found.copy()
        self._found[rows] = True
        if np.count_nonzero(self._found) != np.count_nonzero(before) + len(rows):
            better = self._better(rows, found, before)
            rows = rows[better]
            found = {name: values[better] for name, values in found.items()}
        for name, values in found.items():
            _as_items(self._values[name])[rows] = _as_items(values)

    def _same_day(self, rows: RowNumbers, event_time: Int64s) -> NDArray[np.bool_] | None:
        """Give which rows are the caller's examples: of the same event day; None for all."""
        if len(self._days) == 1:
            return None
        same = days_of(event_time, self._spec.table_granularity) == self._window.event_day[rows]
        return None if same.all() else same

    def _better(self, rows: RowNumbers, found: Columns, before: NDArray[np.bool_]) -> Int64s:
        """Give which of the rows stand, where an example has several snapshots; before: rows found in other batches."""
        key = self._preference(found)
        order = np.lexsort((*key[::-1], rows))
        best = order[np.concatenate([[True], np.diff(rows[order]) != 0])]
        old = np.flatnonzero(before[rows[best]])
        if len(old):
            held = {name: self._values[name][rows[best[old]]] for name in ("_snapshot", "_scored_at", "_event_time")}
            stays = _is_before(self._preference(held), [part[best[old]] for part in key])
            best = np.delete(best, old[stays])
        return best.astype(np.int64)

    def _preference(self, found: Columns) -> list[NDArray[Any]]:
        """Give what decides between supervision of one example, the smaller first: valid, scored_at, snapshot_id."""
        leaks = self._fm.trained_through_us[found["_snapshot"]] > found["_event_time"]
        return [leaks, found["_scored_at"], self._rank[found["_snapshot"]]]

    # ---- what counts

    def _position(self) -> str:
        return "" if self._limits is None else ", log_position"

    def _condition(self, available_at: str, times: str) -> str:
        """Give the condition on what is read: what the limits say, and the times."""
        parts = [times] if self._limits is None else [self._limits.condition(available_at), times]
        return f" WHERE {' AND '.join(parts)}"

    def _within(self, table: str, reach: str) -> str:
        return "" if self._limits is None else f" WHERE {table}.log_position <= a.{reach}"

    # ---- what the tables do not say

    def _find_dead_letters(self) -> None:
        source = self._fm.dead_letters.source(self._cursor, self._days)
        if source is None:
            return
        key, known = self._window.key, self._window.times
        times = "true" if known is None else _between(*known)
        query = (
            f"SELECT a.row, epoch_us(d.event_time) AS _event_time FROM "  # noqa: S608
            f"(SELECT {key}, event_time{self._position()} FROM {source}{self._condition('failed_at', times)}) d "
            f"JOIN asked a USING ({key}){self._within('d', 'dead_reach')}"
        )
        for batch in self._cursor.sql(query).to_arrow_reader(BATCH_ROWS):
            rows, event_time = batch.column("row").to_numpy().astype(np.intp), batch.column("_event_time").to_numpy()
            same = self._same_day(rows, event_time)
            failed = rows if same is None else rows[same]
            failed = failed[~self._found[failed]]
            self._values["_state"][failed] = FAILED
            self._values["_snapshot"][failed] = 0
            self._values["_event_time"][failed] = 0
            self._found[failed] = True

    def _find_on_the_way(self, waits: NDArray[np.bool_]) -> None:
        """Look rows up online whose partition has entries on the way; mark those that are still to be scored."""
        client, record = self._fm.client, self._fm.record
        if client is None:
            return
        rows, digest = self._digests(~self._found)
        partitions = keys.partitions_of(digest, self._spec.partitions)
        near = np.isin(partitions, list(self._fm.on_the_way))
        rows, partitions = rows[near], partitions[near]
        waits[rows] = np.isin(partitions, list(self._fm.unfinished))
        layout = online_layout(record.outputs or OutputColumns(tasks=(), embeddings={}))
        days = self._window.event_day[rows].astype("datetime64[D]")
        digests = keys.digest_words(digest).view(np.uint8)[near]
        asked_rows = Asked(self._fm.dataset, self._spec, digests, partitions, days)
        records, found = fetch_values(client, record.fm, layout, asked_rows)
        if found.any() and int(records["_snapshot"][found].max()) >= max(1, len(record.snapshots)):
            raise UnavailableError(
                f"a value of FM {record.fm!r} names a snapshot that the registry does not know yet; try again",
                code="registry_behind",
            )
        for name, column in self._values.items():
            column[rows[found]] = records[name][found]
        self._found[rows[found]] = True


def _between(first: int, last: int) -> str:
    """Give the condition of event_time lying between two times in microseconds, both included."""
    return f"event_time BETWEEN make_timestamptz({first}) AND make_timestamptz({last})"


def _values_of(column: pa.Array, like: NDArray[Any] | None) -> NDArray[Any]:
    """Give a column without nulls as an array; a binary of fixed width as (rows, width) bytes."""
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return values
    width = 0 if like is None else like.shape[1]
    offset_kind = np.int32 if pa.types.is_binary(column.type) else np.int64
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, offset_kind)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8)[int(offsets[0]) : int(offsets[-1])].reshape(len(column), width)


def _as_items(values: NDArray[Any]) -> NDArray[Any]:
    """Give (rows, width) bytes as one item a row: numpy moves an item at once, not byte by byte."""
    if values.ndim == 1 or values.shape[1] == 0:
        return values
    return np.ascontiguousarray(values).view(np.dtype((np.void, values.shape[1]))).reshape(len(values))


def _is_before(first: Sequence[NDArray[Any]], second: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """Give where the first key is not after the second, compared part by part."""
    before = np.zeros(len(first[0]), np.bool_)
    equal = np.ones(len(first[0]), np.bool_)
    for one, other in zip(first, second, strict=True):
        before |= equal & (one < other)
        equal &= one == other
    return before | equal
