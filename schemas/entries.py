"""A log entry: one chunk as it lies in a stream.

Fields (names are one byte: they are stored with each entry):

    v  format number of the entry, now 1
    s  fingerprint of the Arrow schema (xxh64 of its IPC bytes, 16 hex digits)
    c  number of features the schema has (0 in logs of outputs); an added feature goes to the end, so this finds it
    n  rows
    t  when the server took it, microseconds (received_at; available_at in a scored log)
    r  rows, and  b  bytes of data, of this log up to and including this entry
    x  1 in what a shadow said, 2 in what a backfill said: such rows are nobody's outcome and are not counted in r
    m  JSON about the whole chunk: a scored chunk's snapshot; `traceparent` of the request that brought it, if any
    d  the record batch as an Arrow IPC message without its schema
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import xxhash

FORMAT = 1
READABLE_FORMATS = (1,)
TRACEPARENT = "traceparent"
SHADOW, BACKFILL = "1", "2"


class EntryError(ValueError):
    """An entry can't be read: another format, another schema, or damaged data."""


class NewerFormatError(EntryError):
    """An entry was written by a later version of the service; it waits for a reader of that version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where an entry lies: entry ids are `<epoch>-<seq>`, epochs count from 1, seq is dense from 0."""

    epoch: int
    seq: int

    @property
    def number(self) -> int:
        """One int64 that grows through epochs; equal to seq in the first epoch."""
        return ((self.epoch - 1) << 40) | self.seq

    @property
    def entry_id(self) -> str:
        """The stream's own spelling."""
        return f"{self.epoch}-{self.seq}"


def parse_position(entry_id: bytes | str) -> Position:
    """Give the position that an entry id names."""
    text = entry_id.decode() if isinstance(entry_id, bytes) else entry_id
    epoch, _, seq = text.partition("-")
    return Position(epoch=int(epoch), seq=int(seq))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry that was read. `rows_total` and `bytes_total` count the log up to and including it."""

    position: Position
    num_features: int
    num_rows: int
    taken_at_us: int
    rows_total: int
    bytes_total: int
    meta: dict[str, Any]
    fingerprint: str
    data: bytes
    is_shadow: bool = False
    is_backfill: bool = False

    @property
    def trace(self) -> dict[str, str]:
        """What of the meta goes on to the entries that are made of this one."""
        return {TRACEPARENT: self.meta[TRACEPARENT]} if TRACEPARENT in self.meta else {}

    @property
    def trace_id(self) -> str:
        """Trace that brought the chunk (W3C Trace Context), '' if it came without one."""
        return str(self.meta.get(TRACEPARENT, "")).partition("-")[2].partition("-")[0]

    def batch(self, schema: pa.Schema) -> pa.RecordBatch:
        """Give the chunk, zero-copy.

        Raises:
            EntryError: The schema is not the one it was written with, or the data is damaged.
        """
        if fingerprint(schema) != self.fingerprint:
            raise EntryError(f"entry {self.position.entry_id} has schema {self.fingerprint}, not {fingerprint(schema)}")
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(self.data), schema)
        except (pa.ArrowInvalid, OSError) as error:
            raise EntryError(f"entry {self.position.entry_id}: {error}") from error
        if batch.num_rows != self.num_rows:
            raise EntryError(f"entry {self.position.entry_id} says {self.num_rows} rows and has {batch.num_rows}")
        return batch


def fingerprint(schema: pa.Schema) -> str:
    """Give the 16 hex digits that stand for a schema."""
    return xxhash.xxh64_hexdigest(schema.remove_metadata().serialize())


def encode_batch(batch: pa.RecordBatch) -> memoryview:
    """Give the record batch's IPC message without its schema."""
    return memoryview(batch.serialize()).cast("B")


def head_fields(
    schema: pa.Schema | str, *, num_rows: int, num_features: int, meta: Mapping[str, Any]
) -> list[bytes | str]:
    """Give the fields that the client knows, as names and values in turn; scripts add t, r, b and d.

    schema: or its fingerprint, for many entries of one schema.
    """
    stamp = schema if isinstance(schema, str) else fingerprint(schema)
    return [
        "v", str(FORMAT), "s", stamp, "c", str(num_features), "n", str(num_rows),
        "m", json.dumps(meta, separators=(",", ":"), sort_keys=True),
    ]  # fmt: skip


def parse_entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    """Give the entry that a stream reply holds.

    Raises:
        NewerFormatError: The format is a later one than this version knows.
        EntryError: A field is missing or unreadable, or the format is one that this version does not read.
    """
    try:
        version = int(fields[b"v"])
        if version > FORMAT:
            raise NewerFormatError(
                f"entry {entry_id!r} has format {version}: upgrade this role, it reads up to {FORMAT}"
            )
        if version not in READABLE_FORMATS:
            raise EntryError(f"entry {entry_id!r} has format {version}; this version reads {READABLE_FORMATS}")
        return Entry(
            position=parse_position(entry_id),
            num_features=int(fields[b"c"]),
            num_rows=int(fields[b"n"]),
            taken_at_us=int(fields[b"t"]),
            rows_total=int(fields[b"r"]),
            bytes_total=int(fields[b"b"]),
            meta=json.loads(fields[b"m"]),
            fingerprint=fields[b"s"].decode(),
            data=fields[b"d"],
            is_shadow=fields.get(b"x") == SHADOW.encode(),
            is_backfill=fields.get(b"x") == BACKFILL.encode(),
        )
    except (KeyError, ValueError) as error:
        if isinstance(error, EntryError):
            raise
        raise EntryError(f"entry {entry_id!r} is damaged: {error!r}") from error
