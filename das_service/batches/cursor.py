"""Cursors: a place in the ready order and everything that decides what is read from there on.

A cursor fixes bounds, not table versions: per partition the range of ready_seq that is left, and per FM how far in its
logs supervision counts. Compaction, vacuum and new rows change neither, so the same cursor gives the same bytes. It is
opaque to callers, and it is not secret and not signed: what it holds is checked like a request.
"""

import base64
import binascii
import math
import zlib
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from das_service.batches.query import BatchQuery
from das_service.batches.shards import Shard
from das_service.errors import BadRequestError, ConflictError

FORMAT = 1
_MOST_BYTES = 4 * 1024 * 1024
_MOST_PARTITIONS = 1024
_MOST_SHARDS = 64
_MOST_PARTS = 1 << 20
_Seqs = Annotated[
    tuple[Annotated[int, Field(ge=-1, lt=1 << 63)], ...], Field(min_length=1, max_length=_MOST_PARTITIONS)
]


class FmBounds(BaseModel):
    """How far an FM's tables are read: its first snapshots, and log positions per partition, inclusive."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    snapshots: Annotated[int, Field(ge=0)]
    supervision: _Seqs
    dead_letters: _Seqs


class Cursor(BaseModel):
    """Rows of ready_seq in [low, end) per partition, in the order of (ready_seq, partition), of a chain of shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    query: BatchQuery
    fms: dict[str, FmBounds]
    low: _Seqs
    end: _Seqs
    chain: Annotated[tuple[Shard, ...], Field(max_length=_MOST_SHARDS)] = ()

    @model_validator(mode="after")
    def _is_dealt_out_sensibly(self) -> Self:
        if math.prod(shard.total for shard in self.chain) > _MOST_PARTS:
            raise ValueError(f"a dataset may be dealt out to {_MOST_PARTS} readers")
        return self

    @property
    def is_done(self) -> bool:
        """Whether nothing is left up to its bounds."""
        return all(low >= end for low, end in zip(self.low, self.end, strict=True))

    @property
    def reached(self) -> int:
        """The first ready_seq of which something is left."""
        return min((low for low, end in zip(self.low, self.end, strict=True) if low < end), default=max(self.end))

    @property
    def num_rows(self) -> int:
        """Rows that are left up to its bounds, of all shards."""
        return sum(max(0, end - low) for low, end in zip(self.low, self.end, strict=True))

    def after(self, ready_seq: int, partition: int) -> "Cursor":
        """Give the cursor behind a row."""
        low = [
            max(at, min(ready_seq + (p <= partition), end))
            for p, (at, end) in enumerate(zip(self.low, self.end, strict=True))
        ]
        return self.model_copy(update={"low": tuple(low)})

    def at_end(self) -> "Cursor":
        """Give the cursor behind all rows that it is about."""
        return self.model_copy(update={"low": tuple(map(max, self.low, self.end))})


def encode_cursor(cursor: Cursor) -> str:
    """Give a cursor as text that a URL can hold."""
    packed = zlib.compress(cursor.model_dump_json(exclude_defaults=True).encode(), 6)
    checked = bytes([FORMAT]) + zlib.crc32(packed).to_bytes(4, "little") + packed
    return base64.urlsafe_b64encode(checked).rstrip(b"=").decode()


def decode_cursor(text: str, *, dataset: str, partitions: int) -> Cursor:
    """Give the cursor that a text spells.

    Raises:
        BadRequestError: cursor_invalid: it is damaged, or of another format.
        ConflictError: cursor_other_dataset.
    """
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _invalid("it holds characters that no cursor has") from None
    if len(data) < 6:
        raise _invalid("it is cut")
    if data[0] != FORMAT:
        raise _invalid(f"it has format {data[0]}, this service reads {FORMAT}; start again without a cursor")
    if zlib.crc32(data[5:]).to_bytes(4, "little") != data[1:5]:
        raise _invalid("its checksum is wrong: it was cut or changed on the way")
    cursor = _parse(data[5:])
    if cursor.dataset != dataset:
        raise ConflictError(
            f"the cursor is of dataset {cursor.dataset!r}, not of {dataset!r}", code="cursor_other_dataset"
        )
    _refuse_other_shape(cursor, partitions)
    return cursor


def _parse(packed: bytes) -> Cursor:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, _MOST_BYTES)
        if not unpacker.eof:
            raise _invalid("it is longer than any cursor")
        return Cursor.model_validate_json(text)
    except (zlib.error, ValidationError, RecursionError):
        raise _invalid("this service can't have written it") from None


def _refuse_other_shape(cursor: Cursor, partitions: int) -> None:
    vectors = [cursor.low, cursor.end]
    for bounds in cursor.fms.values():
        vectors += [bounds.supervision, bounds.dead_letters]
    if {len(vector) for vector in vectors} != {partitions} or set(cursor.fms) != set(cursor.query.fms):
        raise _invalid("this service can't have written it")


def _invalid(why: str) -> BadRequestError:
    return BadRequestError(f"the cursor can't be read: {why}", code="cursor_invalid")
