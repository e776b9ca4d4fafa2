"""Which part of the ready order each of several readers reads.

Rows are dealt out in blocks of ready_seq: of n readers, reader i gets block i, i + n, i + 2n ... of all partitions.
What one reader has left can be dealt out again: its blocks, put one after the other, are numbered anew, so that a chain
of shards says what a reader reads, and the parts of a part are disjoint and complete as the parts of the whole are.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_READERS = 65_536
_MOST_BLOCK = 1 << 40
_BLOCKS_EACH = 16
_SMALLEST_BLOCK = 16
_LARGEST_ROWS = 131_072
_BLOCK_ROWS = 2_048


class Shard(BaseModel):
    """Part `number` of `total`, in blocks of so many ready_seq."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: Annotated[int, Field(ge=0)]
    total: Annotated[int, Field(ge=1, le=MOST_READERS)]
    block: Annotated[int, Field(ge=1, le=_MOST_BLOCK)]

    @model_validator(mode="after")
    def _is_in_range(self) -> Self:
        if self.number >= self.total:
            raise ValueError(f"shard {self.number}/{self.total}: shards are numbered from 0 to {self.total - 1}")
        return self


def parse_shard(text: str, *, block: int) -> Shard:
    """Give the shard that `i/n` names.

    Raises:
        ValueError: It has another shape, or i is not below n.
    """
    number, slash, total = text.partition("/")
    if not (slash and number.isascii() and number.isdigit() and total.isascii() and total.isdigit()):
        raise ValueError(f"{text!r} is no shard, such as 0/4: the first of four")
    if not 1 <= int(total) <= MOST_READERS:
        raise ValueError(f"shard {text!r}: there may be 1 to {MOST_READERS} shards")
    if int(number) >= int(total):
        raise ValueError(f"shard {text!r}: shards are numbered from 0 to {int(total) - 1}")
    return Shard(number=int(number), total=int(total), block=block)


def common_block(partitions: int) -> int:
    """Give the block of shards whose readers have no cursor in common: it must not depend on what each sees."""
    return max(1, _BLOCK_ROWS // partitions)


def fitting_block(rows: int, *, total: int, partitions: int) -> int:
    """Give the block for dealing out so many rows: a share has some blocks, and a block is what is read well."""
    wanted = rows // (partitions * total * _BLOCKS_EACH)
    return max(_SMALLEST_BLOCK, min(wanted, max(_SMALLEST_BLOCK, _LARGEST_ROWS // partitions)))


def owned_ranges(chain: Sequence[Shard], first: int, end: int) -> Iterator[tuple[int, int]]:
    """Give the ranges [start, stop) of ready_seq in [first, end) that a chain of shards reads, ascending."""
    pieces: Iterator[tuple[int, int, int]] = iter([(first, end, first)] if first < end else [])
    for shard in chain:
        pieces = _dealt(pieces, shard)
    for start, stop, _ in pieces:
        yield start, stop


def _dealt(pieces: Iterator[tuple[int, int, int]], shard: Shard) -> Iterator[tuple[int, int, int]]:
    """Give what a shard gets of pieces (start, stop, number of the first row among the dealer's own)."""
    for start, stop, own in pieces:
        at, end = own, own + stop - start
        while at < end:
            number = at // shard.block
            lacking = (shard.number - number) % shard.total
            if lacking:
                at = (number + lacking) * shard.block
                continue
            block_end = min((number + 1) * shard.block, end)
            yield start + at - own, start + block_end - own, number // shard.total * shard.block + at % shard.block
            at = block_end
