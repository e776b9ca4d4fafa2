"""Entries become rows, and rows of `examples` become the chunk again that they came in with."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest

from das_service.sink.table_rows import (
    NewerSchemaError,
    example_chunk,
    example_rows,
    examples_content,
    supervision_rows,
)
from schemas import keys
from schemas.dataset import TIMESTAMP, DatasetSpec, example_schema
from schemas.entries import Entry, Position, encode_batch, fingerprint
from schemas.snapshot import OutputColumns, scored_schema

SPEC = DatasetSpec.model_validate(
    {
        "features": [
            {"name": "price", "type": "float", "nullable": True},
            {"name": "item", "type": "category", "value_type": "int64", "nullable": True},
            {"name": "tags", "type": "category_list", "value_type": "string", "max_length": 4, "nullable": True},
            {"name": "image", "type": "vector", "size": 1, "nullable": True},
        ]
    }
)
OUTPUTS = OutputColumns(tasks=("click",), embeddings={"hidden": (1, "float32")})
NOON_US = 1_772_366_400_000_000


def entry(batch: pa.RecordBatch, seq: int, *, num_features: int = 0, **meta: object) -> Entry:
    return Entry(
        position=Position(epoch=2, seq=seq),
        num_features=num_features,
        num_rows=batch.num_rows,
        taken_at_us=NOON_US + seq,
        rows_total=0,
        bytes_total=0,
        meta=meta,
        fingerprint=fingerprint(batch.schema),
        data=encode_batch(batch),
    )


def chunk(rows: list[tuple[str, float | None, int | None, list[str] | None, bytes | None]], features: int = 4) -> pa.RecordBatch:  # fmt: skip  # noqa: E501
    ids = pa.array([row[0] for row in rows], pa.string())
    schema = example_schema(SPEC, num_features=features)
    times = pa.array([NOON_US] * len(rows), pa.int64()).cast(TIMESTAMP)
    values = [pa.array([row[1 + i] for row in rows], schema.field(3 + i).type) for i in range(features)]
    return pa.RecordBatch.from_arrays([ids, keys.digest_array(ids), times, *values], schema=schema)


FULL = chunk([("a", 1.5, 7, ["x", None], b"abcd"), ("b", None, None, None, None), ("c", 0.0, 0, [], b"\0" * 4)])


def test_rows_of_examples_become_their_chunk_again() -> None:
    rows = example_rows([entry(FULL, 0, num_features=4)], SPEC)
    assert example_chunk(rows, SPEC).equals(FULL)


def test_each_row_says_where_and_when_its_entry_was_logged() -> None:
    rows = example_rows([entry(FULL, 3, num_features=4), entry(FULL.slice(0, 1), 4, num_features=4)], SPEC)
    assert rows["log_position"].to_pylist() == [(1 << 40) | 3] * 3 + [(1 << 40) | 4]
    assert rows["received_at"].cast(pa.int64()).to_pylist() == [NOON_US + 3] * 3 + [NOON_US + 4]
    assert rows["event_day"].to_pylist() == [dt.date(2026, 3, 1)] * 4
    expected = keys.example_hashes(FULL.column("example_digest"))
    assert np.array_equal(rows["_example_hash"].to_numpy()[:3], expected)


def test_features_that_an_older_entry_lacks_are_null_and_do_not_change_its_content() -> None:
    older = chunk([("a", 1.5, None, None, None)], features=1)
    newer = chunk([("a", 1.5, None, None, None)])
    rows = example_rows([entry(older, 0, num_features=1), entry(newer, 1, num_features=4)], SPEC)
    assert rows["item"].to_pylist() == [None, None]
    assert len(set(rows["content_hash"].to_pylist())) == 1


def test_features_that_are_not_known_yet_are_refused() -> None:
    content = examples_content(SPEC)
    with pytest.raises(NewerSchemaError):
        content.event_days_of(entry(FULL, 0, num_features=5))


def test_supervision_says_which_snapshot_scored_it_and_when() -> None:
    ids = pa.array(["a", "b"])
    columns = [
        ids, keys.digest_array(ids), pa.array([NOON_US] * 2, pa.int64()).cast(TIMESTAMP),
        pa.array([0.25, -1.0], pa.float32()), pa.array([b"abcd", b"efgh"], pa.binary(4)),
    ]  # fmt: skip
    batch = pa.RecordBatch.from_arrays(columns, schema=scored_schema(OUTPUTS))
    scored = entry(batch, 0, snapshot_id="s1", trained_through=NOON_US - 10, scored_at=NOON_US + 5, fm="f")
    row = supervision_rows([scored], OUTPUTS, "day").to_pylist()[1]
    moment = dt.datetime.fromtimestamp(NOON_US // 10**6, dt.UTC)
    assert {name: value for name, value in row.items() if name != "_example_hash"} == {
        "example_id": "b", "event_time": moment, "snapshot_id": "s1",
        "trained_through": moment - dt.timedelta(microseconds=10), "scored_at": moment + dt.timedelta(microseconds=5),
        "available_at": moment, "log_position": 1 << 40, "event_day": moment.date(),
        "click__logit": -1.0, "hidden": b"efgh", "_is_shadow": False, "_is_backfill": False,
    }  # fmt: skip
