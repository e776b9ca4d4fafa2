"""Hashes equal the reference xxhash, and do not depend on how Arrow happens to lay the rows out."""

import struct

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from schemas.hashing import content_hash, feature_seed, hash_values, xxh64_int64

INT64 = st.integers(-(2**63), 2**63 - 1)
SEED = st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=40)
FLOAT = st.floats(allow_nan=False)
KINDS = {
    "f": (pa.float64(), FLOAT),
    "i": (pa.int64(), INT64),
    "s": (pa.string(), TEXT),
    "ls": (pa.list_(pa.string()), st.lists(st.one_of(st.none(), TEXT), max_size=4)),
    "li": (pa.list_(pa.int64()), st.lists(INT64, max_size=4)),
    "v": (pa.binary(12), st.binary(min_size=12, max_size=12)),
}
ROW = st.fixed_dictionaries({name: st.one_of(st.none(), values) for name, (_, values) in KINDS.items()})


def build_table(rows: list[dict[str, object]]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, (kind, _) in KINDS.items()})


def row_hashes(table: pa.Table) -> list[int]:
    return content_hash(table, table.column_names).tolist()


def test_a_feature_seed_is_xxh64_of_the_name() -> None:
    assert feature_seed("user_id") == xxhash.xxh64(b"user_id").intdigest()


@given(st.lists(INT64), SEED)
def test_int64_hashes_equal_xxhash(values: list[int], seed: int) -> None:
    expected = [xxhash.xxh64_intdigest(struct.pack("<q", value), seed) for value in values]
    assert xxh64_int64(np.array(values, np.int64), seed).tolist() == expected


@given(st.lists(st.text(max_size=60)), SEED)
def test_string_hashes_equal_xxhash(values: list[str], seed: int) -> None:
    expected = [xxhash.xxh64_intdigest(value.encode(), seed) for value in values]
    assert hash_values(pa.array(values, pa.string()), seed).tolist() == expected


@given(st.lists(st.one_of(st.none(), TEXT), min_size=1), SEED, st.data())
def test_a_dictionary_hashes_as_its_plain_array_also_sliced(
    values: list[str | None], seed: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(values)))
    plain = pa.array(values, pa.string()).slice(start)
    present = np.array([value is not None for value in values[start:]], bool)
    expected = hash_values(plain, seed)[present].tolist()
    for other in (plain.dictionary_encode(), pa.array(values, pa.string()).dictionary_encode().slice(start)):
        assert hash_values(other, seed)[present].tolist() == expected


def test_a_number_that_is_no_category_is_refused() -> None:
    with pytest.raises(TypeError, match="a category is an int64 or a string"):
        hash_values(pa.array([1.5]), 0)


@given(st.lists(ROW, min_size=1, max_size=12), st.data())
def test_row_hashes_do_not_depend_on_chunks_slices_or_column_order(
    rows: list[dict[str, object]], data: st.DataObject
) -> None:
    whole = build_table(rows)
    cut = data.draw(st.integers(0, len(rows)))
    expected = row_hashes(whole)
    assert row_hashes(pa.concat_tables([whole.slice(0, cut), whole.slice(cut)])) == expected
    assert row_hashes(whole.slice(cut)) == expected[cut:]
    assert row_hashes(whole.select(list(reversed(whole.column_names)))) == expected
    batch = whole.to_batches()[0].slice(cut)  # a batch keeps the offset of a slice, a table's columns are copied
    assert content_hash(batch, whole.column_names).tolist() == expected[cut:]


@given(st.lists(ROW, min_size=2, max_size=12))
def test_rows_have_equal_hashes_just_when_they_are_equal(rows: list[dict[str, object]]) -> None:
    hashes = row_hashes(build_table(rows))
    for i, first in enumerate(rows):
        for j, second in enumerate(rows):
            assert (hashes[i] == hashes[j]) == (first == second)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        (pa.float64(), None, 0.0),
        (pa.int64(), None, 0),
        (pa.string(), None, ""),
        (pa.list_(pa.string()), None, []),
        (pa.list_(pa.string()), [], [""]),
        (pa.list_(pa.string()), [], [None]),
        (pa.list_(pa.string()), [None], [""]),
        (pa.list_(pa.string()), ["a", None], [None, "a"]),
        (pa.list_(pa.string()), ["a", "b"], ["b", "a"]),
        (pa.list_(pa.string()), ["ab"], ["a", "b"]),
        (pa.list_(pa.int64()), [1], [1, 1]),
        (pa.binary(8), None, bytes(8)),
        (pa.binary(16), bytes(8) + b"\x01" * 8, b"\x01" * 8 + bytes(8)),
    ],
)
def test_values_that_differ_have_different_hashes(kind: pa.DataType, first: object, second: object) -> None:
    one, other = row_hashes(pa.table({"x": pa.array([first, second], kind)}))
    assert one != other


def test_minus_zero_is_zero() -> None:
    one, other = row_hashes(pa.table({"x": [0.0, -0.0]}))
    assert one == other


def test_a_value_counts_for_the_column_it_stands_in() -> None:
    here, there = row_hashes(pa.table({"x": pa.array(["a", None]), "y": pa.array([None, "a"])}))
    assert here != there


def test_a_column_of_nulls_is_as_no_column() -> None:
    table = pa.table({"x": ["a", "b"]})
    grown = table.append_column("added", pa.array([None, None], pa.string()))
    assert row_hashes(grown) == row_hashes(table)


def test_a_dictionary_column_is_its_plain_column_even_with_null_in_the_dictionary() -> None:
    values = pa.array([None, "a"])
    odd = pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), values)
    assert row_hashes(pa.table({"x": odd})) == row_hashes(pa.table({"x": pa.array([None, "a", None])}))


def test_no_rows_give_no_hashes() -> None:
    assert row_hashes(build_table([])) == []


def test_content_hashes_stay_what_they_were() -> None:
    table = build_table([{"f": 1.5, "i": -7, "s": "é", "ls": ["a", None], "li": [1, 2], "v": bytes(range(12))}])
    assert row_hashes(table) == [4190998305954572874]
