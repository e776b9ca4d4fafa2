"""What the entries of a log become in its table: one function per kind of table. No I/O.

`is_late` is set by watermarks.py, which knows what came before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from das_service.sink.identity import EXAMPLE, LABEL, Key
from schemas import keys
from schemas.dataset import TIMESTAMP, DatasetSpec, example_schema, label_schema
from schemas.entries import Entry
from schemas.hashing import content_hash
from schemas.snapshot import OutputColumns, scored_schema
from schemas.tables import (
    EVENT_DAY,
    EXAMPLE_HASH,
    IS_BACKFILL,
    IS_SHADOW,
    LABEL_HASH,
    LOG_ROW,
    dead_letters_table_schema,
    dead_schema,
    event_days,
    examples_table_schema,
    labels_table_schema,
    supervision_table_schema,
)


class NewerSchemaError(Exception):
    """An entry has features that this reader's declaration of the dataset does not know yet."""


def example_rows(entries: Sequence[Entry], spec: DatasetSpec) -> pa.Table:
    """Give the rows of `examples`, in the order of the entries; features that an older entry lacks are null.

    Raises:
        NewerSchemaError: An entry has more features than spec.
        EntryError: An entry is damaged or was written with another schema.
    """
    columns = pa.concat_tables([_padded(list(run), spec) for _, run in groupby(entries, lambda e: e.num_features)])
    schema = examples_table_schema(spec)
    made = _made_columns(columns, entries, spec.table_granularity)
    made |= {
        "received_at": _per_entry_times(entries, [entry.taken_at_us for entry in entries]),
        "is_late": pa.array(np.zeros(columns.num_rows, bool)),
        "content_hash": pa.array(content_hash(columns, [feature.name for feature in spec.features])),
    }
    return _table(schema, columns, made)


def supervision_rows(entries: Sequence[Entry], outputs: OutputColumns, granularity: str) -> pa.Table:
    """Give the rows of `supervision/<fm>`, in the order of the entries.

    Raises:
        EntryError: An entry is damaged or was written with another schema.
    """
    schema = scored_schema(outputs)
    columns = pa.Table.from_batches([entry.batch(schema) for entry in entries], schema=schema).combine_chunks()
    made = _made_columns(columns, entries, granularity)
    made |= {
        "snapshot_id": _per_entry(entries, pa.array([entry.meta["snapshot_id"] for entry in entries], pa.string())),
        "trained_through": _per_entry_times(entries, [entry.meta["trained_through"] for entry in entries]),
        "scored_at": _per_entry_times(entries, [entry.meta["scored_at"] for entry in entries]),
        "available_at": _per_entry_times(entries, [entry.taken_at_us for entry in entries]),
        IS_SHADOW: _per_entry(entries, pa.array([entry.is_shadow for entry in entries], pa.bool_())),
        IS_BACKFILL: _per_entry(entries, pa.array([entry.is_backfill for entry in entries], pa.bool_())),
    }
    return _table(supervision_table_schema(outputs), columns, made)


def label_rows(entries: Sequence[Entry], spec: DatasetSpec) -> pa.Table:
    """Give the rows of `labels`, in the order of the entries.

    Raises:
        EntryError: An entry is damaged or was written with another schema.
    """
    schema = label_schema(spec)
    columns = pa.Table.from_batches([entry.batch(schema) for entry in entries], schema=schema).combine_chunks()
    made = _made_columns(columns, entries, spec.table_granularity, time="label_time")
    said = columns.append_column("_time", columns["label_time"].cast(pa.int64()))
    said = said.append_column("_example", pa.array(made[EXAMPLE_HASH]))
    made |= {
        "received_at": _per_entry_times(entries, [entry.taken_at_us for entry in entries]),
        LABEL_HASH: pa.array(content_hash(said, ["_example", "_time", *(task.name for task in spec.tasks)])),
        LOG_ROW: pa.array(np.concatenate([np.arange(entry.num_rows, dtype=np.int32) for entry in entries])),
    }
    return _table(labels_table_schema(spec), columns, made)


def dead_letter_rows(entries: Sequence[Entry], granularity: str) -> pa.Table:
    """Give the rows of `dead_letters/<fm>`, in the order of the entries.

    Raises:
        EntryError: An entry is damaged or was written with another schema.
    """
    schema = dead_schema()
    columns = pa.Table.from_batches([entry.batch(schema) for entry in entries], schema=schema).combine_chunks()
    made = _made_columns(columns, entries, granularity)
    made |= {
        "snapshot_id": _per_entry(entries, pa.array([entry.meta["snapshot_id"] for entry in entries], pa.string())),
        "failed_at": _per_entry_times(entries, [entry.meta["failed_at"] for entry in entries]),
    }
    return _table(dead_letters_table_schema(), columns, made)


