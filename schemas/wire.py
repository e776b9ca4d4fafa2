"""Arrow IPC streams over HTTP: every answer ends with a row count and the end-of-stream marker.

pyarrow accepts a stream that was cut at a batch boundary without a word, so the last batch of an answer carries
`das_rows` in its custom metadata and the reader checks both. Needs pyarrow alone.
"""

import io
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

ARROW_STREAM = "application/vnd.apache.arrow.stream"
JSON = "application/json"
PROBLEM_JSON = "application/problem+json"
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
ROWS_KEY = b"das_rows"
CURSOR_KEY = b"das_cursor"


class TruncatedStreamError(Exception):
    """An Arrow answer ended before its end: the connection or the server was lost on the way."""


def write_stream(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> bytes:
    """Give the IPC stream of the batches, the last one carrying the number of rows."""
    sink = pa.BufferOutputStream()
    rows = 0
    with pa.ipc.new_stream(sink, schema) as writer:
        held: pa.RecordBatch | None = None
        for batch in batches:
            if held is not None:
                writer.write_batch(held)
            held = batch
            rows += batch.num_rows
        if held is None:
            held = pa.RecordBatch.from_pylist([], schema=schema)
        writer.write_batch(held, custom_metadata={ROWS_KEY: str(rows).encode()})
    return sink.getvalue().to_pybytes()


def iter_stream_parts(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[bytes]:
    """Give the same stream part by part, a part per batch, as the batches come."""
    for part in iter_marked_parts(schema, ((batch, {}) for batch in batches)):
        if part is not None:
            yield part


def iter_marked_parts(
    schema: pa.Schema,
    marked: Iterable[tuple[pa.RecordBatch, Mapping[bytes, bytes]] | None],
    *,
    metadata: Mapping[bytes, bytes] | None = None,
    at_once: bool = False,
) -> Generator[bytes | None, None, None]:
    """Give the stream of batches that have custom metadata of their own, part by part; metadata: of its schema.

    at_once: each batch leaves as it comes, and an empty one ends the stream; else the last one carries the number of
    rows, so that each waits for the next. Nones are passed on: whoever makes the batches has none right now.
    """
    sink = _Parts()
    rows = 0
    held: tuple[pa.RecordBatch, Mapping[bytes, bytes]] = (pa.RecordBatch.from_pylist([], schema=schema), {})
    is_held = False
    with pa.ipc.new_stream(sink, schema.with_metadata(metadata) if metadata else schema) as writer:
        for item in marked:
            if item is None:
                yield None
                continue
            if is_held:
                writer.write_batch(held[0], custom_metadata=dict(held[1]))
                yield sink.take()
            held, is_held = item, True
            rows += item[0].num_rows
            if at_once:
                writer.write_batch(item[0], custom_metadata=dict(item[1]))
                yield sink.take()
                held, is_held = (item[0].slice(0, 0), item[1]), False
        writer.write_batch(held[0], custom_metadata={**held[1], ROWS_KEY: str(rows).encode()})
    yield sink.take()


class _Parts(io.RawIOBase):
    """What was written since the last take()."""

    def __init__(self) -> None:
        self._pieces: list[bytes | pa.Buffer] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:  # noqa: ANN401 - bytes, or a buffer of the batch, which is not copied here
        self._pieces.append(data)
        return len(data)

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def write_table(table: pa.Table) -> bytes:
    """Give the IPC stream of a table."""
    return write_stream(table.schema, table.to_batches())


def iter_stream(source: object) -> Iterator[pa.RecordBatch]:
    """Give the batches of an answer as they come.

    Raises:
        TruncatedStreamError: The end-of-stream marker or the row count is missing, or rows are.
    """
    for batch, _ in iter_marked(source):
        yield batch


def iter_marked(source: object) -> Iterator[tuple[pa.RecordBatch, Mapping[bytes, bytes]]]:
    """Give the batches of an answer, each with its custom metadata, as they come.

    Raises:
        TruncatedStreamError: As iter_stream.
    """
    rows = 0
    stated: int | None = None
    try:
        reader = pa.ipc.open_stream(source)
        while True:
            try:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
            except StopIteration:
                break
            rows += batch.num_rows
            marks = dict(metadata or {})
            if ROWS_KEY in marks:
                stated = int(marks[ROWS_KEY])
            yield batch, marks
    except (pa.ArrowInvalid, OSError) as error:
        raise TruncatedStreamError(f"the Arrow stream broke off after {rows} rows: {error}") from error
    if stated is None:
        raise TruncatedStreamError(f"the Arrow stream ended after {rows} rows without saying how many there are")
    if stated != rows:
        raise TruncatedStreamError(f"the Arrow stream has {rows} rows and says it has {stated}")


def read_table(body: bytes) -> pa.Table:
    """Give the table of a whole answer.

    Raises:
        TruncatedStreamError: As iter_stream, and when the marker at the end is missing.
    """
    if not body.endswith(END_OF_STREAM):
        raise TruncatedStreamError("the Arrow stream has no end-of-stream marker: the answer was cut")
    schema = pa.ipc.open_stream(body).schema
    return pa.Table.from_batches(list(iter_stream(body)), schema=schema)
