"""Supervision of examples from the online store: a status for every row, and values where it is present (contract 5).

The first status that applies: failed, leaky (trained_through is after the stored event_time), stale, present; where the
store has no value: pending while the example's partition has entries that the FM has not finished, else missing. A
partition that was found finished is asked again, so that a row scored between the two looks is not called missing. A
value of another event day than the caller's is another example's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import redis
from numpy.typing import NDArray

from das_service.door.columns import binary_rows
from das_service.errors import InvalidRowsError
from das_service.logs.records import EXAMPLES, rescore_log
from das_service.logs.streams import read_counters, read_groups
from das_service.registry import Catalog, FmRecord
from das_service.supervision.online_store import fetch_records
from schemas import keys
from schemas.codecs import FLOAT16_MAX, Codec, decode
from schemas.dataset import TIMESTAMP, DatasetSpec
from schemas.snapshot import OutputColumns
from schemas.supervision import FAILED, OnlineLayout, online_layout
from schemas.tables import event_days

STATUSES = ("present", "pending", "missing", "failed", "leaky", "stale")
_PRESENT, _PENDING, _MISSING, _FAILED, _LEAKY, _STALE = range(6)
_NEVER_US = 2**63 - 1

EmbeddingFormat = Literal["encoded", "float16", "float32"]
Records = NDArray[np.void]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupQuery:
    """What is asked about the rows. outputs: tasks and embeddings wanted, None for all."""

    fms: tuple[str, ...]
    outputs: tuple[str, ...] | None = None
    embedding_format: EmbeddingFormat = "float16"
    max_freshness_gap_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Which examples are asked for. event_time may be absent or have nulls: then any event day will do."""

    example_id: pa.Array
    event_time: pa.Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The answer: one row per row asked, and per FM how many rows have each status."""

    batch: pa.RecordBatch
    counts: Mapping[str, NDArray[np.int64]]


def lookup_rows(client: redis.Redis, catalog: Catalog, dataset: str, rows: Rows, query: LookupQuery) -> Found:
    """Give the supervision of the rows by the FMs, in the order of the rows, repeats included.

    Columns: example_id, then per FM `{fm}__status`, `{fm}__snapshot_id`, `{fm}__trained_through`, `{fm}__scored_at`,
    its logits and embeddings.

    Raises:
        UnknownNameError: The dataset or an FM is not declared.
        InvalidRowsError: An output is not one of any FM's.
        UnknownSnapshotNumberError: The catalog is older than a value; read it again.
    """
    spec = catalog.spec(dataset)
    records = [catalog.fm(dataset, fm) for fm in query.fms]
    _refuse_unknown_outputs(records, query)
    digest = keys.digest_array(rows.example_id)
    digests = keys.digest_words(digest).view(np.uint8)
    asked = _Asked(dataset, spec, digests, keys.partitions_of(digest, spec.partitions), _days(rows, spec))
    fields, arrays = [pa.field("example_id", pa.string())], [rows.example_id]
    counts = {}
    for record in records:
        judged = _judge_fm(client, catalog, record, asked, query)
        counts[record.fm] = np.bincount(judged.status, minlength=len(STATUSES))
        for field, array in _columns_of(judged, record, query):
            fields.append(field)
            arrays.append(array)
    return Found(batch=pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)), counts=counts)


class UnknownSnapshotNumberError(Exception):
    """A value names a snapshot that this catalog does not have yet."""


@dataclass(frozen=True, slots=True)
class _Asked:
    dataset: str
    spec: DatasetSpec
    digests: NDArray[np.uint8]
    partitions: NDArray[np.int64]
    days: NDArray[Any] | None


@dataclass(frozen=True, slots=True)
class _Judged:
    """records are zero where the status is not present: what is not handed out is not in a buffer either."""

    status: NDArray[np.int8]
    records: Records
    layout: OnlineLayout
    snapshots: Sequence[str]
    trained_through_us: NDArray[np.int64]


def _days(rows: Rows, spec: DatasetSpec) -> NDArray[Any] | None:
    """Give each row's event day, NaT where its event_time is null; None where no event_time is given."""
    if rows.event_time is None:
        return None
    days: NDArray[Any] = event_days(rows.event_time, spec.table_granularity).to_numpy(zero_copy_only=False)
    return days


