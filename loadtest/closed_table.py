"""Closed examples of some million rows: `examples`, `closed` and supervision, each committed by the table's own owner.

What a sink would have written once all label windows are over: the same schemas, the same durable marks, ready_seq
without gaps, rows in the order of event_time. Ids are random and features are the workload's.
"""

from datetime import timedelta

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from das_service.folder import Folder
from das_service.logs.records import ready_name
from das_service.tables.durable_table import DurableTable
from loadtest.join import DATASET, FM
from loadtest.supervision_table import OUTPUTS, iter_supervision
from loadtest.workload import SPEC, chunk
from schemas import keys
from schemas.entries import Position
from schemas.tables import (
    CLOSED,
    EVENT_DAY,
    EXAMPLES,
    closed_table_schema,
    examples_table_schema,
    supervision_table,
    supervision_table_schema,
)

_CLOSED_AFTER = timedelta(days=2)


def write_closed(tables: Folder, *, num_rows: int) -> None:
    """Commit num_rows closed examples with features, labels and supervision; the dataset and its FM are declared."""
    schemas = {
        EXAMPLES: examples_table_schema(SPEC),
        supervision_table(FM): supervision_table_schema(OUTPUTS),
        CLOSED: closed_table_schema(SPEC),
    }
    owned = {
        name: DurableTable(
            tables, DATASET, name, schema=schema, partitions=SPEC.partitions, retention_hours=48
        )
        for name, schema in schemas.items()
    }  # fmt: skip
    for table in owned.values():
        table.open(epoch=1)
    ready = np.zeros(SPEC.partitions, np.int64)
    for number, supervision in enumerate(iter_supervision(num_rows)):
        moved = {partition: Position(epoch=1, seq=number) for partition in range(SPEC.partitions)}
        partitions = keys.partitions_of(keys.digest_array(supervision["example_id"].chunk(0)), SPEC.partitions)
        features = chunk(number * supervision.num_rows, supervision.num_rows)
        owned[EXAMPLES].commit(_table(schemas[EXAMPLES], supervision, features), moved)
        owned[supervision_table(FM)].commit(supervision, moved)
        closed = _table(schemas[CLOSED], supervision, _labels(number, partitions, ready))
        numbers = {ready_name(partition): int(seq) for partition, seq in enumerate(ready)}
        owned[CLOSED].commit(closed, {}, numbers=numbers)


def _labels(number: int, partitions: NDArray[np.int64], ready: NDArray[np.int64]) -> pa.Table:
    """Give what `closed` says of a commit's rows; ready is moved on behind them."""
    random = np.random.default_rng(number)
    ready_seq = np.empty(len(partitions), np.int64)
    for partition in range(len(ready)):
        mine = np.flatnonzero(partitions == partition)
        ready_seq[mine] = ready[partition] + np.arange(len(mine))
        ready[partition] += len(mine)
    return pa.table(
        {
            "ready_seq": ready_seq,
            "click": (random.random(len(partitions)) < 0.1).astype(np.float32),
            "buy": pa.array(
                (random.random(len(partitions)) < 0.02).astype(np.float32), mask=random.random(len(partitions)) < 0.5
            ),
            "_partition": partitions.astype(np.int32),
            "_labels_through": np.full(len(partitions), -1),
        }
    )


def _table(schema: pa.Schema, supervision: pa.Table, more: pa.Table) -> pa.Table:
    """Give rows of a table: identity and times as in the supervision, the other columns from `more`."""
    made = {name: more[name] for name in more.column_names}
    made |= {name: supervision[name] for name in ("example_id", "event_time", "log_position", EVENT_DAY)}
    made |= {
        "_example_hash": supervision["_example_hash"],
        "received_at": supervision["event_time"],
        "closed_at": _later(supervision["event_time"]),
        "is_late": pa.array(np.zeros(supervision.num_rows, bool)),
        "content_hash": supervision["_example_hash"],
    }
    return pa.table([made[field.name].cast(field.type) for field in schema], schema=schema)


def _later(times: pa.ChunkedArray) -> pa.Array:
    microseconds = times.cast(pa.int64()).to_numpy() + _CLOSED_AFTER // timedelta(microseconds=1)
    return pa.array(microseconds).cast(times.type)
