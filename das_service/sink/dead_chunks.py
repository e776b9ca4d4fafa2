"""The table `dead_chunks`: entries that could not be brought into their table, whole, so that nothing is lost.

One row per entry, with all that is needed to read it again. It has no log of its own and no positions: before an entry
is written, the table is asked whether it has it, at the version that the commit builds on.
"""

import datetime as dt
import json

import pyarrow as pa
import pyarrow.dataset as pads

from das_service.folder import Folder
from das_service.tables.durable_table import DurableTable
from das_service.tables.offline_store import file_paths
from schemas.dataset import TIMESTAMP
from schemas.entries import Entry
from schemas.tables import EVENT_DAY

DEAD_CHUNKS = "dead_chunks"
SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("log_position", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("diverted_at", TIMESTAMP),
        pa.field("taken_at", TIMESTAMP),
        pa.field("num_rows", pa.int64()),
        pa.field("num_features", pa.int64()),
        pa.field("fingerprint", pa.string()),
        pa.field("meta", pa.string()),
        pa.field(EVENT_DAY, pa.date32()),
        pa.field("data", pa.binary()),
    ]
)


def divert(
    folder: Folder, dataset: str, *, kind: str, partition: int, entry: Entry, reason: str, retention_hours: int
) -> bool:
    """Put an entry into `dead_chunks` durably, once; give whether it was new.

    event_day is the day of the diversion. Raises what DurableTable.open and commit raise.
    """
    table = DurableTable(
        folder, dataset, DEAD_CHUNKS, schema=SCHEMA, partitions=0, retention_hours=retention_hours
    )  # fmt: skip
    table.open(epoch=1)
    if _has(table, kind=kind, partition=partition, log_position=entry.position.number):
        return False
    now = dt.datetime.now(dt.UTC)
    row = {
        "kind": kind,
        "partition": partition,
        "log_position": entry.position.number,
        "reason": reason[:4096],
        "diverted_at": now,
        "taken_at": dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=entry.taken_at_us),
        "num_rows": entry.num_rows,
        "num_features": entry.num_features,
        "fingerprint": entry.fingerprint,
        "meta": json.dumps(entry.meta),
        EVENT_DAY: now.date(),
        "data": entry.data,
    }
    table.commit(pa.Table.from_pylist([row], schema=SCHEMA), {})
    return True


def _has(table: DurableTable, *, kind: str, partition: int, log_position: int) -> bool:
    paths = file_paths(table.place, table.days)
    if not paths:
        return False
    rows = pads.dataset(paths, filesystem=table.place.filesystem, format="parquet")
    same = (
        (pads.field("kind") == kind)
        & (pads.field("partition") == partition)
        & (pads.field("log_position") == log_position)
    )
    return bool(rows.count_rows(filter=same))
