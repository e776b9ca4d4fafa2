"""The table `dead_chunks`: entries that could not be brought into their table, whole, so that nothing is lost.

One row per entry, with all that is needed to read it again; of one whose header can't be read, `meta` holds its fields
as JSON, each byte as the character of that number. It has no log of its own and no positions: before an entry is
written, the table is asked whether it has it, at the version that the commit builds on.
"""

import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from das_service.folder import Folder
from das_service.tables.durable_table import DurableTable
from das_service.tables.offline_store import file_paths
from schemas.dataset import TIMESTAMP
from schemas.entries import EntryError, Position, parse_entry, parse_position
from schemas.tables import EVENT_DAY

DEAD_CHUNKS = "dead_chunks"
_MOST_DIGITS = 9
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


@dataclass(frozen=True, slots=True)
class RawEntry:
    """An entry as it lies in its log, readable or not."""

    entry_id: bytes
    fields: Mapping[bytes, bytes]

    @property
    def position(self) -> Position:
        """Where it lies: the server makes ids, so that this can be read."""
        return parse_position(self.entry_id)

    @property
    def is_aside(self) -> bool:
        """Whether a shadow or a backfill said it: it is nobody's outcome."""
        return b"x" in self.fields

    @property
    def num_rows(self) -> int:
        """Rows that it says it has; 0 where that can't be read."""
        text = self.fields.get(b"n", b"")
        return int(text) if text.isdigit() and len(text) <= _MOST_DIGITS else 0

    def columns(self) -> dict[str, Any]:
        """Give what the table keeps of it."""
        try:
            entry = parse_entry(self.entry_id, self.fields)
            taken_at = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=entry.taken_at_us)
            pa.array([entry.num_rows, entry.num_features], pa.int64())
        except (EntryError, OverflowError):
            fields = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.fields.items()}
            data = self.fields.get(b"d")
            return {"meta": json.dumps({name: value for name, value in fields.items() if name != "d"}), "data": data}
        return {
            "taken_at": taken_at,
            "num_rows": entry.num_rows,
            "num_features": entry.num_features,
            "fingerprint": entry.fingerprint,
            "meta": json.dumps(entry.meta),
            "data": entry.data,
        }


def divert(
    folder: Folder, dataset: str, *, kind: str, partition: int, entry: RawEntry, reason: str, retention_hours: int
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
        EVENT_DAY: now.date(),
        **entry.columns(),
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
