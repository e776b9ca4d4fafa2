"""Tables written as the sink writes them, callers' tables in all their forms, and the offline join in plain Python."""

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from das_service.folder import Folder
from das_service.registry import Catalog, FmRecord, SnapshotRecord
from das_service.supervision.windows import BatchRows, FileRows
from das_service.tables.durable_table import DurableTable
from schemas import keys
from schemas.codecs import FLOAT16_MAX, Codec, decode, encoded_width
from schemas.dataset import TIMESTAMP, DatasetSpec
from schemas.entries import Position
from schemas.snapshot import OutputColumns
from schemas.tables import (
    dead_letters_table,
    dead_letters_table_schema,
    event_days,
    supervision_table,
    supervision_table_schema,
)

SECOND_US = 1_000_000
DAY_US = 86_400 * SECOND_US
BASE = dt.datetime(2026, 2, 27, tzinfo=dt.UTC)  # a Friday, two days before a month ends
BASE_US = int(BASE.timestamp()) * SECOND_US
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class Said(NamedTuple):
    """A row of supervision; its logits and embeddings are known functions of `number`. hash_of: whose hash it has."""

    example_id: str
    event_time: int
    snapshot_id: str
    scored_at: int
    number: int
    hash_of: str | None = None
    is_backfill: bool = False


class Failed(NamedTuple):
    """A dead letter."""

    example_id: str
    event_time: int


@dataclass(frozen=True)
class Fm:
    """An FM with its snapshots, in the order of their registration, and what its tables hold, commit by commit."""

    name: str
    outputs: OutputColumns
    trained_through: Mapping[str, int]
    said: Sequence[Sequence[Said]] = ()
    failed: Sequence[Sequence[Failed]] = ()


def moment(microseconds: int) -> dt.datetime:
    return EPOCH + dt.timedelta(microseconds=microseconds)


def catalog_of(spec: DatasetSpec, fms: Sequence[Fm], *, dataset: str = "ads") -> Catalog:
    """Give a registry in which these FMs have validated snapshots."""
    records = {
        fm.name: FmRecord(fm=fm.name, required=True, outputs=fm.outputs, snapshots=tuple(fm.trained_through))
        for fm in fms
    }
    snapshots = {
        fm.name: {
            name: SnapshotRecord(
                snapshot_id=name, uri="/nowhere", sha256="0" * 64, state="validated",
                trained_through=moment(through), registered_at=BASE,
            )
            for name, through in fm.trained_through.items()
        }
        for fm in fms
    }  # fmt: skip
    return Catalog(revision=1, datasets={dataset: spec}, fms={dataset: records}, snapshots={dataset: snapshots})


def logit_of(fm: Fm, task: str, number: int) -> float:
    """Give a logit that float32 holds exactly and that no other output of the row shares."""
    return number + 0.25 * fm.outputs.tasks.index(task)


def embedding_of(fm: Fm, name: str, number: int) -> bytes:
    """Give an embedding's bytes; every byte depends on the row."""
    size, codec = fm.outputs.embeddings[name]
    width = encoded_width(size, codec)
    if codec in {"float32", "float16"}:
        kind = "<f4" if codec == "float32" else "<f2"
        return (np.arange(size) + number % 1000).astype(kind).tobytes()
    plain = ((np.arange(width) + number) % 256).astype(np.uint8)
    if codec == "int8":
        plain[:4] = np.frombuffer(np.float32(0.5 + number % 7).tobytes(), np.uint8)
    return plain.tobytes()


def write_tables(folder: Folder, spec: DatasetSpec, fm: Fm, *, dataset: str = "ads") -> list[DurableTable]:
    """Write an FM's tables through their owner, a commit at a time; a table without commits is not made."""
    made = []
    for name, schema, commits in (
        (supervision_table(fm.name), supervision_table_schema(fm.outputs), [_said_rows(fm, c) for c in fm.said]),
        (dead_letters_table(fm.name), dead_letters_table_schema(), [_failed_rows(c) for c in fm.failed]),
    ):
        if not commits:
            continue
        table = DurableTable(folder, dataset, name, schema=schema, partitions=spec.partitions, retention_hours=24)
        table.open(epoch=1)
        for number, columns in enumerate(commits):
            rows = table_rows(columns, schema, spec)
            table.commit(rows, {0: Position(epoch=1, seq=number)})
        made.append(table)
    return made


def table_rows(columns: dict[str, Any], schema: pa.Schema, spec: DatasetSpec) -> pa.Table:
    """Give rows of a table with the columns that the sink makes itself."""
    times = pa.array(columns["event_time"], pa.int64()).cast(TIMESTAMP)
    hash_of = columns.pop("hash_of", columns["example_id"])
    made = {
        "_is_backfill": np.zeros(len(times), np.bool_),
        **columns,
        "event_time": times,
        "log_position": np.arange(len(times)),
        "event_day": event_days(times, spec.table_granularity),
        "_example_hash": keys.example_hashes(keys.digest_array(pa.array(hash_of, pa.string()))),
        "_is_shadow": np.zeros(len(times), np.bool_),
    }
    arrays = [made[field.name] for field in schema]
    arrays = [array if isinstance(array, pa.Array) else pa.array(array) for array in arrays]
    return pa.Table.from_arrays(
        [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)], schema=schema
    )


