"""Compaction: many small files of an event day become one, a bounded step at a time, between commits.

The rows of a step's files are copied into one file of about the target size; it is on disk before the commit that puts
it in their place, and that commit is fenced as any other. The replaced files stay readable for the retention.
"""

import datetime as dt
from collections.abc import Iterator, Sequence
from itertools import product

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake.transaction import AddAction, RemoveAction

from das_service.folder import fsync_path
from das_service.settings import MIB
from das_service.tables.durable_table import DurableTable
from das_service.tables.offline_store import (
    ALL_KINDS,
    PARQUET,
    WITH_BOUNDS,
    DataFile,
    DayFiles,
    TablePlace,
    add_action,
    dictionary_columns,
    file_stats,
    in_log_order,
    new_name,
    removed_on_failure,
)
from schemas.tables import EVENT_DAY

_GROUP_ROWS, _GROUP_BYTES = 200_000, 64 * MIB
_BATCH_ROWS = 50_000


class RowCountError(Exception):
    """The copy of some files has another number of rows than they have; it is not used."""


def choose_files(days: DayFiles, *, most_small_files: int, target_bytes: int) -> tuple[dt.date, list[DataFile]] | None:
    """Give an event day and the files of it to put together next; None when no day has too many small files.

    Small is below half of the target. The smallest go first, so that a file is copied a few times at most. Each kind
    of file is put together with its like.
    """
    for day, kind in product(sorted(days), ALL_KINDS):
        alike = (file for file in days[day] if file.kind == kind and file.size_bytes < target_bytes // 2)
        small = sorted(alike, key=lambda file: file.size_bytes)
        if len(small) <= most_small_files:
            continue
        chosen: list[DataFile] = []
        size = 0
        for file in small:
            if chosen and size + file.size_bytes > target_bytes:
                break
            chosen.append(file)
            size += file.size_bytes
        return day, in_log_order(chosen)
    return None


def compact_step(table: DurableTable, *, most_small_files: int, target_bytes: int) -> int:
    """Put the small files of one event day together, durably; give how many files that replaced, 0 if none need it.

    Raises:
        LostOwnershipError: Somebody else has committed; nothing changed.
        RowCountError: A file does not hold what the table says of it.
    """
    found = choose_files(table.days, most_small_files=most_small_files, target_bytes=target_bytes)
    if found is None:
        return 0
    day, files = found
    schema = pa.schema(table.delta.schema().to_arrow())
    schema = schema.remove(schema.get_field_index(EVENT_DAY))
    added = _copy_files(table.place, day, files, schema)
    now = int(dt.datetime.now(dt.UTC).timestamp() * 1000)
    removed = [
        RemoveAction(
            path=file.path,
            data_change=False,
            deletion_timestamp=now,
            size=file.size_bytes,
            partition_values={EVENT_DAY: day.isoformat()},
        )
        for file in files
    ]
    table.replace_files([added], removed)
    return len(files)


def _copy_files(place: TablePlace, day: dt.date, files: Sequence[DataFile], schema: pa.Schema) -> AddAction:
    name = new_name(day, kind=files[0].kind)
    with removed_on_failure(place, [name]):
        return _copy_files_to(place, name, day, files, schema)


def _copy_files_to(
    place: TablePlace, name: str, day: dt.date, files: Sequence[DataFile], schema: pa.Schema
) -> AddAction:
    target = f"{place.root}/{name}"
    bounds = []
    with (
        place.filesystem.open_output_stream(target) as stream,
        pq.ParquetWriter(stream, schema, use_dictionary=dictionary_columns(schema), **PARQUET) as writer,
    ):
        for group in _iter_groups(place, files, schema):
            writer.write_table(group)
            bounds.append(group.select([column for column in WITH_BOUNDS if column in schema.names]))
    known = pa.concat_tables(bounds)
    if known.num_rows != sum(file.num_rows for file in files):
        raise RowCountError(f"{target} has {known.num_rows} rows, the {len(files)} files it was made of have others")
    if place.path is not None:
        fsync_path(place.path / name)
        fsync_path((place.path / name).parent)
    size = place.filesystem.get_file_info(target).size
    return add_action(name, day, size, stats=file_stats(known), data_change=False)


def _iter_groups(place: TablePlace, files: Sequence[DataFile], schema: pa.Schema) -> Iterator[pa.Table]:
    """Give the rows of the files as row groups of a fair size."""
    held: list[pa.Table] = []
    num_rows = num_bytes = 0
    for file in files:
        with place.filesystem.open_input_file(f"{place.root}/{file.path}") as source, pq.ParquetFile(source) as reader:
            for batch in reader.iter_batches(batch_size=_BATCH_ROWS):
                rows = _aligned(batch, schema)
                held.append(rows)
                num_rows += rows.num_rows
                num_bytes += rows.nbytes
                if num_rows >= _GROUP_ROWS or num_bytes >= _GROUP_BYTES:
                    yield pa.concat_tables(held)
                    held, num_rows, num_bytes = [], 0, 0
    if held:
        yield pa.concat_tables(held)


def _aligned(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    """Give the rows in the table's schema: columns that an older file lacks are null."""
    arrays = [
        batch.column(field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
