"""From entries to the rows that have to be scored: columns joined, repeats and rows that are known already left out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import redis
from numpy.typing import NDArray

from das_service.logs.records import EXAMPLES
from das_service.redis_client import ScriptCall, run_scripts, script
from das_service.supervision.online_store import count_present
from fm_inference.delivery import Delivery
from schemas import keys
from schemas.dataset import DatasetSpec, example_schema
from schemas.supervision import SCORED
from schemas.tables import event_days

_VALUE_HEAD = np.dtype([("f", "u1"), ("state", "u1"), ("z", "S6"), ("t", "<i8")])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows to score. columns: all of the deliveries; wanted: indexes into it, ascending; bounds: of each delivery."""

    deliveries: tuple[Delivery, ...]
    columns: pa.Table
    wanted: NDArray[np.int64]
    bounds: NDArray[np.int64]

    def selected(self) -> pa.Table:
        """Give the columns of the wanted rows."""
        if len(self.wanted) == self.columns.num_rows:
            return self.columns
        return self.columns.take(pa.array(self.wanted))


class NewerSpecError(Exception):
    """An entry has features that this worker's declaration of the dataset does not know yet."""


def read_rows(client: redis.Redis, dataset: str, fm: str, spec: DatasetSpec, deliveries: Sequence[Delivery]) -> Rows:
    """Give the rows of the entries, without those that this FM has scored (best effort; the publish decides).

    Raises:
        NewerSpecError: An entry was made with a later declaration of the dataset.
        EntryError: An entry is damaged.
    """
    batches = [_columns(spec, delivery) for delivery in deliveries]
    columns = pa.Table.from_batches(batches).combine_chunks()
    bounds = np.cumsum([0, *[batch.num_rows for batch in batches]])
    days = _day_numbers(columns["event_time"], spec.table_granularity)
    wanted = _first_of_each(columns, days)
    wanted &= ~_known(client, dataset, fm, spec, deliveries, batches, days, bounds)
    return Rows(deliveries=tuple(deliveries), columns=columns, wanted=np.flatnonzero(wanted), bounds=bounds)


def _columns(spec: DatasetSpec, delivery: Delivery) -> pa.RecordBatch:
    entry = delivery.entry
    if entry.num_features > len(spec.features):
        raise NewerSpecError(f"entry {entry.position.entry_id} has {entry.num_features} features")
    batch = entry.batch(example_schema(spec, num_features=entry.num_features))
    schema = example_schema(spec)
    added = [pa.nulls(batch.num_rows, field.type) for field in list(schema)[batch.num_columns :]]
    return pa.RecordBatch.from_arrays([*batch.columns, *added], schema=schema) if added else batch


def _day_numbers(event_time: pa.ChunkedArray, granularity: str) -> NDArray[np.int64]:
    days = event_days(event_time.combine_chunks(), granularity)
    return days.cast(pa.int32()).to_numpy(zero_copy_only=False).astype(np.int64)


def _first_of_each(columns: pa.Table, days: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the first row of each example; an example is an id on an event day."""
    words = keys.digest_words(_one_array(columns["example_digest"]))
    identity = np.empty(len(days), np.dtype([("a", "u8"), ("b", "u8"), ("day", "i8")]))
    identity["a"], identity["b"], identity["day"] = words[:, 0], words[:, 1], days
    in_order = np.sort(words[:, 0])
    if (in_order[1:] != in_order[:-1]).all():
        return np.ones(len(days), np.bool_)
    first = np.zeros(len(days), np.bool_)
    first[np.unique(identity, return_index=True)[1]] = True
    return first


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _known(
    client: redis.Redis,
    dataset: str,
    fm: str,
    spec: DatasetSpec,
    deliveries: Sequence[Delivery],
    batches: Sequence[pa.RecordBatch],
    days: NDArray[np.int64],
    bounds: NDArray[np.int64],
) -> NDArray[np.bool_]:
    known = np.zeros(len(days), np.bool_)
    suspected = _with_values(client, dataset, fm, deliveries, batches)
    if not suspected:
        return known
    calls = [
        ScriptCall(
            script("known"),
            [keys.counters(dataset, deliveries[i].partition)],
            [keys.online_prefix(dataset, deliveries[i].partition, fm), keys.digest_bytes(batches[i]["example_digest"])],
        )
        for i in suspected
    ]
    for i, reply in zip(suspected, run_scripts(client, calls), strict=True):
        if isinstance(reply, Exception):
            raise reply
        if reply:
            rows = np.array(reply[::2], np.int64) + bounds[i]
            heads = np.frombuffer(b"".join(reply[1::2]), _VALUE_HEAD)
            times = pa.array(heads["t"]).cast(pa.timestamp("us", "UTC"))
            same = _day_numbers(pa.chunked_array([times]), spec.table_granularity) == days[rows]
            if deliveries[i].kind != EXAMPLES:
                same &= heads["state"] == SCORED
            known[rows[same]] = True
    return known


def _with_values(
    client: redis.Redis, dataset: str, fm: str, deliveries: Sequence[Delivery], batches: Sequence[pa.RecordBatch]
) -> list[int]:
    """Give which entries have examples with an online value: hardly ever any, so this is all that is asked mostly."""
    counts = count_present(
        client,
        dataset,
        fm,
        partitions=[delivery.partition for delivery in deliveries],
        digests=[keys.digest_words(batch["example_digest"]).view(np.uint8) for batch in batches],
    )
    return [i for i, count in enumerate(counts) if count]
