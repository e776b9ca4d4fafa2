"""The recent labelled slice that gates are measured on: closed examples that a candidate has not trained on.

The most recent rows of `closed` from the candidate's trained_through on, with the features of their examples, an event
day at a time from the last one back, until there are enough. It goes to a file, for a child process to score.
"""

import datetime as dt
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from das_service.folder import Folder
from das_service.sink.table_rows import example_chunk
from das_service.tables.duck import Duck, quoted_path
from das_service.tables.offline_store import TableReader, table_place
from fm_inference.gate import LABEL_PREFIX
from schemas.dataset import DatasetSpec
from schemas.tables import CLOSED, EVENT_DAY, EXAMPLE_HASH, EXAMPLES

QUERY_SECONDS = 60.0
MEMORY_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A written slice: how many rows it has, and the event times between which they lie."""

    rows: int = 0
    first: dt.datetime | None = None
    last: dt.datetime | None = None


def write_slice(
    folder: Folder, dataset: str, spec: DatasetSpec, path: Path, *, since: dt.datetime, most_rows: int
) -> Slice:
    """Write the slice of up to most_rows rows with event_time >= since to an Arrow IPC file.

    Raises:
        OSError: The tables can't be read now, or not within QUERY_SECONDS a day.
    """
    schema = pa.schema(
        [
            *((feature.name, feature.arrow_type) for feature in spec.features),
            *((f"{LABEL_PREFIX}{task.name}", pa.float32()) for task in spec.tasks),
        ]
    )
    times: list[dt.datetime] = []
    num_rows = 0
    duck = Duck(memory_bytes=MEMORY_BYTES, threads=1)
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for rows in _iter_rows(duck, folder, dataset, spec, since, most_rows):
                writer.write_table(_features_and_labels(rows, spec, schema))
                num_rows += rows.num_rows
                times += pc.min_max(rows["event_time"]).as_py().values()
    finally:
        duck.close()
    return Slice(rows=num_rows, first=min(times, default=None), last=max(times, default=None))


def _iter_rows(
    duck: Duck, folder: Folder, dataset: str, spec: DatasetSpec, since: dt.datetime, most_rows: int
) -> Iterator[pa.Table]:
    """Give the rows, those of the last event day first."""
    tables = {name: TableReader(table_place(folder, dataset, name)) for name in (CLOSED, EXAMPLES)}
    for table in tables.values():
        table.refresh()
    left = most_rows
    for day in sorted(tables[CLOSED].days, reverse=True):
        if left <= 0 or day < _first_day(since, spec):
            return
        sources = {name: table.rows_of(table.days.get(day, [])) for name, table in tables.items()}
        rows = _day_rows(duck, sources, spec, since, left)
        left -= rows.num_rows
        if rows.num_rows:
            yield rows


def _first_day(since: dt.datetime, spec: DatasetSpec) -> dt.date:
    """Give a day that no event day with rows since then lies before."""
    return (since - dt.timedelta(days={"day": 0, "week": 7, "month": 31}[spec.table_granularity])).date()


def _day_rows(
    duck: Duck, sources: Mapping[str, list[str] | pads.Dataset], spec: DatasetSpec, since: dt.datetime, most_rows: int
) -> pa.Table:
    """Give the most recent labelled rows of an event day: event_time, features, labels."""
    labels = "".join(f', "{task.name}" AS "{LABEL_PREFIX}{task.name}"' for task in spec.tasks)
    since_us = (since - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)
    with duck.cursor() as cursor, _interrupted(cursor):
        closed, examples = (_source(cursor, name, sources[name]) for name in (CLOSED, EXAMPLES))
        query = (
            f"SELECT e.* EXCLUDE ({EXAMPLE_HASH}), r.* EXCLUDE (_id, _hash, _time) FROM (SELECT example_id AS _id, "  # noqa: S608
            f"{EXAMPLE_HASH} AS _hash, event_time AS _time{labels} FROM {closed} "
            "WHERE epoch_us(event_time) >= $since ORDER BY event_time DESC, example_id LIMIT $most) r "
            f"JOIN {examples} e ON e.{EXAMPLE_HASH} = r._hash AND e.example_id = r._id AND e.event_time = r._time"
        )
        return cursor.sql(query, params={"since": since_us, "most": most_rows}).to_arrow_table()


@contextmanager
def _interrupted(cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """End a query that takes too long.

    Raises:
        OSError: It did, or it needs more memory than it may have.
    """
    timer = threading.Timer(QUERY_SECONDS, cursor.interrupt)
    timer.start()
    try:
        yield
    except (duckdb.InterruptException, duckdb.OutOfMemoryException, duckdb.IOException) as error:
        raise OSError(f"the recent labelled examples can't be read: {error}") from error
    finally:
        timer.cancel()


def _source(cursor: duckdb.DuckDBPyConnection, name: str, files: list[str] | pads.Dataset) -> str:
    if isinstance(files, pads.Dataset):
        cursor.register(f"{name}_files", files)
        return f"{name}_files"
    if not files:
        return f"(SELECT NULL::VARCHAR AS example_id, NULL::BIGINT AS {EXAMPLE_HASH}, NULL::TIMESTAMPTZ AS event_time)"
    paths = ", ".join(map(quoted_path, files))
    options = f"union_by_name = true, hive_partitioning = true, hive_types = {{'{EVENT_DAY}': DATE}}"
    return f"read_parquet([{paths}], {options})"


def _features_and_labels(rows: pa.Table, spec: DatasetSpec, schema: pa.Schema) -> pa.Table:
    """Give the rows as models take them: features that older files lack are null."""
    chunk = example_chunk(rows, spec)
    names = set(chunk.schema.names)
    columns = [chunk.column(name) if name in names else rows[name].cast(pa.float32()) for name in schema.names]
    return pa.table(columns, schema=schema)
