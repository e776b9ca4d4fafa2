"""Scores that stand in the online store, as chunks of the scored log: what a lost log had of them, word for word.

An example is scored once. Where its score survived online and the log that should have brought it to the table did
not, it is published again as it is: the table then says what lookups have said all along.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import redis
from numpy.typing import NDArray

from das_service.ingest import CHUNK_ROWS
from das_service.logs.records import scored_log
from das_service.logs.streams import Chunk
from das_service.registry import Catalog, FmRecord
from das_service.supervision.online_store import fetch_records
from schemas import keys
from schemas.dataset import TIMESTAMP
from schemas.entries import encode_batch, head_fields
from schemas.snapshot import OutputColumns, scored_schema
from schemas.supervision import SCORED, online_layout
from schemas.tables import event_days


def scores_in_store(
    client: redis.Redis, catalog: Catalog, dataset: str, fm: str, rows: pa.Table
) -> tuple[NDArray[np.bool_], list[Chunk]]:
    """Give which rows have a score in the online store, and these scores as chunks of the FM's scored log.

    rows: of the examples table. A value of another event day is another example's.
    """
    spec, record = catalog.spec(dataset), catalog.fm(dataset, fm)
    if record.outputs is None or rows.num_rows == 0:
        return np.zeros(rows.num_rows, bool), []
    example_ids = rows["example_id"].combine_chunks()
    digest = keys.digest_array(example_ids)
    partitions = keys.partitions_of(digest, spec.partitions)
    records, found = fetch_records(
        client, dataset, fm, online_layout(record.outputs),
        digests=keys.digest_words(digest).view(np.uint8), partitions=partitions,
    )  # fmt: skip
    times = pa.array(np.ascontiguousarray(records["_event_time"])).cast(TIMESTAMP)
    days, asked = (event_days(each, spec.table_granularity) for each in (times, rows["event_time"].combine_chunks()))
    found &= (records["_state"] == SCORED) & (records["_snapshot"] < len(record.snapshots))
    found &= np.asarray(days) == np.asarray(asked)
    chunks = [
        _chunk(catalog, dataset, record, int(partitions[same[0]]), records[same],
               [each.take(pa.array(same)) for each in (example_ids, digest, times)])
        for same in _iter_same_head(records, partitions, np.flatnonzero(found))
    ]  # fmt: skip
    return found, chunks


def _iter_same_head(
    records: NDArray[np.void], partitions: NDArray[np.int64], rows: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """Give rows that can share a chunk: those of one partition, snapshot and scored_at, as many as a chunk may hold."""
    heads = np.stack([partitions[rows], records["_snapshot"][rows], records["_scored_at"][rows]])
    order = np.lexsort(heads)
    cuts = np.flatnonzero((np.diff(heads[:, order]) != 0).any(axis=0)) + 1
    for same in np.split(rows[order], cuts):
        for first in range(0, len(same), CHUNK_ROWS):
            yield same[first : first + CHUNK_ROWS]


def _chunk(
    catalog: Catalog, dataset: str, record: FmRecord, partition: int, records: NDArray[np.void], columns: list[pa.Array]
) -> Chunk:
    """Give records of one partition, snapshot and scored_at as a chunk. columns: id, digest and event_time."""
    outputs, head = record.outputs or OutputColumns(tasks=(), embeddings={}), records[0]
    snapshot_id = record.snapshots[head["_snapshot"]]
    trained_through = catalog.snapshot(dataset, record.fm, snapshot_id).trained_through
    meta = {
        "fm": record.fm,
        "snapshot_id": snapshot_id,
        "trained_through": pa.scalar(trained_through, TIMESTAMP).value,
        "scored_at": int(head["_scored_at"]),
    }
    arrays = [*columns, *(pa.array(np.ascontiguousarray(records[f"{task}__logit"])) for task in outputs.tasks)]
    for name, width in outputs.widths().items():
        packed = pa.py_buffer(np.ascontiguousarray(records[name]))
        arrays.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(records), [None, packed]))
    batch = pa.RecordBatch.from_arrays(arrays, schema=scored_schema(outputs))
    return Chunk(
        dataset=dataset,
        partition=partition,
        kind=scored_log(record.fm),
        data=encode_batch(batch),
        head=head_fields(batch.schema, num_rows=batch.num_rows, num_features=0, meta=meta),
        num_rows=batch.num_rows,
    )