def example_chunk(rows: pa.Table, spec: DatasetSpec) -> pa.RecordBatch:
    """Give rows of `examples` as the chunk that they came in with; features that they lack are null."""
    schema = example_schema(spec)
    arrays = []
    for field in schema:
        if field.name == "example_digest":
            arrays.append(keys.digest_array(_one(rows["example_id"])))
        elif field.name in rows.column_names:
            arrays.append(_one(rows[field.name]).cast(field.type))
        else:
            arrays.append(pa.nulls(rows.num_rows, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _example_schema(entry: Entry, spec: DatasetSpec) -> pa.Schema:
    if entry.num_features > len(spec.features):
        raise NewerSchemaError(f"entry {entry.position.entry_id} has {entry.num_features} features")
    return example_schema(spec, num_features=entry.num_features)


def _padded(entries: Sequence[Entry], spec: DatasetSpec) -> pa.Table:
    schema = _example_schema(entries[0], spec)
    columns = pa.Table.from_batches([entry.batch(schema) for entry in entries], schema=schema).combine_chunks()
    for field in list(example_schema(spec))[len(schema) :]:
        columns = columns.append_column(field, pa.nulls(columns.num_rows, field.type))
    return columns


def _made_columns(
    columns: pa.Table, entries: Sequence[Entry], granularity: str, *, time: str = "event_time"
) -> dict[str, pa.Array]:
    digests = _one(columns["example_digest"])
    return {
        "log_position": pa.array(np.repeat([entry.position.number for entry in entries], _sizes(entries))),
        EVENT_DAY: event_days(_one(columns[time]), granularity),
        EXAMPLE_HASH: pa.array(keys.example_hashes(digests)),
    }


def _table(schema: pa.Schema, columns: pa.Table, made: dict[str, pa.Array]) -> pa.Table:
    arrays = []
    for field in schema:
        column = made[field.name] if field.name in made else columns[field.name]
        arrays.append(column if column.type == field.type else pc.cast(column, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _per_entry(entries: Sequence[Entry], values: pa.Array) -> pa.Array:
    return values.take(pa.array(np.repeat(np.arange(len(entries)), _sizes(entries))))


def _per_entry_times(entries: Sequence[Entry], microseconds: Sequence[int]) -> pa.Array:
    return pa.array(np.repeat(np.array(microseconds, np.int64), _sizes(entries))).cast(TIMESTAMP)


def _sizes(entries: Sequence[Entry]) -> NDArray[np.int64]:
    return np.array([entry.num_rows for entry in entries], np.int64)


def _one(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


@dataclass(frozen=True, slots=True, kw_only=True)
class TableContent:
    """What a table holds and how a log's entries become its rows. lateness_us: of examples, how late they may be."""

    schema: pa.Schema
    granularity: str
    entry_schema: Callable[[Entry], pa.Schema]
    rows_of: Callable[[Sequence[Entry]], pa.Table]

    key: Key = EXAMPLE
    lateness_us: int | None = None

    def event_days_of(self, entry: Entry) -> set[int]:
        """Give the event days of an entry's rows, as days since 1970.

        Raises:
            EntryError: The entry is damaged or was written with another schema.
            NewerSchemaError: It has features that are not known here yet.
        """
        times = entry.batch(self.entry_schema(entry)).column(self.key.time)
        return set(np.unique(event_days(times, self.granularity).cast(pa.int32()).to_numpy()).tolist())


def examples_content(spec: DatasetSpec) -> TableContent:
    """Give what `examples` holds."""
    return TableContent(
        schema=examples_table_schema(spec),
        granularity=spec.table_granularity,
        entry_schema=lambda entry: _example_schema(entry, spec),
        rows_of=lambda entries: example_rows(entries, spec),
        lateness_us=spec.allowed_lateness_seconds * 1_000_000,
    )


def labels_content(spec: DatasetSpec) -> TableContent:
    """Give what `labels` holds."""
    return TableContent(
        schema=labels_table_schema(spec),
        granularity=spec.table_granularity,
        entry_schema=lambda _: label_schema(spec),
        rows_of=lambda entries: label_rows(entries, spec),
        key=LABEL,
    )


def supervision_content(outputs: OutputColumns, granularity: str) -> TableContent:
    """Give what `supervision/<fm>` holds."""
    return TableContent(
        schema=supervision_table_schema(outputs),
        granularity=granularity,
        entry_schema=lambda _: scored_schema(outputs),
        rows_of=lambda entries: supervision_rows(entries, outputs, granularity),
    )


def dead_letters_content(granularity: str) -> TableContent:
    """Give what `dead_letters/<fm>` holds."""
    return TableContent(
        schema=dead_letters_table_schema(),
        granularity=granularity,
        entry_schema=lambda _: dead_schema(),
        rows_of=lambda entries: dead_letter_rows(entries, granularity),
    )
