"""Parquet files with supervision appended, joined where the tables are: no row goes over HTTP.

Every file is looked at before the first is joined. The result is written in a scratch folder beside its place and put
there once it is whole, so that a run that was cut leaves nothing; what a killed one left goes with the next.
"""

import contextlib
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import redis
from numpy.typing import NDArray

from das_service.door.columns import FIRST_US, LAST_US, augment_differences, canonical_times
from das_service.door.row_errors import RowErrors
from das_service.errors import InvalidRowsError, UnavailableError
from das_service.scratch_folder import ScratchFolder
from das_service.supervision.join import Joined, OfflineJoin
from das_service.supervision.windows import FileRows, Window, as_microseconds, iter_windows
from das_service.tables.duck import JOIN_MEMORY, Duck

WINDOWS_AT_ONCE = 2
_TIME_ROWS = 1_000_000
_ROW_GROUP_ROWS = 250_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A Parquet file of the caller. place: its path below the folder that was named, or its name."""

    path: Path
    place: Path
    num_rows: int
    schema: pa.Schema


@dataclass(slots=True)
class Summary:
    """What was done so far. statuses: rows by status, per FM, in the order of STATUSES."""

    rows: int = 0
    statuses: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def count(self, joined: Joined) -> None:
        """Count a window."""
        self.rows += joined.columns.num_rows
        for fm, counts in joined.counts.items():
            self.statuses[fm] = self.statuses.get(fm, np.zeros(len(counts), np.int64)) + counts


def list_sources(path: Path) -> list[Source]:
    """Give the Parquet file of a path, or those below a folder in the order of their names.

    Raises:
        InvalidRowsError: not_parquet: there is none, or one can't be read.
        FileNotFoundError: There is no such path.
    """
    if path.is_dir():
        places = sorted(file.relative_to(path) for file in path.rglob("*.parquet") if file.is_file())
        if not places:
            raise InvalidRowsError(f"{path} has no *.parquet file", code="not_parquet")
        return [_source(path / place, place) for place in places]
    return [_source(path, Path(path.name))]


def _source(path: Path, place: Path) -> Source:
    with _reading(path), pq.ParquetFile(path) as file:
        return Source(path=path, place=place, num_rows=file.metadata.num_rows, schema=file.schema_arrow)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say which file it is that can't be read.

    Raises:
        InvalidRowsError: not_parquet.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        line = _first_line(error)
        raise InvalidRowsError(f"{path} is not a Parquet file that can be read: {line}", code="not_parquet") from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]


def refuse_unfit(sources: Sequence[Source], added: Sequence[str]) -> None:
    """Raise if a file lacks example_id or event_time, has them with another type, or has a column that is added.

    Raises:
        InvalidRowsError: schema_mismatch, naming the file.
    """
    for source in sources:
        differences = [*augment_differences(source.schema, added), *_ambiguous(source.schema)]
        if differences:
            told = "; ".join(f"column {item['column']}: {item['message']}" for item in differences)
            raise InvalidRowsError(f"{source.path}: {told}", extra={"differences": differences})


def _ambiguous(schema: pa.Schema) -> list[dict[str, str]]:
    """Give the columns that DuckDB would take for those that it reads of a file: case does not count there."""
    return [
        {"column": name, "problem": "collision", "message": "the join reads a column of this name itself; rename yours"}
        for name in schema.names
        if name != "example_id" and name.lower() in {"example_id", "file_row_number"}
    ]


def open_duck(memory_bytes: int) -> Duck:
    """Give a DuckDB for as many windows as are joined at a time, in half as much memory again as for one.

    In less it partitions its hash tables early, which costs what joining two at a time gives.
    """
    return Duck(memory_bytes=memory_bytes * 3 // 2, concurrency=WINDOWS_AT_ONCE, joins_as_written=True)


def iter_joined(sources: Sequence[Source], join: OfflineJoin, *, window_rows: int) -> Iterator[tuple[Window, Joined]]:
    """Give the files' rows, in their order, window by window, with their supervision.

    Two windows are joined at a time: one query alone leaves cores idle while its rows are scattered.

    Raises:
        InvalidRowsError: invalid_rows: an id or a time is null, or a time can't be said in microseconds.
    """
    rows = (part for source in sources for part in _iter_rows(source))
    with ThreadPoolExecutor(WINDOWS_AT_ONCE, thread_name_prefix="join") as threads:
        running: deque[tuple[Window, Future[Joined]]] = deque()
        for window in iter_windows(rows, most_rows=window_rows, granularity=join.spec.table_granularity):
            running.append((window, threads.submit(_joined, join, window)))
            if len(running) == WINDOWS_AT_ONCE:
                yield _first(running, join)
        while running:
            yield _first(running, join)


def _first(running: deque[tuple[Window, Future[Joined]]], join: OfflineJoin) -> tuple[Window, Joined]:
    """Give the first window once it is joined; one that found too little memory gets all of it, after the others."""
    window, joined = running.popleft()
    try:
        return window, joined.result()
    except UnavailableError as error:
        if error.code != JOIN_MEMORY or not running:
            raise
        wait(other for _, other in running)
        return window, _joined(join, window)


def _joined(join: OfflineJoin, window: Window) -> Joined:
    try:
        return join.join(window)
    except (duckdb.Error, OSError, redis.RedisError) as error:
        files = ", ".join(dict.fromkeys(part.path for part in window.parts if isinstance(part, FileRows)))
        raise UnavailableError(f"the rows of {files} can't be joined: {_first_line(error)}") from error


def _iter_rows(source: Source) -> Iterator[FileRows]:
    first = 0
    with pq.ParquetFile(source.path) as file:
        for batch in _iter_batches(file, source.path, _TIME_ROWS, columns=["event_time"]):
            times = batch.column(0)
            if times.null_count:
                row = first + int(np.flatnonzero(np.asarray(times.is_null()))[0])
                raise InvalidRowsError(f"{source.path}: event_time is null in row {row}", code="invalid_rows")
            errors = RowErrors(batch.num_rows)
            microseconds = as_microseconds(canonical_times(times, errors))
            bad = ~errors.good() | (microseconds < FIRST_US) | (microseconds > LAST_US)
            if bad.any():
                row = first + int(np.flatnonzero(bad)[0])
                raise InvalidRowsError(
                    f"{source.path}: event_time of row {row} is finer than a microsecond or outside years 1 to 9999",
                    code="invalid_rows",
                )
            yield FileRows(path=str(source.path), first=first, event_time=microseconds)
            first += batch.num_rows


def _iter_batches(file: pq.ParquetFile, path: Path, num_rows: int, **options: Any) -> Iterator[pa.RecordBatch]:  # noqa: ANN401 - as pyarrow has them
    batches = file.iter_batches(num_rows, **options)
    while True:
        with _reading(path):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def augment_files(
    sources: Sequence[Source],
    target: Path,
    join: OfflineJoin,
    *,
    window_rows: int,
    as_folder: bool,
    on_progress: Callable[[Summary], None],
) -> Summary:
    """Write the files' rows with supervision appended, in the same order, and give the account.

    target: a file, or with as_folder a folder that gets the files of the same names. What stood there is replaced once
    everything is written.

    Raises:
        InvalidRowsError: A row has no id or no time that can be joined on.
        OSError: The disk is full, or the place can't be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    with contextlib.closing(ScratchFolder(f".{target.name}.das-", parent=target.parent)) as scratch:
        partial = scratch.path / "partial"
        with _Output(sources, partial, join, as_folder=as_folder) as output:
            for window, joined in iter_joined(sources, join, window_rows=window_rows):
                output.write(window, joined)
                summary.count(joined)
                del joined  # so that the next windows are joined into its memory
                on_progress(summary)
        _put(partial, target)
    return summary


