"""Files of examples: every format gives the same rows, and what is wrong is said with its place."""

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from das_service.cli.example_files import ExampleFileError, example_types, open_examples

SPEC: dict[str, Any] = {
    "features": [
        {"name": "price", "type": "float"},
        {"name": "user_id", "type": "category", "value_type": "string"},
        {"name": "item", "type": "category", "value_type": "int64", "nullable": True},
        {"name": "tags", "type": "category_list", "value_type": "string", "max_length": 4},
        {"name": "image", "type": "vector", "size": 2},
    ]
}
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
TYPES = {
    "example_id": pa.string(),
    "event_time": pa.timestamp("us", "UTC"),
    "price": pa.float64(),
    "user_id": pa.string(),
    "item": pa.int64(),
    "tags": pa.list_(pa.string()),
    "image": pa.list_(pa.float32(), 2),
}
ROWS = [
    {"example_id": f"e{i}", "event_time": NOON, "price": i / 2, "user_id": "u", "item": None if i % 2 else i,
     "tags": ["a"] * (i % 3), "image": [float(i), 0.5]}
    for i in range(7)
]  # fmt: skip
TABLE = pa.Table.from_pylist(ROWS, schema=pa.schema(TYPES))


def ndjson() -> bytes:
    return b"".join(json.dumps({**row, "event_time": "2026-01-31T13:00:00+01:00"}).encode() + b"\n" for row in ROWS)


def arrow_stream() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue().to_pybytes()


def arrow_file() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def read(path: str, *, stdin: bytes = b"", rows: int = 3, file_format: Any = None) -> pa.Table:
    with open_examples(
        path, stdin=io.BytesIO(stdin), file_format=file_format, types=example_types(SPEC), rows=rows
    ) as examples:
        return pa.concat_tables(examples.tables)


@pytest.mark.parametrize("content", [ndjson, arrow_stream, arrow_file, parquet])
@pytest.mark.parametrize("suffix", ["right", "none"])
def test_every_format_gives_the_same_rows(tmp_path: Path, content: Callable[[], bytes], suffix: str) -> None:
    names = {ndjson: "ndjson", arrow_stream: "arrows", arrow_file: "arrow", parquet: "parquet"}
    path = tmp_path / (f"rows.{names[content]}" if suffix == "right" else "rows")
    path.write_bytes(content())
    assert read(str(path)).equals(TABLE)


@pytest.mark.parametrize("content", [ndjson, arrow_stream])
def test_a_pipe_gives_the_same_rows(content: Callable[[], bytes]) -> None:
    assert read("-", stdin=content()).equals(TABLE)


def test_a_named_format_wins_over_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(ndjson())
    assert read(str(path), file_format="ndjson").equals(TABLE)


def test_parquet_says_how_many_rows_there_are_and_comes_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet())
    with open_examples(str(path), stdin=io.BytesIO(), file_format=None, types=example_types(SPEC), rows=3) as examples:
        assert examples.num_rows == 7
        assert max(table.num_rows for table in examples.tables) <= 3


def test_a_list_of_any_floats_becomes_the_declared_vector(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    place = TABLE.schema.get_field_index("image")
    loose = TABLE.set_column(place, "image", TABLE["image"].cast(pa.list_(pa.float64())))
    pq.write_table(loose, path)
    assert read(str(path)).equals(TABLE)


def test_a_vector_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"example_id": ["a"], "image": pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float64()))}), path)
    with pytest.raises(ExampleFileError, match="column image does not hold 2 numbers in each row"):
        read(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"example_id": "a"', "line 2 is not JSON"),
        ("[1]", "line 2 holds no JSON object"),
        ('{"example_id": "a", "prize": 1}', "line 2: the dataset has no feature 'prize'"),
        ('{"example_id": "a", "price": "dear"}', 'line 2: price is "dear", not a number'),
        ('{"example_id": "a", "price": true}', "line 2: price is true, not a number"),
        ('{"example_id": 7}', "line 2: example_id is 7, not a string"),
        ('{"example_id": "a", "item": 1.5}', "line 2: item is 1.5, not an integer"),
        ('{"example_id": "a", "item": 9223372036854775808}', "line 2: item is 9223372036854775808, not an integer"),
        ('{"example_id": "a", "tags": "x"}', 'line 2: tags is "x", not a list, each of them a string'),
        ('{"example_id": "a", "image": [1]}', r"line 2: image is \[1\], not a list of 2 numbers"),
        ('{"example_id": "a", "event_time": "2026-01-31T12:00:00"}', "not a time with an offset"),
        ('{"example_id": "a", "event_time": "noon"}', "not a time with an offset"),
        ('{"example_id": "a", "event_time": 7}', "not a time with an offset"),
    ],
)
def test_a_bad_line_is_named_with_its_value(line: str, message: str) -> None:
    with pytest.raises(ExampleFileError, match=message):
        read("-", stdin=b'{"example_id": "ok", "price": null}\n' + line.encode(), file_format="ndjson")


def test_blank_lines_are_nothing() -> None:
    assert read("-", stdin=b'\n{"example_id": "a"}\n\n').to_pylist() == [{"example_id": "a"}]


def test_parquet_needs_a_file() -> None:
    with pytest.raises(ExampleFileError, match="can't be read from a pipe"):
        read("-", stdin=parquet())


def test_an_unknown_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("example_id,price\na,1\n")
    with pytest.raises(ExampleFileError, match="say which with --format"):
        read(str(path))
