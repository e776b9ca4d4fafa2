"""From pages to batches: fixed numbers of rows in ready order, each with the cursor behind it."""

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from das_service.batches.cursor import Cursor
from das_service.batches.pages import Page
from das_service.batches.shards import owned_ranges

_MOST_SPAN = 8
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


def iter_batches(pages: Iterator[Page], schema: pa.Schema, cursor: Cursor) -> Iterator[MarkedBatch]:
    """Give batches of the query's batch_rows rows; the last may have fewer, and its cursor is at the end.

    There is one at least, be it empty.
    """
    size = cursor.query.batch_rows
    held: list[Page] = []
    num_rows = 0
    for page in pages:
        if page.rows.num_rows:
            held.append(page)
            num_rows += page.rows.num_rows
        while num_rows > size:  # and not at size: what is left may be the end
            batch, held, at = _cut(held, size)
            num_rows -= size
            cursor = cursor.after(*at)
            yield batch, cursor
    rows = _cut(held, num_rows)[0] if num_rows else one_batch(schema.empty_table())
    yield rows, cursor.at_end()


def _cut(held: Sequence[Page], size: int) -> tuple[pa.RecordBatch, list[Page], tuple[int, int]]:
    """Give a batch of the first rows, the pages without them, and the place of the batch's last row."""
    parts, rest, left = [], list(held), size
    at = (0, 0)
    while left:
        page = rest.pop(0)
        taken = min(left, page.rows.num_rows)
        parts.append(page.rows.slice(0, taken))
        at = (int(page.ready_seq[taken - 1]), int(page.partition[taken - 1]))
        left -= taken
        if taken < page.rows.num_rows:
            rest.insert(0, _behind(page, taken))
    return one_batch(pa.concat_tables(parts)), rest, at


def _behind(page: Page, taken: int) -> Page:
    return Page(
        rows=page.rows.slice(taken),
        ready_seq=page.ready_seq[taken:],
        partition=page.partition[taken:],
        counts=page.counts,
    )


def one_batch(rows: pa.Table) -> pa.RecordBatch:
    """Give a table as one batch whose bytes depend on its values alone."""
    arrays = [_own_copy(column) for column in rows.columns]
    return pa.RecordBatch.from_arrays(arrays, schema=rows.schema)


def _own_copy(column: pa.ChunkedArray) -> pa.Array:
    """Give a column as one array whose bytes in a stream do not depend on what lay around it.

    What follows the last row in a buffer of bits or of texts would be written too.
    """
    if column.num_chunks == 1:
        array = column.chunk(0)
        is_plain = pa.types.is_primitive(array.type) and not pa.types.is_boolean(array.type)
        if is_plain and (not array.null_count or len(array) % 8 == 0):
            return array
        return pa.concat_arrays([array, array.slice(0, 0)])
    return pa.concat_arrays([*column.chunks, pa.array([], column.type)])