class _Output:
    """The files being written, one at a time, each with the rows of its source."""

    def __init__(self, sources: Sequence[Source], root: Path, join: OfflineJoin, *, as_folder: bool) -> None:
        self._sources = {str(source.path): source for source in sources}
        self._root = root
        self._as_folder = as_folder
        self._added = join.schema
        self._path = ""
        self._open = ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._columns: _InOrder | None = None

    def __enter__(self) -> "_Output":
        for source in self._sources.values():  # also those without rows, which no window has
            if source.num_rows == 0:
                with pq.ParquetWriter(self._target_of(source), self._schema_of(source)):
                    pass
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, window: Window, joined: Joined) -> None:
        """Write the rows of a window, which are the next ones of the files."""
        row = 0
        for part in window.parts:
            if not isinstance(part, FileRows):
                continue
            if part.path != self._path:
                self._begin(self._sources[part.path])
            num_rows = len(part.event_time)
            self._append(joined.columns.slice(row, num_rows), self._sources[part.path])
            row += num_rows

    def _begin(self, source: Source) -> None:
        self._open.close()
        self._path = str(source.path)
        schema = self._schema_of(source)
        vectors = {field.name for field in self._added if pa.types.is_fixed_size_binary(field.type)}
        others = [name for name in schema.names if name not in vectors]
        self._writer = self._open.enter_context(
            pq.ParquetWriter(
                self._target_of(source),
                schema,
                compression={name: "none" if name in vectors else "snappy" for name in schema.names},
                use_dictionary=[name for name in others if name != "example_id"],
                write_statistics=others,
            )
        )
        file = self._open.enter_context(pq.ParquetFile(source.path))
        self._columns = _InOrder(_iter_batches(file, source.path, _ROW_GROUP_ROWS), source.schema)

    def _append(self, added: pa.Table, source: Source) -> None:
        if self._writer is None or self._columns is None:
            return
        for start in range(0, added.num_rows, _ROW_GROUP_ROWS):
            piece = added.slice(start, _ROW_GROUP_ROWS)
            mine = self._columns.take(piece.num_rows)
            _refuse_null_ids(mine, source)
            self._writer.write_table(
                pa.Table.from_arrays([*mine.columns, *piece.columns], schema=self._schema_of(source)),
                row_group_size=_ROW_GROUP_ROWS,
            )

    def _schema_of(self, source: Source) -> pa.Schema:
        return pa.schema([*source.schema, *self._added], metadata=source.schema.metadata)

    def _target_of(self, source: Source) -> Path:
        if not self._as_folder:
            return self._root
        path = self._root / source.place
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _InOrder:
    """Rows of a file, taken in order by number."""

    def __init__(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
        self._batches = batches
        self._schema = schema
        self._held = schema.empty_table()

    def take(self, num_rows: int) -> pa.Table:
        """Give the next rows."""
        while self._held.num_rows < num_rows:
            self._held = pa.concat_tables([self._held, pa.Table.from_batches([next(self._batches)], self._schema)])
        taken, self._held = self._held.slice(0, num_rows), self._held.slice(num_rows)
        return taken


def _refuse_null_ids(rows: pa.Table, source: Source) -> None:
    if rows["example_id"].null_count:
        raise InvalidRowsError(f"{source.path}: example_id is null in some row", code="invalid_rows")


def _put(partial: Path, target: Path) -> None:
    """Put what is whole in its place, instead of what stood there, which goes with the scratch folder.

    What stood there is no scratch before the new is in its place: a kill -9 in between leaves it beside, as `*.old`.
    """
    if partial.is_dir() and target.exists():
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        target.rename(aside)
        partial.rename(target)
        with contextlib.suppress(OSError):  # it was another user's: it stays
            aside.rename(partial.with_name("old"))
        return
    partial.replace(target)


def status_counts(summary: Summary, statuses: Sequence[str]) -> Mapping[str, dict[str, int]]:
    """Give the rows by status, per FM."""
    return {fm: dict(zip(statuses, counts.tolist(), strict=True)) for fm, counts in summary.statuses.items()}
