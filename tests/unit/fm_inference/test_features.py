"""Tensors equal what a loop over Python values gives, however Arrow lays the columns out."""

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fm_inference.features import FeatureError, build_tensors
from fm_inference.vocabulary import Vocabulary
from schemas.snapshot import Input

BUCKETS, PAD_TO, SIZE = 97, 3, 2
WORDS = ["", "a", "b", "ß", "東京", "x" * 40]
TEXT = st.one_of(st.none(), st.sampled_from(WORDS), st.text("abc", max_size=4))
INTEGER = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.integers(0, 3))
FLOAT = st.one_of(st.none(), st.floats(width=32, allow_nan=False))
VECTOR = st.one_of(st.none(), st.lists(st.floats(width=32, allow_nan=False), min_size=SIZE, max_size=SIZE))
ROW = st.fixed_dictionaries(
    {
        "word": TEXT,
        "number": INTEGER,
        "x": FLOAT,
        "y": FLOAT,
        "vector": VECTOR,
        "words": st.one_of(st.none(), st.lists(TEXT, max_size=5)),
        "numbers": st.one_of(st.none(), st.lists(INTEGER, max_size=5)),
    }
)
INPUTS = [
    Input.model_validate(each)
    for each in (
        {"tensor": "cat", "features": ["word", "number"], "encode": {"kind": "hash", "buckets": BUCKETS}},
        {"tensor": "cat2", "features": ["word"], "encode": {"kind": "hash", "buckets": 7}},
        {"tensor": "known", "features": ["number", "word"], "encode": {"kind": "vocabulary", "file": "v.txt"}},
        {"tensor": "dense", "features": ["x", "vector", "y"], "encode": {"kind": "float", "null": -1.5}},
        {
            "tensor": "tags",
            "features": ["words"],
            "encode": {"kind": "hash", "buckets": BUCKETS, "pad_to": PAD_TO, "mask": "tags_mask"},
        },
        {
            "tensor": "ids",
            "features": ["numbers"],
            "encode": {"kind": "vocabulary", "file": "v.txt", "pad_to": PAD_TO, "mask": "ids_mask"},
        },
    )
]
VOCABULARY = [*WORDS, 0, -(2**63), 2**63 - 1]
VOCABULARIES = {"v.txt": Vocabulary(VOCABULARY)}
LOG_TYPES = {
    "word": pa.string(),
    "number": pa.int64(),
    "x": pa.float64(),
    "y": pa.float64(),
    "vector": pa.binary(4 * SIZE),
    "words": pa.list_(pa.string()),
    "numbers": pa.list_(pa.int64()),
}
TRAINER_TYPES = LOG_TYPES | {
    "word": pa.dictionary(pa.int32(), pa.string()),
    "x": pa.float32(),
    "vector": pa.list_(pa.float32(), SIZE),
    "words": pa.large_list(pa.large_string()),
    "numbers": pa.list_(pa.int32()),
}


def bucket(name: str, value: object, buckets: int) -> int:
    if value is None:
        return 0
    packed = value.encode() if isinstance(value, str) else int(str(value)).to_bytes(8, "little", signed=True)
    return xxhash.xxh64_intdigest(packed, xxhash.xxh64_intdigest(name.encode())) % buckets


def known(value: object) -> int:
    return (
        0 if value is None or str(value) not in map(str, VOCABULARY) else [*map(str, VOCABULARY)].index(str(value)) + 1
    )


def padded(values: list[int]) -> list[int]:
    return (values + [0] * PAD_TO)[:PAD_TO]


def expected_tensors(rows: list[dict[str, object]]) -> dict[str, list[list[object]]]:
    """The contract, one row and one value at a time."""
    result: dict[str, list[list[object]]] = {name: [] for name in
        ("cat", "cat2", "known", "dense", "tags", "tags_mask", "ids", "ids_mask")}  # fmt: skip
    for row in rows:
        result["cat"].append([bucket("word", row["word"], BUCKETS), bucket("number", row["number"], BUCKETS)])
        result["cat2"].append([bucket("word", row["word"], 7)])
        result["known"].append([known(row["number"]), known(row["word"])])
        vector = row["vector"] or [-1.5] * SIZE
        result["dense"].append([-1.5 if v is None else v for v in (row["x"], *vector, row["y"])])
        words, numbers = row["words"] or [], row["numbers"] or []
        result["tags"].append(padded([bucket("words", word, BUCKETS) for word in words]))
        result["tags_mask"].append([place < len(words) for place in range(PAD_TO)])
        result["ids"].append(padded([known(number) for number in numbers]))
        result["ids_mask"].append([place < len(numbers) for place in range(PAD_TO)])
    return result


def build_columns(rows: list[dict[str, object]], types: dict[str, pa.DataType]) -> pa.Table:
    columns = {}
    for name, kind in types.items():
        values = [row[name] for row in rows]
        if pa.types.is_fixed_size_binary(kind):
            values = [None if value is None else np.array(value, "<f4").tobytes() for value in values]
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        columns[name] = pa.array(values, plain).cast(kind)
    return pa.table(columns)


def as_lists(tensors: dict[str, torch.Tensor]) -> dict[str, list[list[object]]]:
    return {name: value.tolist() for name, value in tensors.items()}


@given(st.lists(ROW, max_size=8), st.data())
def test_tensors_equal_the_row_by_row_reference_whole_sliced_and_chunked(
    rows: list[dict[str, object]], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(rows)))
    table = build_columns(rows, LOG_TYPES)
    for columns, there in (
        (table, rows),
        (table.slice(start), rows[start:]),
        (table.slice(0, start), rows[:start]),
        (pa.concat_tables([table.slice(start), table.slice(0, start)]), rows[start:] + rows[:start]),
    ):
        assert as_lists(build_tensors(columns, INPUTS, VOCABULARIES)) == expected_tensors(there)