def _refuse_unknown_outputs(records: Sequence[FmRecord], query: LookupQuery) -> None:
    if query.outputs is None or any(record.outputs is None for record in records):
        return
    known = {name for r in records if r.outputs for name in (*r.outputs.tasks, *r.outputs.embeddings)}
    unknown = [name for name in query.outputs if name not in known]
    if unknown:
        raise InvalidRowsError(
            f"no FM asked for has the output {', '.join(unknown)}; there are {', '.join(sorted(known))}",
            code="unknown_output",
        )


def _judge_fm(client: redis.Redis, catalog: Catalog, record: FmRecord, asked: _Asked, query: LookupQuery) -> _Judged:
    outputs = record.outputs or OutputColumns(tasks=(), embeddings={})
    layout = online_layout(outputs)
    trained_through = _trained_through(catalog, asked.dataset, record)
    # Asked before the values: what is absent afterwards from a partition that was finished before is not being scored.
    partitions = sorted(set(asked.partitions.tolist()))
    unfinished = unfinished_partitions(client, asked.dataset, record.fm, partitions)
    records, found = _fetch(client, record.fm, layout, asked)
    waits = np.isin(asked.partitions, list(unfinished))
    if found.any() and int(records["_snapshot"][found].max()) >= len(record.snapshots):
        raise UnknownSnapshotNumberError
    status = judge(records, found, waits, trained_through, query.max_freshness_gap_seconds)
    if len(status) and not (status == _PRESENT).all():
        records[status != _PRESENT] = np.zeros((), layout.record)
    return _Judged(status, records, layout, record.snapshots, trained_through)


def _fetch(client: redis.Redis, fm: str, layout: OnlineLayout, asked: _Asked) -> tuple[Records, Mask]:
    """Give the rows' records and whether each has one of its own event day."""
    records, found = fetch_records(
        client, asked.dataset, fm, layout, digests=asked.digests, partitions=asked.partitions
    )
    if asked.days is None:
        return records, found
    stored = pa.array(np.ascontiguousarray(records["_event_time"])).cast(TIMESTAMP)
    same_day = event_days(stored, asked.spec.table_granularity).to_numpy(zero_copy_only=False) == asked.days
    return records, found & (same_day | np.isnat(asked.days))


def judge(
    records: Records, found: Mask, waits: Mask, trained_through_us: NDArray[np.int64], max_gap_seconds: float | None
) -> NDArray[np.int8]:
    """Give each row's status, an index of STATUSES.

    records has fields _state, _snapshot and _event_time, meant where found; waits: whether a row that is not found may
    yet be scored; trained_through_us by snapshot number. A tie of trained_through and event_time is present.

    Source: docs/contract.md, section 5
    """
    status = np.where(waits, _PENDING, _MISSING).astype(np.int8)
    if not found.any():
        return status
    numbers = np.where(found, records["_snapshot"], 0)
    event_time, trained_through = records["_event_time"], trained_through_us[numbers]
    status[found] = _PRESENT
    if max_gap_seconds is not None:
        gap_us = min(int(max_gap_seconds * 1_000_000), _NEVER_US)
        known = found & (trained_through <= event_time)
        status[known & (event_time - np.where(known, trained_through, event_time) > gap_us)] = _STALE
    status[found & (trained_through > event_time)] = _LEAKY
    status[found & (records["_state"] == FAILED)] = _FAILED
    return status


def _trained_through(catalog: Catalog, dataset: str, record: FmRecord) -> NDArray[np.int64]:
    """Give trained_through by snapshot number in microseconds; a snapshot that does not say it is later than all."""
    known = catalog.snapshots.get(dataset, {}).get(record.fm, {})
    times = [known[name].trained_through if name in known else None for name in record.snapshots]
    return np.array([_NEVER_US if at is None else _microseconds(at) for at in times] or [_NEVER_US], np.int64)


def _microseconds(at: Any) -> int:  # noqa: ANN401 - an aware datetime
    return int(pa.scalar(at, TIMESTAMP).value)


