"""Supervision of examples from the online store: a status for every row, and values where it is present (contract 5).

The first status that applies: failed, leaky (trained_through is after the stored event_time), stale, present; where the
store has no value: pending while the example's partition has entries that the FM has not finished, else missing. A
partition that was found finished is asked again, so that a row scored between the two looks is not called missing. A
value of another event day than the caller's is another example's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import redis
from numpy.typing import NDArray

from das_service.logs.records import EXAMPLES, rescore_log
from das_service.logs.streams import entries_after, read_counters, read_groups
from das_service.registry import Catalog, FmRecord
from das_service.supervision.answer import (
    PRESENT,
    STATUSES,
    Judged,
    LookupQuery,
    Mask,
    judge,
    refuse_unknown_outputs,
    supervision_columns,
    trained_through_by_number,
)
from das_service.supervision.online_store import fetch_records
from schemas import keys
from schemas.dataset import TIMESTAMP, DatasetSpec
from schemas.snapshot import OutputColumns
from schemas.supervision import OnlineLayout, online_layout
from schemas.tables import event_days

Records = NDArray[np.void]


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
    refuse_unknown_outputs(records, query)
    digest = keys.digest_array(rows.example_id)
    digests = keys.digest_words(digest).view(np.uint8)
    asked = Asked(dataset, spec, digests, keys.partitions_of(digest, spec.partitions), _days(rows, spec))
    fields, arrays = [pa.field("example_id", pa.string())], [rows.example_id]
    counts = {}
    for record in records:
        judged = _judge_fm(client, catalog, record, asked, query)
        counts[record.fm] = np.bincount(judged.status, minlength=len(STATUSES))
        for field, array in supervision_columns(judged, record, query):
            fields.append(field)
            arrays.append(array)
    return Found(batch=pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)), counts=counts)


class UnknownSnapshotNumberError(Exception):
    """A value names a snapshot that this catalog does not have yet."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows as the online store knows them. digests: (B, 16); days: NaT where any will do, None for all rows."""

    dataset: str
    spec: DatasetSpec
    digests: NDArray[np.uint8]
    partitions: NDArray[np.int64]
    days: NDArray[Any] | None


def _days(rows: Rows, spec: DatasetSpec) -> NDArray[Any] | None:
    """Give each row's event day, NaT where its event_time is null; None where no event_time is given."""
    if rows.event_time is None:
        return None
    days: NDArray[Any] = event_days(rows.event_time, spec.table_granularity).to_numpy(zero_copy_only=False)
    return days


def _judge_fm(client: redis.Redis, catalog: Catalog, record: FmRecord, asked: Asked, query: LookupQuery) -> Judged:
    outputs = record.outputs or OutputColumns(tasks=(), embeddings={})
    layout = online_layout(outputs)
    trained_through = trained_through_by_number(catalog, asked.dataset, record)
    # Asked before the values: what is absent afterwards from a partition that was finished before is not being scored.
    partitions = sorted(set(asked.partitions.tolist()))
    unfinished = unfinished_partitions(client, asked.dataset, record.fm, partitions)
    records, found = fetch_values(client, record.fm, layout, asked)
    waits = np.isin(asked.partitions, list(unfinished))
    if found.any() and int(records["_snapshot"][found].max()) >= len(record.snapshots):
        raise UnknownSnapshotNumberError
    status = judge(records, found, waits, trained_through, query.max_freshness_gap_seconds)
    if len(status) and not (status == PRESENT).all():
        records[status != PRESENT] = np.zeros((), layout.record)
    return Judged(status, records, record.snapshots, trained_through)


def fetch_values(client: redis.Redis, fm: str, layout: OnlineLayout, asked: Asked) -> tuple[Records, Mask]:
    """Give the rows' records and whether each has one of its own event day."""
    records, found = fetch_records(
        client, asked.dataset, fm, layout, digests=asked.digests, partitions=asked.partitions
    )
    if asked.days is None:
        return records, found
    stored = pa.array(np.ascontiguousarray(records["_event_time"])).cast(TIMESTAMP)
    same_day = event_days(stored, asked.spec.table_granularity).to_numpy(zero_copy_only=False) == asked.days
    return records, found & (same_day | np.isnat(asked.days))


def unfinished_partitions(client: redis.Redis, dataset: str, fm: str, partitions: Sequence[int]) -> set[int]:
    """Give the partitions that have entries which the FM has not finished, or examples that it has still to be fed."""
    unfinished = set()
    group = keys.group(fm)
    kinds = (EXAMPLES, rescore_log(fm))
    states = {kind: read_groups(client, dataset, partitions, kind) for kind in kinds}
    counters = read_counters(client, dataset, partitions, kinds)
    for kind in kinds:
        for partition in partitions:
            state, counted = states[kind].get(partition, {}).get(group), counters.get((partition, kind))
            if state is None or counted is None:
                continue
            if state.pending or counted.planned or entries_after(state.last_delivered, counted):
                unfinished.add(partition)
    return unfinished
