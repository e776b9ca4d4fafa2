"""Files of examples or labels as chunks of Arrow rows: Parquet, Arrow and lines of JSON, read as they are needed.

The dataset's declaration settles the types where the file does not: JSON values are read as the declared types, and a
vector that a file holds as a plain list becomes a list of the declared size.
"""

import contextlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from das_service.client.arrow import plain_table

FileFormat = Literal["parquet", "arrow", "ndjson"]
_BY_SUFFIX: dict[str, FileFormat] = {
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".arrows": "arrow", ".ipc": "arrow",
    ".feather": "arrow", ".ndjson": "ndjson", ".jsonl": "ndjson", ".json": "ndjson",
}  # fmt: skip
_READ_BYTES = 1024 * 1024
_ARROW_FILE, _ARROW_STREAM, _PARQUET = b"ARROW1", b"\xff\xff\xff\xff", b"PAR1"
_JSON_TYPES: dict[str, set[type]] = {"double": {int, float}, "float": {int, float}, "int64": {int}}
TIMESTAMP = pa.timestamp("us", "UTC")


class ExampleFileError(Exception):
    """A file of examples can't be read; the message says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleFile:
    """Rows on their way. num_rows: how many there are, None where only the end tells."""

    num_rows: int | None
    tables: Iterator[pa.Table]


@contextlib.contextmanager
def open_examples(
    path: str, *, stdin: IO[bytes], file_format: FileFormat | None, types: Mapping[str, pa.DataType], rows: int
) -> Iterator[ExampleFile]:
    """Give the rows of a file (`-`: of stdin) in pieces of about `rows` rows.

    The format is told by the file's suffix, else by its first bytes. types: as example_types or label_types gives them.

    Raises:
        ExampleFileError: The format is unknown, or can't be read from stdin.
        FileNotFoundError: There is no such file.
    """
    with io.BufferedReader(cast("io.RawIOBase", stdin)) if path == "-" else Path(path).open("rb") as source:
        found = file_format or _BY_SUFFIX.get(Path(path).suffix.lower()) or _sniff(source, path)
        if found == "parquet":
            yield _open_parquet(source, types, rows, path)
        elif found == "arrow":
            yield ExampleFile(num_rows=None, tables=_fitted(_iter_arrow(source), types))
        else:
            yield ExampleFile(num_rows=None, tables=_iter_ndjson(source, types, rows, path))


def _open_parquet(source: IO[bytes], types: Mapping[str, pa.DataType], rows: int, path: str) -> ExampleFile:
    if path == "-":
        raise ExampleFileError("Parquet can't be read from a pipe: name the file, or pipe an Arrow stream")
    file = pq.ParquetFile(source, buffer_size=_READ_BYTES, pre_buffer=False)  # else a row group lies in memory
    return ExampleFile(num_rows=file.metadata.num_rows, tables=_fitted(file.iter_batches(batch_size=rows), types))


def _sniff(source: IO[bytes], path: str) -> FileFormat:
    start = source.peek(16)[:16]  # type: ignore[attr-defined]
    if start.startswith((_ARROW_STREAM, _ARROW_FILE)):
        return "arrow"
    if start.startswith(_PARQUET):
        return "parquet"
    if start.lstrip()[:1] == b"{" or not start.strip():
        return "ndjson"
    raise ExampleFileError(f"{path} is neither Parquet nor Arrow nor lines of JSON: say which with --format")


def label_types(spec: Mapping[str, Any]) -> dict[str, pa.DataType]:
    """Give the Arrow types in which the columns of labels are handed in. spec: the dataset's declaration."""
    tasks = {task["name"]: pa.float64() for task in spec["tasks"]}
    return {"example_id": pa.string(), "label_time": TIMESTAMP, **tasks}


def example_types(spec: Mapping[str, Any]) -> dict[str, pa.DataType]:
    """Give the Arrow types in which the columns of examples are handed in. spec: the dataset's declaration."""
    types: dict[str, pa.DataType] = {"example_id": pa.string(), "event_time": TIMESTAMP}
    for feature in spec["features"]:
        value = pa.int64() if feature.get("value_type") == "int64" else pa.string()
        types[feature["name"]] = {
            "float": pa.float64(),
            "category": value,
            "category_list": pa.list_(value),
            "vector": pa.list_(pa.float32(), feature.get("size") or 1),
        }[feature["type"]]
    return types


