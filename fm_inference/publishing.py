"""The worker's atomic step: what one entry's rows became, in one script on the entry's slot (lua/publish.lua)."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
import redis
from numpy.typing import NDArray

from das_service.logs.records import dead_log, scored_log
from das_service.redis_client import Argument, ScriptCall, run_script, run_scripts, script
from fm_inference.delivery import Delivery
from fm_inference.engine import Scored
from schemas import keys
from schemas.entries import BACKFILL, SHADOW, encode_batch, head_fields
from schemas.snapshot import OutputColumns, scored_schema
from schemas.supervision import FAILED, OnlineLayout, online_layout, pack_values
from schemas.tables import dead_schema

IDENTITY = ("example_id", "example_digest", "event_time")


class Published(IntEnum):
    """What the script says."""

    DONE = 1
    NOT_OURS = 0
    WITHDRAWN = -1
    LOST = -2
    OTHER_EPOCH = -3


@dataclass(frozen=True, slots=True, kw_only=True)
class Publisher:
    """Everything about one snapshot's publishing that does not change from entry to entry."""

    dataset: str
    fm: str
    consumer: str
    snapshot_id: str
    snapshot_number: int
    trained_through_us: int
    generation: int
    epoch: int
    ttl_seconds: int
    outputs: OutputColumns
    has_msetex: bool

    @property
    def layout(self) -> OnlineLayout:
        """Layout of the online values."""
        return online_layout(self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One entry's rows: the columns of all, which were scored (with their outputs), which failed and why."""

    delivery: Delivery
    columns: pa.Table
    scored_rows: NDArray[np.int64]
    scored: Scored
    failed: Mapping[int, str]


def publish(client: redis.Redis, publisher: Publisher, outcomes: Sequence[Outcome]) -> list[Published]:
    """Publish each entry, in one round trip; give what became of each.

    Raises:
        redis.exceptions.ConnectionError: The server is gone; publishing the same again is harmless.
    """
    scored_at_us = time.time_ns() // 1000
    calls = [_call(publisher, outcome, scored_at_us) for outcome in outcomes]
    results = []
    for reply in run_scripts(client, calls):
        if isinstance(reply, Exception):
            raise reply
        results.append(Published(reply[0]))
    return results


def _call(publisher: Publisher, outcome: Outcome, scored_at_us: int) -> ScriptCall:
    dataset, fm, partition = publisher.dataset, publisher.fm, outcome.delivery.partition
    failed_rows = np.array(sorted(outcome.failed), np.int64)
    scored, failed = _take(outcome.columns, outcome.scored_rows), _take(outcome.columns, failed_rows)
    trace = outcome.delivery.entry.trace
    scored_head, scored_data = _scored_chunk(publisher, scored, outcome.scored, trace, scored_at_us)
    dead_head, dead_data = _dead_chunk(publisher, failed, outcome, scored_at_us)
    layout = publisher.layout
    values = pack_values(
        layout,
        snapshot=publisher.snapshot_number,
        event_time_us=_times(scored),
        scored_at_us=scored_at_us,
        outputs=_columns(outcome.scored),
    ) + pack_values(
        layout,
        snapshot=publisher.snapshot_number,
        event_time_us=_times(failed),
        scored_at_us=scored_at_us,
        outputs={},
        state=FAILED,
    )
    digests = _digests(scored) + _digests(failed)
    entry_id = outcome.delivery.entry.position.entry_id
    arguments: list[Argument] = [
        keys.group(fm), entry_id, publisher.consumer, publisher.generation, publisher.epoch, fm,
        publisher.ttl_seconds, keys.online_prefix(dataset, partition, fm), digests, values, layout.width,
        int(publisher.has_msetex), scored.num_rows, scored_data, failed.num_rows, dead_data, len(scored_head),
        *scored_head, *dead_head,
    ]  # fmt: skip
    names = [
        keys.log(dataset, partition, outcome.delivery.kind),
        keys.log(dataset, partition, scored_log(fm)),
        keys.log(dataset, partition, dead_log(fm)),
        keys.counters(dataset, partition),
        keys.generation(dataset, partition, fm),
        keys.attempts(dataset, partition, fm, outcome.delivery.kind),
    ]
    return ScriptCall(script("publish"), names, arguments)


def _scored_chunk(
    publisher: Publisher, columns: pa.Table, scored: Scored, trace: Mapping[str, str], scored_at_us: int
) -> tuple[list[bytes | str], bytes | memoryview]:
    schema = scored_schema(publisher.outputs)
    arrays: list[Any] = [_one(columns, name) for name in IDENTITY]
    arrays += [pa.array(scored.logits[task], pa.float32()) for task in publisher.outputs.tasks]
    for name, width in publisher.outputs.widths().items():
        packed = np.ascontiguousarray(scored.embeddings[name])
        arrays.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(packed), [None, pa.py_buffer(packed)]))
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    meta = {
        "fm": publisher.fm,
        "snapshot_id": publisher.snapshot_id,
        "trained_through": publisher.trained_through_us,
        "scored_at": scored_at_us,
        **trace,
    }
    return head_fields(schema, num_rows=batch.num_rows, num_features=0, meta=meta), encode_batch(batch)


