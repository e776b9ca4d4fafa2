"""Supervision of some million examples, committed by the table's own owner, and the Parquet files of a caller."""

import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import redis
from numpy.typing import NDArray

from das_service.folder import Folder
from das_service.registry import FmRecord, Registry, SnapshotRecord, dataset_field, fm_field, snapshot_field
from das_service.tables.durable_table import DurableTable
from loadtest.join import DATASET, FM
from loadtest.workload import SPEC, START, START_US
from schemas import keys
from schemas.dataset import TIMESTAMP, DatasetSpec
from schemas.snapshot import OutputColumns
from schemas.tables import IS_BACKFILL, IS_SHADOW, event_days, supervision_table, supervision_table_schema

COMMIT_ROWS = 250_000
NUM_DAYS = 7
SNAPSHOT = "snapshot-0001"
_DAY_US = 86_400_000_000
_ROW_GROUP_ROWS = 500_000
OUTPUTS = OutputColumns(tasks=("click", "buy"), embeddings={"hidden": (64, "float16")})


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerFiles:
    """A trainer's rows: all examples of the table, once in the order of time and once in a random one."""

    in_time_order: Path
    in_random_order: Path


def declare(client: redis.Redis, tables: Folder) -> None:
    """Declare the dataset, and an FM with an active snapshot that no worker had to validate."""
    registry = Registry(client, tables)
    record = FmRecord(fm=FM, required=False, snapshots=(SNAPSHOT,), active=SNAPSHOT, outputs=OUTPUTS)
    snapshot = SnapshotRecord(
        snapshot_id=SNAPSHOT,
        uri="nowhere",
        sha256="0" * 64,
        state="validated",
        trained_through=START,
        registered_at=datetime.now(UTC),
    )
    registry.change(dataset_field(DATASET), DatasetSpec, lambda _: SPEC)
    registry.change(fm_field(DATASET, FM), FmRecord, lambda _: record)
    registry.change(snapshot_field(DATASET, FM, SNAPSHOT), SnapshotRecord, lambda _: snapshot)


def write(tables: Folder, folder: Path, *, num_rows: int) -> CallerFiles:
    """Commit supervision of num_rows examples over NUM_DAYS event days; write the caller's files."""
    table = DurableTable(
        tables,
        DATASET,
        supervision_table(FM),
        schema=supervision_table_schema(OUTPUTS),
        partitions=SPEC.partitions,
        retention_hours=48,
    )
    table.open(epoch=1)
    ids, times = [], []
    for rows in iter_supervision(num_rows):
        table.commit(rows, {})
        ids.append(rows["example_id"].chunk(0))
        times.append(rows["event_time"].chunk(0))
    caller = pa.table({"example_id": pa.chunked_array(ids), "event_time": pa.chunked_array(times)})
    random = np.random.default_rng(1)
    caller = caller.append_column("label", pa.array(random.integers(0, 2, num_rows).astype(np.int8)))
    caller = caller.append_column("price", pa.array(random.standard_normal(num_rows, np.float32)))
    files = CallerFiles(in_time_order=folder / "by-time.parquet", in_random_order=folder / "random.parquet")
    pq.write_table(caller, files.in_time_order, row_group_size=_ROW_GROUP_ROWS)
    caller = caller.take(pa.array(random.permutation(num_rows)))
    pq.write_table(caller, files.in_random_order, row_group_size=_ROW_GROUP_ROWS)
    return files


def iter_supervision(num_rows: int) -> Iterator[pa.Table]:
    """Give the rows of each commit, in the order of event_time; ids are random."""
    random = np.random.default_rng(0)
    schema = supervision_table_schema(OUTPUTS)
    for first in range(0, num_rows, COMMIT_ROWS):
        count = min(COMMIT_ROWS, num_rows - first)
        ids = _fixed_width(pa.string(), binascii.hexlify(random.bytes(16 * count)), 32)
        event_us = START_US + np.arange(first, first + count) * (NUM_DAYS * _DAY_US // num_rows)
        event_time = _times(event_us)
        columns = {
            "example_id": ids,
            "event_time": event_time,
            "snapshot_id": pa.repeat(SNAPSHOT, count),
            "trained_through": _times(np.full(count, START_US)),
            "scored_at": _times(event_us + 1_000_000),
            "available_at": _times(event_us + 2_000_000),
            "log_position": pa.array(np.full(count, first // COMMIT_ROWS)),
            "event_day": event_days(event_time, "day"),
            "click__logit": pa.array(random.standard_normal(count, np.float32)),
            "buy__logit": pa.array(random.standard_normal(count, np.float32)),
            "hidden": _fixed_width(pa.binary(), random.bytes(128 * count), 128),
            **dict.fromkeys((IS_SHADOW, IS_BACKFILL), pa.array(np.zeros(count, bool))),
            "_example_hash": pa.array(keys.example_hashes(keys.digest_array(ids))),
        }
        yield pa.table([columns[field.name] for field in schema], schema=schema)


def _fixed_width(kind: pa.DataType, blob: bytes, width: int) -> pa.Array:
    offsets = np.arange(len(blob) // width + 1, dtype=np.int32) * width
    return pa.Array.from_buffers(kind, len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(blob)])


def _times(microseconds: NDArray[np.int64]) -> pa.Array:
    return pa.array(microseconds).cast(TIMESTAMP)
