"""From pages to batches: fixed numbers of rows in ready order, each with the cursor behind it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from das_service.batches.cursor import Cursor
from das_service.batches.pages import Page
from das_service.batches.shards import owned_ranges

_MOST_SPAN = 8
STRIDE_ROWS = 1 << 20
MarkedBatch = tuple[pa.RecordBatch, Cursor]


def iter_ranges(cursor: Cursor, page_rows: Callable[[], int]) -> Iterator[list[tuple[int, int]]]:
    """Give the ranges of ready_seq of one page after the other; page_rows says how many rows the next may have."""
    partitions = len(cursor.low)
    held: list[tuple[int, int]] = []
    seqs, most = 0, max(1, page_rows() // partitions)
    for start, stop in owned_ranges(cursor.chain, min(cursor.low), max(cursor.end)):
        at = start
        while at < stop:
            taken = min(stop - at, most - seqs)
            if held and at + taken - held[0][0] > _MOST_SPAN * most:  # what lies between is read too
                yield held
                held, seqs, most = [], 0, max(1, page_rows() // partitions)
                continue
            held.append((at, at + taken))
            at, seqs = at + taken, seqs + taken
            if seqs >= most:
                yield held
                held, seqs, most = [], 0, max(1, page_rows() // partitions)
    if held:
        yield held


def iter_batches(pages: Iterator[tuple[Page, int]], schema: pa.Schema, cursor: Cursor) -> Iterator[MarkedBatch]:
    """Give batches of the query's batch_rows rows; the last may have fewer, and its cursor is at the end.

    There is one at least, be it empty. Where few rows pass the query, an empty one says now and then how far was
    looked, at fixed places, so that batches do not depend on pages. pages: each with the ready_seq behind all that it
    looked at.
    """
    size = cursor.query.batch_rows
    stride = max(1, STRIDE_ROWS // len(cursor.low))
    looked, end = cursor.reached, max(cursor.end)
    held: list[_Rest] = []
    num_rows = 0
    for page, through in pages:
        for rows, stop in _cut_at(page.ready_seq, looked, through, stride):
            if rows[1] > rows[0]:
                held.append(_Rest(page, *rows))
                num_rows += rows[1] - rows[0]
            while num_rows > size:  # and not at size: what is left may be the end
                batch, held, at = _cut(held, size, schema)
                num_rows -= size
                cursor = cursor.after(*at)
                yield batch, cursor
            if stop % stride == 0 and cursor.reached <= stop - stride and stop < end:
                cursor = cursor if num_rows else cursor.after(stop - 1, len(cursor.low) - 1)
                yield empty_batch(schema), cursor
        looked = through
    last = _cut(held, num_rows, schema)[0] if num_rows else empty_batch(schema)
    yield last, cursor.at_end()


def _cut_at(
    ready_seq: NDArray[np.int64], looked: int, through: int, stride: int
) -> Iterator[tuple[tuple[int, int], int]]:
    """Give a page's rows (from, to) up to each multiple of the stride that it reaches, and up to its end."""
    row = 0
    for bound in [*range((looked // stride + 1) * stride, through, stride), through]:
        after = int(np.searchsorted(ready_seq, bound))
        yield (row, after), bound
        row = after


@dataclass(frozen=True, slots=True)
class _Rest:
    """The rows of a page from `start` to `stop`."""

    page: Page
    start: int
    stop: int


def _cut(held: Sequence[_Rest], size: int, schema: pa.Schema) -> tuple[pa.RecordBatch, list[_Rest], tuple[int, int]]:
    """Give a batch of the first rows, the pages without them, and the place of the batch's last row."""
    parts, rest, left = [], list(held), size
    at = (0, 0)
    while left:
        first = rest[0]
        page, stop = first.page, min(first.start + left, first.stop)
        parts.append(page.arrays(first.start, stop))
        at = (int(page.ready_seq[stop - 1]), int(page.partition[stop - 1]))
        left -= stop - first.start
        rest[:1] = [_Rest(page, stop, first.stop)] if stop < first.stop else []
    arrays = parts[0] if len(parts) == 1 else [pa.concat_arrays(list(same)) for same in zip(*parts, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema), rest, at


def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """Give a batch without rows."""
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