def _iter_arrow(source: IO[bytes]) -> Iterator[pa.RecordBatch]:
    if source.peek(8)[:6] == _ARROW_FILE:  # type: ignore[attr-defined]
        if not source.seekable():
            raise ExampleFileError("an Arrow file can't be read from a pipe: name it, or pipe an Arrow stream")
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(source)


def _fitted(batches: Iterable[pa.RecordBatch], types: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
    for batch in batches:
        table = plain_table(pa.Table.from_batches([batch]))
        for place, field in enumerate(table.schema):
            wanted = types.get(field.name)
            is_vector = wanted is not None and pa.types.is_fixed_size_list(wanted)
            if is_vector and pa.types.is_list(field.type):
                table = table.set_column(place, field.name, _as_vectors(table.column(place), wanted, field.name))
        yield table


def _as_vectors(column: pa.ChunkedArray, wanted: pa.DataType, name: str) -> pa.ChunkedArray:
    try:
        return pc.cast(column, wanted)
    except pa.ArrowInvalid as error:
        raise ExampleFileError(
            f"column {name} does not hold {wanted.list_size} numbers in each row: {error}"
        ) from error


def _iter_ndjson(source: IO[bytes], types: Mapping[str, pa.DataType], rows: int, path: str) -> Iterator[pa.Table]:
    numbered = ((number, line) for number, line in enumerate(source, start=1) if line.strip())
    while lines := list(itertools.islice(numbered, rows)):
        objects = [_parse_line(line, f"{path}, line {number}") for number, line in lines]
        yield _rows_table(objects, types, [f"{path}, line {number}" for number, _ in lines])


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ExampleFileError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExampleFileError(f"{where} holds no JSON object")
    return value


def _rows_table(objects: list[dict[str, Any]], types: Mapping[str, pa.DataType], places: list[str]) -> pa.Table:
    names = dict.fromkeys(name for row in objects for name in row)
    columns = {}
    for name in names:
        wanted = types.get(name)
        if wanted is None:
            where = next(place for place, row in zip(places, objects, strict=True) if name in row)
            raise ExampleFileError(f"{where}: the dataset has no feature {name!r}; declare it with das dataset put")
        columns[name] = _column([row.get(name) for row in objects], wanted, name, places)
    return pa.table(columns)


def _column(values: list[Any], wanted: pa.DataType, name: str, places: list[str]) -> pa.Array:
    try:
        return _array(values, wanted)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        for value, place in zip(values, places, strict=True):
            try:
                _array([value], wanted)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                raise ExampleFileError(f"{place}: {name} is {json.dumps(value)[:80]}, not {_words(wanted)}") from error
        raise


def _array(values: list[Any], wanted: pa.DataType) -> pa.Array:
    _refuse_other_types(values, wanted)
    if wanted == TIMESTAMP:
        return pa.array([None if value is None else _moment(value) for value in values], TIMESTAMP)
    return pa.array(values, wanted)


def _refuse_other_types(values: Iterable[Any], wanted: pa.DataType) -> None:
    """Refuse what pyarrow would bend into the type: 1.5 into an integer, a text into a list of letters.

    Raises:
        TypeError: A value has another JSON type than wanted.
    """
    if pa.types.is_list(wanted) or pa.types.is_fixed_size_list(wanted):
        kinds: set[type] = {list}
        present = [value for value in values if value is not None]
    else:
        kinds = _JSON_TYPES.get(str(wanted), {str})
        present = []
    if not set(map(type, values)) <= {*kinds, type(None)}:
        raise TypeError(f"a value is not {_words(wanted)}")
    if present:
        _refuse_other_types(itertools.chain.from_iterable(present), wanted.value_type)


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("there is no UTC offset")
    return moment


def _words(kind: pa.DataType) -> str:
    if kind == TIMESTAMP:
        return "a time with an offset, such as 2026-01-31T12:00:00Z"
    if pa.types.is_fixed_size_list(kind):
        return f"a list of {kind.list_size} numbers"
    if pa.types.is_list(kind):
        return f"a list, each of them {_words(kind.value_type)}"
    return {"double": "a number", "float": "a number", "int64": "an integer"}.get(str(kind), "a string")
