"""Tables as callers have them (Arrow, pandas, polars, rows) as the Arrow types that the service takes.

Nothing of pandas or polars is imported: they are recognised by the Arrow PyCapsule interface, or by the older
`__dataframe__`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

ROWS_PER_REQUEST = 5_000


def to_table(data: Any) -> pa.Table:  # noqa: ANN401 - whatever holds a table
    """Give a table of string, list and plain types.

    data: an Arrow table, batch or reader, a pandas or polars frame, a mapping of columns, or a sequence of rows.

    Raises:
        TypeError: It is none of these.
    """
    return plain_table(_arrow_table(data))


def iter_chunks(data: Any, *, rows: int = ROWS_PER_REQUEST) -> Iterator[pa.Table]:  # noqa: ANN401
    """Give pieces of at most `rows` rows, in order.

    data: anything that to_table takes, or an iterable of such; an iterable and a stream are read as they are sent, so
    that one piece is held at a time.
    """
    for table in _iter_tables(data):
        for start in range(0, table.num_rows, rows):
            yield table.slice(start, rows)


def _iter_tables(data: Any) -> Iterator[pa.Table]:  # noqa: ANN401
    if isinstance(data, pa.RecordBatchReader):
        yield from (to_table(batch) for batch in data)
    elif _is_table(data):
        yield to_table(data)
    elif isinstance(data, Iterable):
        yield from (to_table(piece) for piece in data)
    else:
        raise TypeError(f"{type(data).__name__} is neither a table nor an iterable of tables")


def _is_table(data: Any) -> bool:  # noqa: ANN401
    if isinstance(data, pa.Table | pa.RecordBatch | Mapping):
        return True
    if isinstance(data, Sequence):
        return bool(data) and all(isinstance(row, Mapping) for row in data)
    return any(hasattr(data, name) for name in ("__arrow_c_stream__", "__arrow_c_array__", "__dataframe__"))


def _arrow_table(data: Any) -> pa.Table:  # noqa: ANN401
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, pa.RecordBatch):
        return pa.Table.from_batches([data])
    if isinstance(data, pa.RecordBatchReader):
        return data.read_all()
    if hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__"):
        return pa.table(data)
    if hasattr(data, "__dataframe__"):
        from pyarrow import interchange  # noqa: PLC0415 - for old frames alone

        return interchange.from_dataframe(data)
    if isinstance(data, Mapping):
        return pa.table(dict(data))
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return pa.Table.from_pylist(list(data))
    raise TypeError(f"{type(data).__name__} is no table: give an Arrow table, a pandas or polars frame, or rows")


def plain_table(table: pa.Table) -> pa.Table:
    """Give the table with string, binary and list types in their plain layout, and without pandas' metadata."""
    columns = [_plain_column(column) for column in table.columns]
    fields = [
        pa.field(field.name, column.type, field.nullable) for field, column in zip(table.schema, columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    wanted = _plain_type(column.type)
    if wanted == column.type:
        return column
    if pa.types.is_dictionary(wanted):
        parts = [
            pa.DictionaryArray.from_arrays(part.indices, pc.cast(part.dictionary, wanted.value_type))
            for part in column.chunks
        ]
        return pa.chunked_array(parts, wanted)
    return pc.cast(column, wanted)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Give the layout that every Arrow reader knows for a type: no views, no 64-bit offsets."""
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _plain_type(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return kind
