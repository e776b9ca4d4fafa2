"""Untrusted Arrow IPC streams: bounded before anything is decoded, validated in full before anything is used.

The framing and the flatbuffers of record and dictionary batches are read here, with every offset checked, to learn how
many rows a body holds and how large it is once decompressed. pyarrow decodes only what is within the limits. pyarrow
accepts a stream that was cut at a batch boundary in silence, so the end-of-stream marker is demanded.

Source: https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format (format/Message.fbs for field numbers).
"""

import mmap
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import TypeAlias

import pyarrow as pa

from das_service.errors import BadRequestError, TooLargeError

Body: TypeAlias = "bytes | memoryview | mmap.mmap"
MAX_METADATA_BYTES = 8 * 1024 * 1024
MAX_BATCHES = 4096
_WORK_FACTOR = 8
_CONTINUATION = 0xFFFFFFFF
_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH = 1, 2, 3


@dataclass(slots=True)
class Budget:
    """Bytes that one request may take once decoded. spend() refuses what goes over."""

    max_bytes: int
    spent_bytes: int = 0

    def spend(self, num_bytes: int) -> None:
        """Count bytes that are about to be allocated.

        Raises:
            TooLargeError: They don't fit any more.
        """
        self.spent_bytes += num_bytes
        if self.spent_bytes > self.max_bytes:
            raise TooLargeError(f"decoded, the body takes more than the {self.max_bytes} bytes that a request may")