def _said_rows(fm: Fm, said: Sequence[Said]) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "example_id": pa.array([row.example_id for row in said], pa.string()),
        "event_time": [row.event_time for row in said],
        "snapshot_id": [row.snapshot_id for row in said],
        "trained_through": pa.array([fm.trained_through[row.snapshot_id] for row in said], pa.int64()),
        "scored_at": pa.array([row.scored_at for row in said], pa.int64()),
        "available_at": pa.array([row.scored_at + SECOND_US for row in said], pa.int64()),
        "hash_of": [row.hash_of or row.example_id for row in said],
        "_is_backfill": [row.is_backfill for row in said],
    }
    columns |= {f"{task}__logit": [logit_of(fm, task, row.number) for row in said] for task in fm.outputs.tasks}
    columns |= {name: [embedding_of(fm, name, row.number) for row in said] for name in fm.outputs.embeddings}
    return columns


def _failed_rows(failed: Sequence[Failed]) -> dict[str, Any]:
    return {
        "example_id": pa.array([row.example_id for row in failed], pa.string()),
        "event_time": [row.event_time for row in failed],
        "snapshot_id": ["s"] * len(failed),
        "failed_at": pa.array([row.event_time for row in failed], pa.int64()),
        "reason": ["boom"] * len(failed),
    }


# ---- the reference


def day_of(microseconds: int, granularity: str) -> dt.date:
    """Give the event day, week (its Monday) or month (its first)."""
    day = moment(microseconds).date()
    if granularity == "week":
        return day - dt.timedelta(days=day.weekday())
    return day.replace(day=1) if granularity == "month" else day


def judge_row(fm: Fm, spec: DatasetSpec, row: tuple[str, int], gap_seconds: float | None) -> tuple[str, Said | None]:
    """Give a row's status and the supervision that it is handed, without an online store.

    As contract 5 has it, save that a dead letter counts only where nothing was said: what a backfill says goes first.
    """
    example = (row[0], day_of(row[1], spec.table_granularity))

    def is_it(other: Said | Failed) -> bool:
        return (other.example_id, day_of(other.event_time, spec.table_granularity)) == example

    said = [other for commit in fm.said for other in commit if is_it(other)]
    if not said:
        return ("failed" if any(is_it(other) for commit in fm.failed for other in commit) else "missing"), None
    valid = [other for other in said if fm.trained_through[other.snapshot_id] <= other.event_time]
    if not valid:
        return "leaky", None
    first = min(valid, key=lambda other: (other.scored_at, other.snapshot_id))
    if gap_seconds is not None and first.event_time - fm.trained_through[first.snapshot_id] > gap_seconds * SECOND_US:
        return "stale", None
    return "present", first


def expected_row(
    fm: Fm, spec: DatasetSpec, row: tuple[str, int], *, gap_seconds: float | None, form: str, outputs: Sequence[str]
) -> dict[str, Any]:
    """Give all columns of an FM that a caller's row shall have."""
    status, said = judge_row(fm, spec, row, gap_seconds)
    made: dict[str, Any] = {
        "status": status,
        "snapshot_id": said and said.snapshot_id,
        "trained_through": said and moment(fm.trained_through[said.snapshot_id]),
        "scored_at": said and moment(said.scored_at),
    }
    for task in fm.outputs.tasks:
        if task in outputs:
            made[f"{task}__logit"] = None if said is None else logit_of(fm, task, said.number)
    for name, (size, codec) in fm.outputs.embeddings.items():
        if name in outputs:
            made[name] = (
                None if said is None else plain_embedding(embedding_of(fm, name, said.number), size, codec, form)
            )
    return {f"{fm.name}__{name}": value for name, value in made.items()}


def plain_embedding(packed: bytes, size: int, codec: Codec, form: str) -> bytes | list[float]:
    """Give an embedding in the form that a caller asked for."""
    if form == "encoded":
        return packed
    values = decode(np.frombuffer(packed, np.uint8).reshape(1, -1), size, codec)[0]
    if form == "float16":
        values = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
    return [float(value) for value in values]


# ---- callers' tables


def caller_table(
    rows: Sequence[tuple[str, int]], *, id_type: pa.DataType | None = None, time_type: pa.DataType = TIMESTAMP
) -> pa.Table:
    """Give a caller's rows with a column of its own; times are cut to the unit of time_type."""
    ids = pa.array([row[0] for row in rows], pa.string())
    times = pa.array([row[1] for row in rows], pa.int64()).cast(TIMESTAMP)
    return pa.table(
        {
            "mine": np.arange(len(rows)),
            "event_time": times.cast(time_type, safe=False),
            "example_id": ids if id_type is None else ids.cast(id_type),
        }
    )


def _microseconds(column: pa.ChunkedArray | pa.Array) -> Any:
    return np.asarray(column.cast(TIMESTAMP).cast(pa.int64()).to_numpy(zero_copy_only=False), np.int64)


def batches_of(table: pa.Table, *, batch_rows: int) -> Iterator[BatchRows]:
    """Give a table as Arrow batches."""
    for batch in table.to_batches(max_chunksize=batch_rows):
        yield BatchRows(batch=batch, event_time=_microseconds(batch.column("event_time")))


def files_of(
    table: pa.Table, paths: Sequence[Path], *, group_rows: int, part_rows: int | None = None
) -> Iterator[FileRows]:
    """Write a table into these files, about equal shares of it in their order, and give its rows.

    part_rows: rows of a part, whatever the row groups; default: a part per row group.
    """
    share = -(-table.num_rows // len(paths)) if table.num_rows else 0
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = table.slice(number * share, share)
        pq.write_table(mine, path, row_group_size=group_rows)
        event_time = _microseconds(mine["event_time"])
        step = part_rows or group_rows
        for first in range(0, mine.num_rows, step):
            yield FileRows(path=str(path), first=first, event_time=event_time[first : first + step])
