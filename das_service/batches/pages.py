"""Pages: the rows of some ranges of ready_seq, with features, labels and supervision, in ready order.

A page is cut by what a reader may hold, never by what it reads: batches are cut from pages anew, so that the size of
pages can change at any time. `closed` says which rows there are and in what order; `examples` and the FMs' tables are
read where the event times of these rows lie.
"""

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from das_service.batches.cursor import Cursor
from das_service.batches.filters import Condition, filters_examples, sql_of
from das_service.batches.query import FROM_CLOSED, refuse_unknown
from das_service.errors import DasError
from das_service.folder import Folder
from das_service.registry import Catalog
from das_service.supervision.fm_tables import Limits
from das_service.supervision.join import OfflineJoin
from das_service.supervision.windows import BatchRows, Window, days_of
from das_service.tables.duck import Duck, source_of
from das_service.tables.offline_store import TableReader, table_place
from schemas.dataset import TIMESTAMP, DatasetSpec, Feature
from schemas.tables import CLOSED, EXAMPLE_HASH, EXAMPLES

Int64s: TypeAlias = NDArray[np.int64]
Counts: TypeAlias = "Mapping[str, NDArray[np.int64]]"
_EPOCH = dt.date(1970, 1, 1).toordinal()
_SQL_TYPES = {
    ("float", None): "DOUBLE", ("category", "int64"): "BIGINT", ("category", "string"): "VARCHAR",
    ("category_list", "int64"): "BIGINT[]", ("category_list", "string"): "VARCHAR[]", ("vector", None): "BLOB",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Rows in ready order. counts: per FM how many have each status, in the order of STATUSES.

    columns: in the order of the schema, ChunkedArrays of the rows in their order, and Arrays as they were found: row i
    has its value at order[i], so that they are copied once, into a batch.
    """

    columns: Sequence[pa.ChunkedArray | pa.Array]
    order: Int64s
    ready_seq: Int64s
    partition: NDArray[np.int32]
    counts: Counts

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.ready_seq)

    @property
    def nbytes(self) -> int:
        """What the rows take."""
        return sum(int(column.nbytes) for column in self.columns)

    def arrays(self, start: int, stop: int) -> list[pa.Array]:
        """Give the columns of some rows, each an array whose bytes in a stream depend on its values alone."""
        order = pa.array(self.order[start:stop])
        return [
            _own_copy(column.slice(start, stop - start))
            if isinstance(column, pa.ChunkedArray)
            else _own_bits(column.take(order))
            for column in self.columns
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Rows of `closed` in `examples`: their numbers, ascending, and where each lies in the columns.

    by_hash: each hash of these rows stands for one example between their times, so that nothing else has it.
    """

    columns: Mapping[str, pa.Array]
    numbers: Int64s
    order: Int64s
    by_hash: bool = False


class PageReader:
    """Reads pages of what a cursor is about. Threads share it."""

    def __init__(self, duck: Duck, folder: Folder, catalog: Catalog, cursor: Cursor) -> None:
        """Look at the tables as they are now: they hold all that the cursor is about.

        Raises:
            UnknownNameError, BadRequestError, InvalidRowsError: The query names what is not there.
        """
        query = cursor.query
        self._conditions = refuse_unknown(catalog, cursor.dataset, query)
        self.spec: DatasetSpec = catalog.spec(cursor.dataset)
        self._duck = duck
        self._cursor = cursor
        self._low = np.array(cursor.low, np.int64)
        self._end = np.array(cursor.end, np.int64)
        self._closed = _reader(folder, cursor.dataset, CLOSED)
        self._examples = _reader(folder, cursor.dataset, EXAMPLES)
        self._join = OfflineJoin(
            duck, folder, catalog, cursor.dataset, query.supervision, client=None, limits=limits_of(cursor)
        )
        self._of_closed = [
            c for c in query.columns if c in FROM_CLOSED or c in {task.name for task in self.spec.tasks}
        ]  # fmt: skip
        self._of_examples = [c for c in query.columns if c not in self._of_closed]
        self.schema = self._schema()

    def _schema(self) -> pa.Schema:
        fields = [pa.field("example_id", pa.string()), pa.field("event_time", TIMESTAMP)]
        fields += [pa.field(name, self._type_of(name)) for name in self._cursor.query.columns]
        return pa.schema([*fields, *self._join.schema])

    def _type_of(self, column: str) -> pa.DataType:
        feature = self.spec.feature(column)
        if feature is not None:
            return pa.list_(pa.float32(), feature.size) if feature.type == "vector" else feature.arrow_type
        known = {"ready_seq": pa.int64(), "closed_at": TIMESTAMP, "received_at": TIMESTAMP, "is_late": pa.bool_()}
        return known.get(column, pa.float32())

    def read(self, ranges: Sequence[tuple[int, int]]) -> Page:
        """Give the rows of ranges of ready_seq, ascending, that lie within the cursor's bounds and pass its query.

        Raises:
            OverloadedError: No permit for DuckDB came free.
            UnavailableError: The memory is used up.
            DiskReserveError: The spill disk is full or broken.
            DasError: 410, cursor_expired: rows are gone.
        """
        with self._duck.room_for("a page"):
            return self._read(ranges)

    def _read(self, ranges: Sequence[tuple[int, int]]) -> Page:
        closed = self._closed_rows(ranges)
        found = self._features(closed)
        if len(found.numbers) < closed.num_rows:
            closed = closed.take(pa.array(found.numbers))
        supervision, counts = self._supervision(closed, by_hash=found.by_hash)
        columns = {name: closed[name] for name in ("example_id", "event_time", *self._of_closed)}
        columns |= found.columns
        own = [columns[field.name] for field in self.schema if field.name in columns]
        return Page(
            columns=[*own, *supervision],
            order=found.order,
            ready_seq=closed["ready_seq"].to_numpy(),
            partition=closed["_partition"].to_numpy(),
            counts=counts,
        )

    # ---- which rows

    def _closed_rows(self, ranges: Sequence[tuple[int, int]]) -> pa.Table:
        """Give the rows of `closed` that are asked for, in ready order."""
        first, end = ranges[0][0], ranges[-1][1]
        names = ["example_id", "event_time", EXAMPLE_HASH, "ready_seq", "_partition", *self._of_closed]
        columns = ", ".join(f'"{name}"' for name in dict.fromkeys(names))
        keeps, values = self._keeps()
        files = [
            file
            for each in self._closed.days.values()
            for file in each
            if file.last_position is None
            or file.first_position is None
            or (file.last_position >= first and file.first_position < end)
        ]
        with self._duck.cursor() as cursor:
            source = source_of(cursor, "closed", self._closed.rows_of(files))
            if source is None:
                self._refuse_gaps(0, ranges)
                return _no_rows(self.schema, names)
            query = (
                f"SELECT {columns}, coalesce({keeps}, false) AS _keeps FROM {source} "  # noqa: S608 - checked names
                f"WHERE ready_seq >= {first} AND ready_seq < {end}"
            )
            rows = cursor.sql(query, params=values).to_arrow_table()
        mine = self._inside(rows["ready_seq"].to_numpy(), rows["_partition"].to_numpy(), ranges)
        self._refuse_gaps(int(mine.sum()), ranges)
        numbers = np.flatnonzero(mine & rows["_keeps"].to_numpy())
        order = np.lexsort((rows["_partition"].to_numpy()[numbers], rows["ready_seq"].to_numpy()[numbers]))
        return rows.drop_columns(["_keeps"]).take(pa.array(numbers[order]))

    def _keeps(self) -> tuple[str, dict[str, Any]]:
        """Give the condition on rows of `closed` as SQL, and its values."""
        query = self._cursor.query
        conditions = [c for c in self._conditions if not filters_examples(self.spec, c[0])]
        text, values = sql_of(conditions, prefix="c")
        parts = [text] if text else []
        if query.from_us is not None:
            parts.append(f"epoch_us(event_time) >= {query.from_us}")
        if query.to_us is not None:
            parts.append(f"epoch_us(event_time) < {query.to_us}")
        if query.as_of_us is not None:
            parts.append(f"epoch_us(closed_at) <= {query.as_of_us}")
        return " AND ".join(parts) or "true", values

    def _inside(
        self, seq: Int64s, partition: NDArray[np.int32], ranges: Sequence[tuple[int, int]]
    ) -> NDArray[np.bool_]:
        """Give which rows are of the ranges and within the cursor's bounds."""
        starts = np.array([start for start, _ in ranges])
        stops = np.array([stop for _, stop in ranges])
        place = np.searchsorted(starts, seq, side="right") - 1
        inside: NDArray[np.bool_] = (place >= 0) & (seq < stops[place])
        return inside & (seq >= self._low[partition]) & (seq < self._end[partition])

    def _refuse_gaps(self, found: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Raise if rows are gone: ready_seq has no gaps.

        Raises:
            DasError: 410, cursor_expired.
        """
        wanted = sum(
            int(np.maximum(0, np.minimum(stop, self._end) - np.maximum(start, self._low)).sum())
            for start, stop in ranges
        )
        if found < wanted:
            raise DasError(
                f"{wanted - found} of the rows that the cursor is about are no longer in the tables "
                f"(ready_seq {ranges[0][0]} to {ranges[-1][1] - 1}); start again without a cursor",
                code="cursor_expired",
                http_status=410,
            )

    # ---- their features

    def _features(self, closed: pa.Table) -> "_Found":
        """Find rows of `closed` in `examples`: by hash where each of the page is that of one example, else by id."""
        conditions = [c for c in self._conditions if filters_examples(self.spec, c[0])]
        everything = np.arange(closed.num_rows)
        if not self._of_examples and not conditions:
            return _Found(columns={}, numbers=everything, order=everything)
        if not closed.num_rows:
            columns = {name: pa.array([], self._type_of(name)) for name in self._of_examples}
            return _Found(columns=columns, numbers=everything, order=everything)
        if not conditions:
            found = self._found(self._matching_examples(closed, [], key=EXAMPLE_HASH), by_hash=True)
            if np.array_equal(found.numbers, everything):
                return found
        found = self._found(self._matching_examples(closed, conditions, key="example_id"), by_hash=False)
        if not conditions and len(found.numbers) != closed.num_rows:
            raise DasError(
                f"{closed.num_rows - len(found.numbers)} of the examples that the cursor is about are no longer in the "
                "tables; start again without a cursor",
                code="cursor_expired",
                http_status=410,
            )
        return found

    def _found(self, rows: pa.Table, *, by_hash: bool) -> "_Found":
        numbers = rows["_row"].to_numpy()
        order = np.argsort(numbers)
        columns = {name: self._as_given(name, rows[name]) for name in self._of_examples}
        return _Found(columns=columns, numbers=numbers[order], order=order, by_hash=by_hash)

    def _matching_examples(self, closed: pa.Table, conditions: Sequence[Condition], *, key: str) -> pa.Table:
        """Give `_row`, the number in `closed`, and the columns of each example between the page's times that matches.

        key: the column that is compared. Another time means another example: one that has the hash has `_row` -1. Of
        those that share hashes no more are given than show that there are some: there may be many pairs of them.
        """
        times = closed["event_time"].cast(pa.int64()).to_numpy()
        first, last = int(times.min()), int(times.max())
        days = np.unique(days_of(times, self.spec.table_granularity))
        files = [file for day in days for file in self._examples.days.get(dt.date.fromordinal(_EPOCH + int(day)), [])]
        text, values = sql_of(conditions, prefix="e")
        asked = closed.select([key, "event_time"]).append_column(
            "_row", pa.array(np.arange(closed.num_rows, dtype=np.int32))
        )
        row, on = "a._row", "USING (example_id, event_time)"
        if key == EXAMPLE_HASH:
            row = "CASE WHEN e.event_time = a.event_time THEN a._row ELSE -1 END"
            on = f"USING ({key}) LIMIT {closed.num_rows + 1}"
        with self._duck.cursor() as cursor:
            source = source_of(cursor, "examples", self._examples.rows_of(files))
            if source is None:
                return _no_rows(self.schema, ["_row", *self._of_examples])
            cursor.register("asked", asked)
            wanted = dict.fromkeys([*self._of_examples, *(column for column, _, _ in conditions)])
            columns = "".join(f", {self._selected(name, cursor, source)}" for name in wanted)
            query = (
                f"SELECT {row} AS _row, e.* EXCLUDE ({key}, event_time) FROM (SELECT * FROM "  # noqa: S608 - checked names
                f"(SELECT {key}, event_time{columns} FROM {source}) "
                f"WHERE event_time BETWEEN make_timestamptz({first}) AND make_timestamptz({last})"
                f"{f' AND {text}' if text else ''}) e JOIN asked a {on}"
            )
            return cursor.sql(query, params=values).to_arrow_table()

    def _selected(self, name: str, cursor: duckdb.DuckDBPyConnection, source: str) -> str:
        """Give a column of `examples` as SQL: null where all of these files are older than it."""
        feature = self.spec.feature(name)
        if feature is None or not feature.nullable or name in cursor.sql(f"FROM {source}").columns:
            return f'"{name}"'
        return f'NULL::{_SQL_TYPES[feature.type, feature.value_type]} AS "{name}"'

    def _as_given(self, name: str, column: pa.ChunkedArray) -> pa.Array:
        feature = self.spec.feature(name)
        array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([*column.chunks, _empty(column)])
        return _vector(array, feature) if feature is not None and feature.type == "vector" else array

    # ---- what FMs said of them

    def _supervision(self, closed: pa.Table, *, by_hash: bool) -> tuple[list[pa.ChunkedArray], Counts]:
        if not self._cursor.query.fms:
            return [], {}
        if not closed.num_rows:
            return [pa.chunked_array([], field.type) for field in self._join.schema], {}
        times = closed["event_time"].cast(pa.int64()).to_numpy()
        batch = pa.RecordBatch.from_arrays(
            [_one(closed["example_id"]), _one(closed["event_time"])], names=["example_id", "event_time"]
        )
        joined = self._join.join(
            Window(
                parts=(BatchRows(batch=batch, event_time=times),),
                event_day=days_of(times, self.spec.table_granularity),
                partition=closed["_partition"].to_numpy().astype(np.int64),
                times=(int(times.min()), int(times.max())),
                hashes=_one(closed[EXAMPLE_HASH]) if by_hash else None,
            )
        )
        return joined.columns.columns, joined.counts


def limits_of(cursor: Cursor) -> dict[str, Limits]:
    """Give what of each FM's tables counts for a cursor."""
    return {
        fm: Limits(
            num_snapshots=bounds.snapshots,
            supervision=np.array(bounds.supervision, np.int64),
            dead_letters=np.array(bounds.dead_letters, np.int64),
            as_of_us=cursor.query.as_of_us,
            snapshot=cursor.query.pinned.get(fm),
        )
        for fm, bounds in cursor.fms.items()
    }


def _reader(folder: Folder, dataset: str, table: str) -> TableReader:
    reader = TableReader(table_place(folder, dataset, table))
    reader.refresh()
    return reader


def _no_rows(schema: pa.Schema, names: Iterable[str]) -> pa.Table:
    others = {"ready_seq": pa.int64(), "_partition": pa.int32(), EXAMPLE_HASH: pa.int64(), "_row": pa.int32()}
    return pa.table(
        {name: pa.array([], schema.field(name).type if name in schema.names else others[name]) for name in names}
    )


def _empty(column: pa.ChunkedArray) -> pa.Array:
    return pa.array([], column.type)


def _own_copy(column: pa.ChunkedArray) -> pa.Array:
    """Give a column as one array whose bytes in a stream do not depend on what lay around it.

    What follows the last row in a buffer of bits or of texts would be written too.
    """
    if column.num_chunks == 1:
        array = column.chunk(0)
        is_plain = pa.types.is_primitive(array.type) and not pa.types.is_boolean(array.type)
        if is_plain and (not array.null_count or len(array) % 8 == 0):
            return array
        return pa.concat_arrays([array, array.slice(0, 0)])
    return pa.concat_arrays([*column.chunks, _empty(column)])


def _own_bits(array: pa.Array) -> pa.Array:
    """Give a fresh array in the same sense: only bits, its own or its elements', may have something behind the last."""
    has_bits = array.null_count or pa.types.is_boolean(array.type) or pa.types.is_nested(array.type)
    return pa.concat_arrays([array, array.slice(0, 0)]) if has_bits else array


def _one(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)


def _vector(array: pa.Array, feature: Feature) -> pa.Array:
    """Give packed float32 values as lists of fixed size."""
    size = feature.size or 0
    kind = pa.list_(pa.float32(), size)
    nulls = None if not array.null_count else array.is_null()
    whole = array if nulls is None else pc.fill_null(array, b"\0" * (4 * size))
    packed = pa.concat_arrays([whole])
    _, offsets, data = packed.buffers()
    first = np.frombuffer(offsets, np.int32)[packed.offset] if len(packed) else 0
    values = np.frombuffer(data, np.uint8)[first : first + 4 * size * len(packed)] if len(packed) else np.zeros(0)
    child = pa.array(values.view("<f4").astype(np.float32, copy=False), pa.float32())
    return pa.FixedSizeListArray.from_arrays(child, type=kind, mask=nulls)