def read_batches(
    body: Body, *, budget: Budget, max_rows: int, expect: Callable[[pa.Schema], None]
) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Give the schema and the batches of a whole IPC stream, each valid in every byte.

    expect is called with the schema before a batch is decoded, and raises if it does not fit.

    Raises:
        BadRequestError: It is not an Arrow IPC stream, is damaged, was cut, or goes on after its end.
        TooLargeError: More rows or bytes than allowed.
    """
    measure_stream(body, budget=budget, max_rows=max_rows)
    try:
        with pa.ipc.open_stream(body) as reader:
            schema = reader.schema
            expect(schema)
            batches = []
            for batch in reader:
                batch.validate(full=True)
                batches.append(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise BadRequestError(f"the Arrow stream is damaged: {_first_line(error)}") from error
    return schema, batches


@dataclass(slots=True)
class _Totals:
    rows: int = 0
    batches: int = 0
    work_bytes: int = 0
    largest_growth: int = 0
    dictionary_bytes: dict[int, int] = field(default_factory=dict)


def measure_stream(body: Body, *, budget: Budget, max_rows: int, max_batch_bytes: int | None = None) -> int:
    """Give the number of rows that a stream says it has, after holding it against the limits; decodes nothing.

    max_batch_bytes: what decoding one batch may take on top of the body's own bytes.

    Raises:
        BadRequestError: The framing or the metadata is damaged, the end is missing, or bytes follow it.
        TooLargeError: More rows, batches or decoded bytes than allowed.
    """
    totals = _Totals()
    position, has_schema = 0, False
    while True:
        kind, header, start, length, position = _next_message(body, position)
        if kind is None:
            break
        if (kind == _SCHEMA) == has_schema:
            raise BadRequestError("the Arrow stream is damaged: a schema comes first, and only once")
        has_schema = True
        if kind in {_RECORD_BATCH, _DICTIONARY_BATCH}:
            _measure_batch(body, kind, header, (start, length), totals, budget)
        elif kind != _SCHEMA:
            raise BadRequestError(f"the Arrow stream holds a message of kind {kind}, not record batches")
        _hold_against(totals, budget, max_rows, max_batch_bytes)
    if position != len(body):
        raise BadRequestError(f"{len(body) - position} bytes follow the end of the Arrow stream")
    if not has_schema:
        raise BadRequestError("the Arrow stream is empty: it has no schema")
    return totals.rows


def _hold_against(totals: _Totals, budget: Budget, max_rows: int, max_batch_bytes: int | None) -> None:
    if max_batch_bytes is not None and totals.largest_growth > max_batch_bytes:
        raise TooLargeError(
            f"a batch grows by more than {max_batch_bytes} bytes when it is decompressed; send smaller ones"
        )
    if totals.rows > max_rows:
        raise TooLargeError(f"the body has more than the {max_rows} rows that a request may")
    if totals.batches > MAX_BATCHES:
        raise TooLargeError(f"the body has more than {MAX_BATCHES} batches; send fewer, larger ones")
    if totals.work_bytes > _WORK_FACTOR * budget.max_bytes:
        raise TooLargeError("the body has too many batches for dictionaries of this size; send fewer, larger ones")


def _next_message(body: Body, position: int) -> tuple[int | None, "_Table", int, int, int]:
    """Give (kind or None at the end, header table, start and length of the message's body, next position)."""
    if len(body) - position < 8:
        raise BadRequestError("the Arrow stream was cut: it has no end-of-stream marker")
    continuation, size = struct.unpack_from("<Ii", body, position)
    position += 8
    if continuation != _CONTINUATION:
        raise BadRequestError("the body is not an Arrow IPC stream (application/vnd.apache.arrow.stream)")
    if size == 0:
        return None, _Table(b"", 0, 0, 0), 0, 0, position
    if size < 0 or size > len(body) - position:
        raise BadRequestError("the Arrow stream was cut in the middle of a message")
    if size > MAX_METADATA_BYTES:
        raise TooLargeError(f"a message's metadata is larger than {MAX_METADATA_BYTES} bytes")
    message = _root(body, position, position + size)
    start = position + size
    length = message.number(3, "<q", 0)
    if length < 0 or length > len(body) - start:
        raise BadRequestError("the Arrow stream was cut in the middle of a message")
    return message.number(1, "<B", 0), message.table(2), start, length, start + length


def _measure_batch(
    body: Body, kind: int, header: "_Table", span: tuple[int, int], totals: _Totals, budget: Budget
) -> None:
    batch = header if kind == _RECORD_BATCH else header.table(1)
    rows = batch.number(0, "<q", 0)
    if rows < 0:
        raise _damaged()
    decoded = _decoded_bytes(body, batch, span)
    budget.spend(decoded)
    totals.largest_growth = max(totals.largest_growth, decoded - span[1])
    totals.batches += 1
    if kind == _RECORD_BATCH:
        totals.rows += rows
        totals.work_bytes += sum(totals.dictionary_bytes.values())
        return
    number = header.number(0, "<q", 0)
    before = totals.dictionary_bytes.get(number, 0) if header.number(2, "<B", 0) else 0
    totals.dictionary_bytes[number] = before + decoded


def _decoded_bytes(body: Body, batch: "_Table", span: tuple[int, int]) -> int:
    """Give the bytes of a batch's buffers once decompressed."""
    start, length = span
    offsets, sizes = batch.pairs(2)
    if min(offsets, default=0) < 0 or min(sizes, default=0) < 0 or max(map(add, offsets, sizes), default=0) > length:
        raise _damaged()
    if not batch.has(3):
        return sum(sizes)
    total = 0
    for offset, size in zip(offsets, sizes, strict=True):
        (stated,) = struct.unpack_from("<q", body, start + offset) if size >= 8 else (-1,)
        if stated < -1:
            raise _damaged()
        total += size if stated == -1 else stated
    return total


@dataclass(frozen=True, slots=True)
class _Table:
    """A flatbuffer table inside body[first:last]; reads outside these bounds are refused."""

    body: Body
    at: int
    first: int
    last: int

    def number(self, slot: int, form: str, default: int) -> int:
        """Give a scalar field, or its default where it is absent."""
        place = self._place(slot)
        return default if place == 0 else int(self._unpack(form, place))

    def has(self, slot: int) -> bool:
        """Give whether a field is present."""
        return self._place(slot) != 0

    def table(self, slot: int) -> "_Table":
        """Give a table that a field refers to."""
        return _Table(self.body, self._target(slot), self.first, self.last)

    def pairs(self, slot: int) -> tuple[Sequence[int], Sequence[int]]:
        """Give the structs of two int64 of a vector field, the first ones and the second ones."""
        if not self.has(slot):
            return (), ()
        at = self._target(slot)
        count = int(self._unpack("<I", at))
        if count * 16 > self.last - at - 4:
            raise _damaged()
        values = struct.unpack_from(f"<{2 * count}q", self.body, at + 4)
        return values[0::2], values[1::2]

    def _place(self, slot: int) -> int:
        vtable = self.at - int(self._unpack("<i", self.at))
        size = int(self._unpack("<H", vtable))
        entry = 4 + 2 * slot
        if entry + 2 > size:
            return 0
        relative = int(self._unpack("<H", vtable + entry))
        return 0 if relative == 0 else self.at + relative

    def _target(self, slot: int) -> int:
        place = self._place(slot)
        if place == 0:
            raise _damaged()
        return place + int(self._unpack("<I", place))

    def _unpack(self, form: str, at: int) -> int:
        if at < self.first or at + struct.calcsize(form) > self.last:
            raise _damaged()
        return int(struct.unpack_from(form, self.body, at)[0])


def _root(body: Body, first: int, last: int) -> _Table:
    if last - first < 4:
        raise _damaged()
    (offset,) = struct.unpack_from("<I", body, first)
    return _Table(body, first + offset, first, last)


def _damaged() -> BadRequestError:
    return BadRequestError("the Arrow stream is damaged: its metadata points outside itself")


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]
