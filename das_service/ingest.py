"""Valid rows, examples or labels, into their log: by partition, in chunks, in one round trip, on disk at its end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import redis

from das_service.door.validation import ValidRows
from das_service.errors import InvalidRowsError, TooLargeError
from das_service.logs.log_guard import Floor
from das_service.logs.records import EXAMPLES
from das_service.logs.streams import Appended, AppendLimits, Chunk, append_chunks
from das_service.metrics import Metrics
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.entries import TRACEPARENT, encode_batch, fingerprint, head_fields

CHUNK_ROWS = 5_000
CHUNK_BYTES = 4 * 1024 * 1024


def encode_chunks(
    dataset: str, spec: DatasetSpec, batch: pa.RecordBatch, *, kind: str = EXAMPLES, traceparent: str | None = None
) -> list[Chunk]:
    """Give the batch (the schema of that kind of log) as chunks of its partitions, rows in their order.

    traceparent goes with each of them; a repeat of a request is recognised whatever it says.

    Raises:
        TooLargeError: One row alone is larger than a chunk may be.
    """
    chunks = []
    num_features = len(spec.features) if kind == EXAMPLES else 0
    meta = {} if traceparent is None else {TRACEPARENT: traceparent}
    stamp = fingerprint(batch.schema)
    for partition, part in split_by_partition(batch, spec.partitions):
        for piece, data in _iter_pieces(part):
            head = head_fields(stamp, num_rows=piece, num_features=num_features, meta=meta)
            chunks.append(Chunk(dataset=dataset, partition=partition, kind=kind, data=data, head=head, num_rows=piece))
    return chunks


def split_by_partition(batch: pa.RecordBatch, num_partitions: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Give (partition, its rows in their order) for the partitions that have any; partitions ascend."""
    if batch.num_rows == 0:
        return
    if num_partitions == 1:
        yield 0, batch
        return
    partitions = keys.partitions_of(batch.column("example_digest"), num_partitions).astype(np.uint16)
    order = np.argsort(partitions, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(partitions, minlength=num_partitions))])
    ordered = pc.take(batch, pa.array(order), boundscheck=False)
    for partition in range(num_partitions):
        first, last = int(bounds[partition]), int(bounds[partition + 1])
        if last > first:
            yield partition, ordered.slice(first, last - first)


def _iter_pieces(batch: pa.RecordBatch) -> Iterator[tuple[int, memoryview]]:
    """Give (rows, encoded) of pieces that are within a chunk's bounds."""
    for first in range(0, batch.num_rows, CHUNK_ROWS):
        piece = batch.slice(first, CHUNK_ROWS)
        data = encode_batch(piece)
        if len(data) <= CHUNK_BYTES:
            yield piece.num_rows, data
        elif piece.num_rows == 1:
            raise TooLargeError(f"one row alone takes {len(data)} bytes; a chunk of the log may take {CHUNK_BYTES}")
        else:
            half = piece.num_rows // 2
            yield from _iter_pieces(piece.slice(0, half))
            yield from _iter_pieces(piece.slice(half))


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of a request's rows."""

    accepted: int
    repeated: int
    positions: dict[int, int]


def append_rows(
    client: redis.Redis, spec: DatasetSpec, chunks: Sequence[Chunk], *, floor: Floor, max_bytes: int
) -> Receipt:
    """Append chunks and give the receipt once the server has them on disk.

    max_bytes bounds what lies in the log of one partition.

    Raises:
        DasError: A chunk was refused; others may be on disk, and a repeat of the request finds them.
    """
    limits = AppendLimits(
        epoch=floor.epoch,
        floors=floor.committed(chunks[0].kind) if chunks else {},
        max_bytes=max_bytes,
        dedup_seconds=spec.dedup_window_seconds,
    )
    appended = append_chunks(client, chunks, limits)
    return Receipt(
        accepted=sum(chunk.num_rows for chunk in chunks),
        repeated=sum(chunk.num_rows for chunk, at in zip(chunks, appended, strict=True) if at.repeated),
        positions=_last_positions(chunks, appended),
    )


def _last_positions(chunks: Sequence[Chunk], appended: Sequence[Appended]) -> dict[int, int]:
    last: dict[int, int] = {}
    for chunk, at in zip(chunks, appended, strict=True):
        last[chunk.partition] = max(at.position.number, last.get(chunk.partition, -1))
    return last


def are_refused(rows: ValidRows, *, abort: bool) -> bool:
    """Give whether nothing may be stored: no row is good, or one is bad and the caller wants all or none."""
    return rows.num_refused > 0 and (abort or rows.batch.num_rows == 0)


def refuse_bad_rows(rows: ValidRows, *, abort: bool) -> None:
    """Raise if nothing may be stored.

    Raises:
        InvalidRowsError: invalid_rows, with the body of contract 3.
    """
    if not are_refused(rows, abort=abort):
        return
    total = rows.num_refused + rows.batch.num_rows
    rule = "on_error=abort stores all rows or none" if abort else "none of them may be stored"
    raise InvalidRowsError(
        f"{rows.num_refused} of {total} rows are refused, and {rule}", code="invalid_rows",
        extra=answer_body(rows, Receipt(accepted=0, repeated=0, positions={}), rejected=total),
    )  # fmt: skip


def answer_body(rows: ValidRows, receipt: Receipt, *, rejected: int) -> dict[str, Any]:
    """Give the body of contract 3."""
    return {
        "accepted": receipt.accepted,
        "rejected": rejected,
        "errors": rows.errors,
        "errors_truncated": rows.errors_truncated,
        "positions": {str(partition): number for partition, number in sorted(receipt.positions.items())},
    }


def count_rows(metrics: Metrics, dataset: str, rows: ValidRows, receipt: Receipt) -> None:
    """Count a request's rows by what became of them."""
    metrics.ingest_rows.labels(dataset, "accepted", "").inc(receipt.accepted - receipt.repeated)
    if receipt.repeated:
        metrics.ingest_rows.labels(dataset, "repeated", "").inc(receipt.repeated)
        metrics.duplicates.labels(dataset).inc(receipt.repeated)
    count_refused(metrics, dataset, rows)


def count_refused(metrics: Metrics, dataset: str, rows: ValidRows) -> None:
    """Count refused rows by their reason."""
    for code, number in rows.refused_by_code.items():
        metrics.ingest_rows.labels(dataset, "rejected", code).inc(number)