def unfinished_partitions(client: redis.Redis, dataset: str, fm: str, partitions: Sequence[int]) -> set[int]:
    """Give the partitions that have entries which the FM has not finished, among examples or what it scores again."""
    unfinished = set()
    group = keys.group(fm)
    kinds = (EXAMPLES, rescore_log(fm))
    states = {kind: read_groups(client, dataset, partitions, kind) for kind in kinds}
    counters = read_counters(client, dataset, partitions, kinds)
    for kind in kinds:
        for partition in partitions:
            state, counted = states[kind].get(partition, {}).get(group), counters.get((partition, kind))
            if state is None or counted is None or counted.last < 0:
                continue
            at = state.last_delivered
            behind = at.epoch < counted.epoch or (at.epoch == counted.epoch and at.seq < counted.last)
            if state.pending or behind:
                unfinished.add(partition)
    return unfinished


def _columns_of(judged: _Judged, record: FmRecord, query: LookupQuery) -> list[tuple[pa.Field, pa.Array]]:
    """Give an FM's columns, those of its outputs only once it has any."""
    fm, status, records = record.fm, judged.status, judged.records
    present = None if (status == _PRESENT).all() else status == _PRESENT
    columns = [
        (f"{fm}__status", pa.DictionaryArray.from_arrays(pa.array(status), pa.array(STATUSES, pa.string()))),
    ]
    if record.outputs is None:
        return [(pa.field(name, array.type), array) for name, array in columns]
    numbers = records["_snapshot"].astype(np.int32)
    indices = pa.Array.from_buffers(pa.int32(), len(status), [_bitmap(present), pa.py_buffer(numbers)])
    columns.append(
        (f"{fm}__snapshot_id", pa.DictionaryArray.from_arrays(indices, pa.array(judged.snapshots, pa.string())))
    )
    trained_through = np.where(status == _PRESENT, judged.trained_through_us[records["_snapshot"]], 0)
    columns.append((f"{fm}__trained_through", _primitive(trained_through, TIMESTAMP, present)))
    columns.append((f"{fm}__scored_at", _primitive(records["_scored_at"], TIMESTAMP, present)))
    columns += [
        (f"{fm}__{task}__logit", _primitive(records[f"{task}__logit"], pa.float32(), present))
        for task in record.outputs.tasks
        if _is_wanted(task, query)
    ]
    fields = [(pa.field(name, array.type), array) for name, array in columns]
    for name, (size, codec) in record.outputs.embeddings.items():
        if _is_wanted(name, query):
            fields.append(_embedding(f"{fm}__{name}", records[name], size, codec, (present, query.embedding_format)))
    return fields


def _is_wanted(output: str, query: LookupQuery) -> bool:
    return query.outputs is None or output in query.outputs


def _bitmap(present: Mask | None) -> pa.Buffer | None:
    return None if present is None else pa.array(present).buffers()[1]


def _primitive(values: NDArray[Any], kind: pa.DataType, present: Mask | None) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, len(values), [_bitmap(present), data])


def _embedding(
    name: str, packed: NDArray[np.uint8], size: int, codec: Codec, how: tuple[Mask | None, EmbeddingFormat]
) -> tuple[pa.Field, pa.Array]:
    """Give an embedding's column: (B, width) bytes as encoded, or lists of `size` floats."""
    present, wanted = how
    rows = np.ascontiguousarray(packed)
    if wanted == "encoded":
        array = binary_rows(rows.reshape(-1), pa.binary(rows.shape[1]), present)
        return pa.field(name, array.type, metadata={"codec": codec, "size": str(size)}), array
    if wanted == "float16" and codec == "float16":
        values = rows.view("<f2")
    elif wanted == "float16":
        values = np.clip(decode(rows, size, codec), -FLOAT16_MAX, FLOAT16_MAX).astype("<f2")
    else:
        values = decode(rows, size, codec)
    kind = pa.list_(pa.float16() if wanted == "float16" else pa.float32(), size)
    child = pa.Array.from_buffers(kind.value_type, values.size, [None, pa.py_buffer(np.ascontiguousarray(values))])
    array = pa.Array.from_buffers(kind, len(rows), [_bitmap(present)], children=[child])
    return pa.field(name, kind), array
