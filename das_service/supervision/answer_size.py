"""How many bytes the answer of a lookup takes, known before anything is fetched.

A row counts, per FM, the larger of its value in the store and its columns in the answer. JSON is made of Python
objects: a number counts JSON_SHARE times its four bytes there, and an encoded embedding four times, for its base64. A
caller's own column, which augment gives back, counts what it takes once each row has a copy of its value.
"""

from collections.abc import Iterable, Sequence

import pyarrow as pa

from das_service.door.columns import expanded_bytes, is_text
from das_service.door.json_body import JSON_SHARE
from das_service.errors import InvalidRowsError, TooLargeError
from das_service.registry import FmRecord
from das_service.supervision.answer import LookupQuery
from schemas.codecs import encoded_width
from schemas.snapshot import OutputColumns
from schemas.supervision import online_layout

_STATUS_BYTES, _SNAPSHOT_AND_TIMES_BYTES, _LOGIT_BYTES = 1, 20, 4
_BASE64_FACTOR = 4
_CELL_BYTES = 8
THINNER = "ask for an Arrow answer (Accept), or for columns=supervision"


def refuse_large_answer(
    num_rows: int, records: Sequence[FmRecord], query: LookupQuery, *, as_json: bool, max_bytes: int
) -> None:
    """Raise if the answer for so many rows would be over max_bytes.

    Raises:
        TooLargeError: answer_too_large, with the number of ids that fit.
    """
    per_row = sum(bytes_per_row(record.outputs, query, as_json=as_json) for record in records)
    fitting = max_bytes // max(1, per_row)
    if num_rows <= fitting:
        return
    thinner = " or for an Arrow answer" if as_json else " or for embedding_format=encoded"
    raise TooLargeError(
        f"the answer would take {num_rows * per_row} bytes, {per_row} a row, and may take {max_bytes}: ask for at most "
        f"{fitting} ids at once, for fewer outputs{thinner}",
        code="answer_too_large",
        extra={"max_ids": fitting},
    )


def bytes_per_row(outputs: OutputColumns | None, query: LookupQuery, *, as_json: bool) -> int:
    """Give what one row of an FM with these outputs counts."""
    if outputs is None:
        return _STATUS_BYTES * (JSON_SHARE if as_json else 1)
    logits = sum(_LOGIT_BYTES for task in outputs.tasks if query.wants(task))
    plain = _STATUS_BYTES + _SNAPSHOT_AND_TIMES_BYTES + logits
    vectors = sum(
        _embedding_bytes(size, encoded_width(size, codec), query, as_json=as_json)
        for name, (size, codec) in outputs.embeddings.items()
        if query.wants(name)
    )
    return max(online_layout(outputs).width, plain * (JSON_SHARE if as_json else 1) + vectors)


def _embedding_bytes(size: int, encoded: int, query: LookupQuery, *, as_json: bool) -> int:
    if query.embedding_format == "encoded":
        return encoded * (_BASE64_FACTOR if as_json else 1)
    if as_json:
        return 4 * size * JSON_SHARE
    return size * (2 if query.embedding_format == "float16" else 4)


def refuse_large_echo(batches: Iterable[pa.RecordBatch], *, max_bytes: int) -> None:
    """Raise if a JSON answer with the caller's own columns would be over max_bytes because of them.

    Raises:
        TooLargeError: answer_too_large.
        InvalidRowsError: not_json: a column's type lets rows share values in a way that is not counted here.
    """
    num_bytes = JSON_SHARE * sum(
        _plain_bytes(field.name, column)
        for batch in batches
        for field, column in zip(batch.schema, batch.columns, strict=True)
    )
    if num_bytes > max_bytes:
        raise TooLargeError(
            f"as JSON your own columns would take {num_bytes} bytes and may take {max_bytes}: {THINNER}",
            code="answer_too_large",
        )


def _plain_bytes(name: str, array: pa.Array) -> int:
    """Give the bytes of all values of a column, each of its own and those of lists and objects too."""
    kind = array.type
    cells = _CELL_BYTES * len(array)
    if isinstance(array, pa.ExtensionArray):
        return _plain_bytes(name, array.storage)
    if pa.types.is_struct(kind):
        return cells + sum(_plain_bytes(name, array.field(i)) for i in range(kind.num_fields))
    if pa.types.is_map(kind):
        return cells + _plain_bytes(name, array.keys) + _plain_bytes(name, array.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return cells + _plain_bytes(name, array.values)
    if is_text(kind):
        return max(cells + array.nbytes, expanded_bytes(array))
    if kind.num_fields or pa.types.is_dictionary(kind) or pa.types.is_binary_view(kind):
        raise InvalidRowsError(f"column {name!r}, {kind}, can't be given back as JSON: {THINNER}", code="not_json")
    return cells + array.nbytes