@given(
    st.lists(ROW.filter(lambda row: max(map(abs, (n or 0 for n in row["numbers"] or [0]))) < 2**31), max_size=8),
    st.data(),
)
def test_a_trainers_types_give_the_same_tensors(rows: list[dict[str, object]], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(rows)))
    columns = build_columns(rows, TRAINER_TYPES).slice(start)
    assert as_lists(build_tensors(columns, INPUTS, VOCABULARIES)) == expected_tensors(rows[start:])


@given(st.lists(ROW, min_size=1, max_size=8), st.data())
def test_a_slice_of_a_record_batch_gives_its_own_rows(rows: list[dict[str, object]], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(rows)))
    batch = build_columns(rows, LOG_TYPES).to_batches()[0].slice(start)
    assert as_lists(build_tensors(batch, INPUTS, VOCABULARIES)) == expected_tensors(rows[start:])


def test_shapes_and_dtypes() -> None:
    tensors = build_tensors(build_columns([], LOG_TYPES), INPUTS, VOCABULARIES)
    assert {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()} == {
        "cat": ((0, 2), torch.int64),
        "cat2": ((0, 1), torch.int64),
        "known": ((0, 2), torch.int64),
        "dense": ((0, 4), torch.float32),
        "tags": ((0, PAD_TO), torch.int64),
        "tags_mask": ((0, PAD_TO), torch.bool),
        "ids": ((0, PAD_TO), torch.int64),
        "ids_mask": ((0, PAD_TO), torch.bool),
    }


def test_a_record_batch_is_as_good_as_a_table() -> None:
    rows = [{"word": "a", "number": 1, "x": 1.0, "y": None, "vector": None, "words": ["b"], "numbers": []}]
    batch = build_columns(rows, LOG_TYPES).to_batches()[0]
    assert as_lists(build_tensors(batch, INPUTS, VOCABULARIES)) == expected_tensors(rows)


def test_a_slice_of_a_batch_of_float_lists_gives_its_own_rows() -> None:
    batch = pa.record_batch({"v": pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2))})
    wanted = Input.model_validate({"tensor": "t", "features": ["v"], "encode": {"kind": "float", "null": 9.0}})
    assert build_tensors(batch.slice(1), [wanted])["t"].tolist() == [[9.0, 9.0], [3.0, 4.0]]


def test_a_null_inside_a_vector_is_the_null_value() -> None:
    table = pa.table({"v": pa.array([[1.0, None]], pa.list_(pa.float32(), 2))})
    wanted = Input.model_validate({"tensor": "t", "features": ["v"], "encode": {"kind": "float", "null": 9.0}})
    assert build_tensors(table, [wanted])["t"].tolist() == [[1.0, 9.0]]


def test_null_in_a_dictionary_is_a_null_like_any_other() -> None:
    odd = pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array([None, "a"]))
    wanted = Input.model_validate({"tensor": "t", "features": ["v"], "encode": {"kind": "hash", "buckets": 50}})
    assert build_tensors(pa.table({"v": odd}), [wanted])["t"].tolist() == [[0], [bucket("v", "a", 50)], [0]]


def test_a_number_beyond_float32_is_infinite() -> None:
    wanted = Input.model_validate({"tensor": "t", "features": ["x"], "encode": {"kind": "float"}})
    assert build_tensors(pa.table({"x": [1e300]}), [wanted])["t"].tolist() == [[float("inf")]]


def test_the_hash_of_the_contract_is_the_one_that_xxhash_gives() -> None:
    wanted = Input.model_validate(
        {"tensor": "t", "features": ["user_id"], "encode": {"kind": "hash", "buckets": 10**9}}
    )
    seed = xxhash.xxh64(b"user_id").intdigest()
    assert (
        build_tensors(pa.table({"user_id": ["u1"]}), [wanted])["t"].item()
        == xxhash.xxh64(b"u1", seed).intdigest() % 10**9
    )


HASH = {"kind": "hash", "buckets": 5}


@pytest.mark.parametrize(
    ("features", "encode", "message"),
    [
        (["nowhere"], HASH, "nowhere: there is no such column"),
        (["x"], HASH, "x: a hash takes strings or int64"),
        (["words"], HASH, "words: a list needs pad_to"),
        (["word"], HASH | {"pad_to": 2}, "word: pad_to is for lists"),
        (["words", "numbers"], HASH | {"pad_to": 2}, "pad_to takes one category_list"),
        (["word"], {"kind": "float"}, "word: a float takes numbers or vectors"),
        (["word"], {"kind": "vocabulary", "file": "w.txt"}, "word: the vocabulary w.txt is not given"),
    ],
)
def test_columns_that_do_not_fit_are_refused(features: list[str], encode: dict[str, object], message: str) -> None:
    wanted = Input.model_validate({"tensor": "t", "features": features, "encode": encode})
    with pytest.raises(FeatureError, match=message):
        build_tensors(build_columns([], LOG_TYPES), [wanted], VOCABULARIES)


def test_a_column_that_is_there_twice_is_refused() -> None:
    twice = pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0])], names=["x", "x"])
    wanted = Input.model_validate({"tensor": "t", "features": ["x"], "encode": {"kind": "float"}})
    with pytest.raises(FeatureError, match="there are several such columns"):
        build_tensors(twice, [wanted])