def append_shadow(
    client: redis.Redis, publisher: Publisher, partition: int, columns: pa.Table, scored: Scored, *, max_bytes: int
) -> str:
    """Append what a shadow said of some rows of a partition to the scored log; give why not, '' if it was.

    max_bytes: what the partition's scored log may hold then.

    Raises:
        redis.exceptions.RedisError: The server can't be asked; it may have been appended.
    """
    return _append_aside(
        client, publisher, partition, columns, scored, mark=SHADOW, generation=publisher.generation, max_bytes=max_bytes
    )


def append_backfill(
    client: redis.Redis, publisher: Publisher, partition: int, columns: pa.Table, scored: Scored, *, max_bytes: int
) -> str:
    """Append what a snapshot said of stored examples of a partition to the scored log; give why not, '' if it was.

    A generation that was withdrawn since is no reason: what is active says nothing about a backfill.

    Raises:
        RuntimeError: The snapshot may have seen the label of an example.
        redis.exceptions.RedisError: The server can't be asked; it may have been appended.
    """
    if columns.num_rows and _times(columns).min() < publisher.trained_through_us:
        raise RuntimeError(f"snapshot {publisher.snapshot_id} is trained past an example that it was to score")
    return _append_aside(
        client, publisher, partition, columns, scored, mark=BACKFILL, generation="", max_bytes=max_bytes
    )


def _append_aside(
    client: redis.Redis,
    publisher: Publisher,
    partition: int,
    columns: pa.Table,
    scored: Scored,
    *,
    mark: str,
    generation: int | str,
    max_bytes: int,
) -> str:
    head, data = _scored_chunk(publisher, columns, scored, {}, time.time_ns() // 1000)
    dataset, log = publisher.dataset, scored_log(publisher.fm)
    names = [
        keys.log(dataset, partition, log),
        keys.counters(dataset, partition),
        keys.generation(dataset, partition, publisher.fm),
    ]
    arguments = [generation, publisher.epoch, log, max_bytes, data, mark, *head]
    code = int(run_script(client, "append_aside", names, arguments))
    refused = {
        -1: "its generation is withdrawn", -2: "the scored log is lost", -3: "the log is in another epoch",
        -4: "the sink is behind: the scored log is full",
    }  # fmt: skip
    return refused.get(code, "")


def _dead_chunk(
    publisher: Publisher, columns: pa.Table, outcome: Outcome, failed_at_us: int
) -> tuple[list[bytes | str], bytes | memoryview]:
    schema = dead_schema()
    if not outcome.failed:
        return [], b""
    reasons = [outcome.failed[row] for row in sorted(outcome.failed)]
    arrays = [_one(columns, name) for name in IDENTITY]
    batch = pa.RecordBatch.from_arrays([*arrays, pa.array(reasons, pa.string())], schema=schema)
    meta = {
        "fm": publisher.fm,
        "snapshot_id": publisher.snapshot_id,
        "failed_at": failed_at_us,
        **outcome.delivery.entry.trace,
    }
    return head_fields(schema, num_rows=batch.num_rows, num_features=0, meta=meta), encode_batch(batch)


def _take(columns: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """Give the rows' identity columns; without a copy where they lie side by side."""
    identity = columns.select(list(IDENTITY))
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return identity.slice(int(rows[0]), len(rows))
    return identity.take(pa.array(rows)).combine_chunks()


def _columns(scored: Scored) -> dict[str, NDArray[np.float32] | NDArray[np.uint8]]:
    columns: dict[str, NDArray[np.float32] | NDArray[np.uint8]] = {
        f"{task}__logit": values for task, values in scored.logits.items()
    }
    return columns | dict(scored.embeddings)


def _one(columns: pa.Table, name: str) -> pa.Array:
    column = columns[name]
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _digests(columns: pa.Table) -> bytes:
    return keys.digest_bytes(_one(columns, "example_digest")) if columns.num_rows else b""


def _times(columns: pa.Table) -> NDArray[np.int64]:
    return np.asarray(_one(columns, "event_time").cast(pa.int64()))


def microseconds(moment: datetime) -> int:
    """Give an aware time as microseconds since 1970, exactly."""
    delta = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds
