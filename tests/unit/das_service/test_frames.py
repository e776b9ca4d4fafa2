"""What a caller's table is while supervision is put beside it: the same rows of the same kind."""

from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_service.client.frames import cut_at_days, join_keys, own_table, refuse_collision, with_columns

NOON = pd.Timestamp("2026-03-01T12:00:00Z")
MINE = pa.table({"mine": [1.5, None], "event_time": [NOON, NOON], "example_id": ["a", "b"]})
ADDED = pa.table(
    {
        "f__status": pa.array(["present", "missing"]).dictionary_encode(),
        "f__click__logit": pa.array([0.5, None], pa.float32()),
        "f__hidden": pa.array([np.array([1, 2], np.float16), None], pa.list_(pa.float16(), 2)),
    }
)
ADDED_ROWS = [[0.5, [1.0, 2.0]], [None, None]]
FRAMES = {"pandas": MINE.to_pandas(), "polars": pl.from_arrow(MINE), "arrow": MINE}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_table_that_is_returned_as_its_kind_is_left_as_it_is(kind: str) -> None:
    assert own_table(FRAMES[kind]) is FRAMES[kind]


@pytest.mark.parametrize(
    "data",
    [MINE.to_batches()[0], MINE.to_reader(), MINE.to_pylist(), MINE.to_pydict()],
    ids=lambda data: type(data).__name__,
)
def test_anything_else_that_holds_a_table_becomes_an_arrow_table_once(data: Any) -> None:
    table = own_table(data)
    assert isinstance(table, pa.Table)
    assert with_columns(table, ADDED).num_rows == join_keys(table).num_rows == 2


def test_a_query_of_duckdb_becomes_an_arrow_table() -> None:
    with duckdb.connect() as db:
        table = own_table(db.from_arrow(MINE))
    assert join_keys(table)["example_id"].to_pylist() == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (pl.LazyFrame({"example_id": ["a"]}), "collect() it first"),
        (pl.Series(["a"]), "a Series is one column"),
        (pd.Series(["a"]), "a Series is one column"),
        ("clicks.parquet", "str is no table"),
    ],
)
def test_what_is_no_table_is_refused_with_a_hint(data: Any, hint: str) -> None:
    with pytest.raises(TypeError) as error:
        own_table(data)
    assert hint in str(error.value)


@pytest.mark.parametrize("kind", FRAMES)
def test_only_the_keys_are_taken(kind: str) -> None:
    keys = join_keys(FRAMES[kind])
    assert keys.column_names == ["example_id", "event_time"]
    assert keys["example_id"].to_pylist() == ["a", "b"]
    assert keys.schema.field("event_time").type.tz == "UTC"


@pytest.mark.parametrize("kind", FRAMES)
def test_missing_keys_are_named_beside_the_columns_there_are(kind: str) -> None:
    only = FRAMES[kind][["mine"]] if kind == "pandas" else FRAMES[kind].select(["mine"])
    with pytest.raises(ValueError, match="no column example_id and no column event_time; its columns: mine"):
        join_keys(only)


@pytest.mark.parametrize("kind", FRAMES)
def test_a_column_with_the_name_of_an_added_one_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="would be added: mine; rename or drop"):
        refuse_collision(FRAMES[kind], ["mine", "yours"])


@pytest.mark.parametrize("index", [[7, 7], pd.MultiIndex.from_tuples([("x", 1), ("y", 2)])], ids=["repeated", "multi"])
def test_a_pandas_frame_keeps_its_index_columns_and_types(index: Any) -> None:
    frame = FRAMES["pandas"].set_index(pd.Index(index)).rename(columns={"mine": 0})
    joined = with_columns(frame, ADDED)
    pd.testing.assert_frame_equal(joined[list(frame.columns)], frame)
    assert [str(kind) for kind in joined.dtypes[3:]] == ["category", "float32", "object"]
    assert joined["f__status"].tolist() == ["present", "missing"]
    np.testing.assert_array_equal(joined["f__click__logit"], [0.5, np.nan])
    assert joined["f__hidden"].iloc[0].tolist() == [1.0, 2.0]
    assert joined["f__hidden"].iloc[1] is None


def test_a_polars_frame_gets_polars_types() -> None:
    joined = with_columns(FRAMES["polars"], ADDED)
    assert joined.select(MINE.column_names).equals(FRAMES["polars"])
    assert joined.schema["f__status"] == pl.Categorical
    assert joined.schema["f__hidden"] == pl.Array(pl.Float16, 2)
    assert [list(row) for row in joined.select("f__click__logit", "f__hidden").rows()] == ADDED_ROWS
    assert joined["f__hidden"].to_numpy().shape == (2, 2)


def test_an_arrow_table_gets_the_columns_as_they_are() -> None:
    joined = with_columns(MINE, ADDED)
    assert joined.select(MINE.column_names).equals(MINE)
    assert joined.select(ADDED.column_names).equals(ADDED)


@given(
    st.lists(st.integers(-3, 3), max_size=40).map(sorted) | st.lists(st.integers(-3, 3), max_size=40),
    st.integers(1, 12),
    st.sampled_from([pa.timestamp("us", "UTC"), pa.timestamp("s"), pa.timestamp("ns", "Asia/Tokyo"), pa.string()]),
)
def test_pieces_cover_the_table_in_order_and_end_with_a_day_where_one_ends_late(
    days: list[int], most_rows: int, kind: pa.DataType
) -> None:
    times = pa.array(days, pa.int64()).cast(pa.int64())
    table = pa.table(
        {
            "example_id": [str(i) for i in range(len(days))],
            "event_time": pc.multiply(times, 86_400).cast(pa.timestamp("s")).cast(kind)
            if kind != pa.string()
            else pa.array(["soon"] * len(days), kind),
        }
    )

    pieces = cut_at_days(table, most_rows=most_rows)

    assert pa.concat_tables(piece for _, piece in pieces).equals(table)
    assert [first for first, _ in pieces] == [0, *np.cumsum([piece.num_rows for _, piece in pieces])[:-1]]
    assert all(piece.num_rows <= most_rows for _, piece in pieces)
    for first, piece in pieces[:-1]:
        late = range(first + most_rows // 2 + 1, first + most_rows)
        changes = [i for i in late if days[i] != days[i - 1]] if kind != pa.string() else []
        assert first + piece.num_rows == (changes[-1] if changes else first + most_rows)
