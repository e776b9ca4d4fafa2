"""Rows through the door: laws that hold for any rows, and the forms that columns may have."""

import json
import math
import struct
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_service.door import columns
from das_service.door.json_body import parse_rows
from das_service.door.validation import BodyLimits, ValidRows, validate_arrow, validate_json
from das_service.errors import InvalidRowsError, TooLargeError
from das_service.ingest import CHUNK_BYTES, CHUNK_ROWS, encode_chunks, split_by_partition
from schemas import keys
from schemas.dataset import DatasetSpec, example_schema
from schemas.identity import Identity
from tests.served import NOON, NOON_US, SPEC, arrow_body, examples, examples_table

LIMITS = BodyLimits(max_rows=100_000, max_decoded_bytes=64_000_000)
ADS = DatasetSpec.model_validate(SPEC)


def of_arrow(table: pa.Table, spec: DatasetSpec = ADS, now_us: int = NOON_US) -> ValidRows:
    return validate_arrow(arrow_body(table), spec, limits=LIMITS, now_us=now_us)


def of_json(rows: list[dict[str, Any]], spec: DatasetSpec = ADS) -> ValidRows:
    return validate_json(json.dumps({"examples": rows}).encode(), spec, limits=LIMITS, now_us=NOON_US)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.uint16(), pa.large_string())]
)
def test_text_of_every_type_is_the_same_rows(kind: pa.DataType) -> None:
    words = ["é", "", "long " * 20, "é"]
    plain = of_arrow(examples_table(0, 4, user_id=words))
    other = of_arrow(examples_table(0, 4, user_id=pa.array(words).cast(kind)))

    assert other.batch.equals(plain.batch)
    assert other.batch.schema == example_schema(ADS)


@pytest.mark.parametrize("value", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_lists_of_every_type_are_the_same_rows(value: pa.DataType, *, is_large: bool, is_dictionary: bool) -> None:
    tags = [["a", "bb"], None, [], ["a"]]
    flat = pa.array(["a", "bb", "a"]).cast(value)
    if is_dictionary:
        words = pa.array(["a", "bb"]).cast(value)
        flat = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int8()), words)
    make, offset = (pa.LargeListArray, pa.int64()) if is_large else (pa.ListArray, pa.int32())
    mask = pa.array([False, True, False, False])
    made = make.from_arrays(pa.array([0, 2, 2, 2, 3], offset), flat, mask=mask)

    rows = of_arrow(examples_table(0, 4, tags=made))

    assert rows.batch.column("tags").to_pylist() == tags
    assert rows.num_refused == 0


def test_many_batches_with_dictionaries_of_their_own_are_one_table() -> None:
    tables = [examples_table(i * 3, 3, user_id=pa.array([f"w{i}", "x", "x"]).dictionary_encode()) for i in range(5)]
    schema = tables[0].schema
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for table in tables:
            writer.write_table(table)

    rows = validate_arrow(sink.getvalue().to_pybytes(), ADS, limits=LIMITS, now_us=NOON_US)

    assert rows.batch.column("user_id").to_pylist() == [word for i in range(5) for word in (f"w{i}", "x", "x")]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "+05:30"])
def test_times_of_every_unit_and_zone_are_the_same_instant(unit: str, zone: str) -> None:
    rows = of_arrow(examples_table(0, 1, event_time=pa.array([NOON], pa.timestamp(unit, zone))))

    assert rows.batch.column("event_time").to_pylist() == [NOON]


def test_a_null_time_in_other_units_is_null_and_no_other_fault() -> None:
    for unit in ("s", "ms", "us", "ns"):
        rows = of_arrow(examples_table(0, 2, event_time=pa.array([NOON, None], pa.timestamp(unit, "UTC"))))
        assert [error["code"] for error in rows.errors] == ["null"]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_floats_of_either_width_are_the_same_values(kind: pa.DataType) -> None:
    largest = float(np.finfo(np.float32).max)
    values = pa.array([0.5, -largest, largest, -0.0], kind)

    whole = of_arrow(examples_table(0, 4, price=values))
    parts = [examples_table(0, 1, price=values[:1]), examples_table(1, 3, price=values[1:])]
    parted = of_arrow(pa.concat_tables(parts))

    assert whole.batch.column("price") == values.cast(pa.float64())
    assert parted.batch.column("price") == whole.batch.column("price")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.5e38])
def test_among_good_floats_only_what_no_model_can_take_is_refused(value: float) -> None:
    rows = of_arrow(examples_table(0, 3, price=pa.array([1.5, value, 2.5])))

    assert [error["row"] for error in rows.errors] == [1]
    assert rows.batch.column("price").to_pylist() == [1.5, 2.5]


def test_the_future_begins_after_the_allowed_skew() -> None:
    times = pa.array([NOON_US + 300_000_000, NOON_US + 300_000_001], pa.int64()).cast(pa.timestamp("us", "UTC"))

    rows = of_arrow(examples_table(0, 2, event_time=times))

    assert [(error["row"], error["code"]) for error in rows.errors] == [(1, "time_in_future")]


def test_null_vectors_and_sliced_tables_keep_their_rows() -> None:
    vectors = pa.array([[float(i)] * 4 if i % 3 else None for i in range(20)], pa.list_(pa.float32(), 4))
    for made in (vectors, vectors.cast(pa.list_(pa.float32()))):
        table = examples_table(0, 20, image=made).slice(5, 10)
        packed = of_arrow(table).batch.column("image").to_pylist()
        expected = [np.full(4, i, "<f4").tobytes() if i % 3 else None for i in range(5, 15)]
        assert packed == expected


def test_json_rows_count_the_columns_that_they_leave_out() -> None:
    features = [{"name": f"f{i}", "type": "float", "nullable": True} for i in range(300)]
    spec = DatasetSpec.model_validate({**SPEC, "entity_key": [], "features": features})
    rows = [{"example_id": f"e{i}", "event_time": "2026-03-01T12:00:00Z"} for i in range(50)]
    limits = BodyLimits(max_rows=100, max_decoded_bytes=110_000)
    body = json.dumps([{**rows[0], **{f"f{i}": 0 for i in range(300)}}, *rows[1:]]).encode()

    with pytest.raises(TooLargeError, match="decoded"):
        validate_json(body, spec, limits=limits, now_us=NOON_US)


def test_nan_under_a_null_is_no_fault() -> None:
    spec = DatasetSpec.model_validate({"features": [{"name": "price", "type": "float", "nullable": True}]})
    validity = pa.py_buffer(b"\x01")
    price = pa.Array.from_buffers(pa.float64(), 2, [validity, pa.py_buffer(np.array([1.0, math.nan]))])

    rows = of_arrow(examples_table(0, 2, user_id=None, price=price), spec)

    assert rows.batch.column("price").to_pylist() == [1.0, None]


def test_only_the_first_fault_of_a_row_is_told() -> None:
    rows = of_arrow(examples_table(0, 2, example_id=["", "b"], price=[math.nan, 1.0]))

    assert [(error["row"], error["column"], error["code"]) for error in rows.errors] == [(0, "example_id", "empty_id")]
    assert rows.refused_by_code == {"empty_id": 1}


def test_an_id_may_have_256_bytes() -> None:
    rows = of_arrow(examples_table(0, 2, example_id=["é" * 128, "é" * 128 + "x"]))

    assert [error["code"] for error in rows.errors] == ["too_long"]
    assert rows.batch.column("example_id").to_pylist() == ["é" * 128]


TIMES = {
    "2026-03-01T12:00:00Z": NOON,
    "2026-03-01t12:00:00z": NOON,
    "2026-03-01 12:00:00+00:00": NOON,
    "2026-03-01T13:30:00+01:30": NOON,
    "2026-03-01T06:00:00.000000000-06:00": NOON,
    "2026-03-01T12:00:00.5Z": NOON.replace(microsecond=500_000),
    "0001-01-01T00:00:00Z": datetime(1, 1, 1, tzinfo=UTC),
}


@pytest.mark.parametrize(("text", "instant"), TIMES.items())
def test_rfc_3339_times_are_read(text: str, instant: datetime) -> None:
    assert of_json(examples(0, 1, event_time=text)).batch.column("event_time").to_pylist() == [instant]


@pytest.mark.parametrize(
    "text", ["", "now", "2026-3-1T12:00:00Z", "2026-03-01T12:00Z", "2026-03-01T12:00:00", "20260301T120000Z",
             "2026-03-01T24:00:01Z", "2026-03-01T12:00:60Z", "2026-03-01T12:00:00+1:00", "\uff12026-03-01T12:00:00Z",
             " 2026-03-01T12:00:00Z", "2026-03-01T12:00:00Z\n", "2026-W09-7T12:00:00Z"],
)  # fmt: skip
def test_other_times_are_malformed(text: str) -> None:
    rows = of_json([*examples(0, 1), *examples(1, 1, event_time=text)])

    assert [(error["row"], error["code"]) for error in rows.errors] == [(1, "malformed_time")]


def test_an_integer_is_a_number_for_a_float() -> None:
    assert of_json(examples(0, 1, price=3)).batch.column("price").to_pylist() == [3.0]


def test_json_int64_reaches_its_ends() -> None:
    rows = of_json([*examples(0, 1, item=2**63 - 1), *examples(1, 1, item=-(2**63))])

    assert rows.batch.column("item").to_pylist() == [2**63 - 1, -(2**63)]


def test_columns_of_a_dataset_with_thousands_of_features_are_compared_once() -> None:
    spec = DatasetSpec.model_validate({"features": [{"name": f"f{i}", "type": "float"} for i in range(4096)]})
    table = pa.table({"example_id": ["a"], "event_time": pa.array([NOON], pa.timestamp("us", "UTC"))})

    with pytest.raises(InvalidRowsError) as caught:
        of_arrow(table, spec)
    assert len(caught.value.extra["columns"]) == 1000


ID = st.text(max_size=3)
PRICE = st.one_of(st.none(), st.floats())
ROW = st.fixed_dictionaries(
    {
        "example_id": st.one_of(st.none(), ID),
        "price": PRICE,
        "user_id": st.one_of(st.none(), ID),
        "item": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        "tags": st.one_of(st.none(), st.lists(st.one_of(st.none(), ID), max_size=5)),
    }
)


def faults_by_hand(rows: list[dict[str, Any]]) -> dict[int, str]:
    """The code of each bad row, by a loop."""
    seen: set[str] = set()
    bad = {}
    for number, row in enumerate(rows):
        code = _fault_of(row)
        if code is None and row["example_id"] in seen:
            code = "duplicate_in_request"
        if code is None:
            seen.add(row["example_id"])
        else:
            bad[number] = code
    return bad


def _fault_of(row: dict[str, Any]) -> str | None:
    if row["example_id"] is None:
        return "null"
    if row["example_id"] == "":
        return "empty_id"
    if row["price"] is None:
        return "null"
    if not math.isfinite(row["price"]):
        return "not_finite"
    if not _fits_float32(row["price"]):
        return "out_of_range"
    if row["user_id"] is None:
        return "null"
    tags = row["tags"] or []
    if len(tags) > 3:
        return "too_long"
    return "null_element" if None in tags else None


def _fits_float32(value: float) -> bool:
    try:
        struct.pack("<f", value)
    except OverflowError:
        return False
    return True


FLOAT32_MAX = (2 - 2**-23) * 2.0**127
FIRST_BEYOND_FLOAT32 = (2 - 2**-24) * 2.0**127  # half-way to 2**128, where rounding goes up


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_is_refused_from_where_float32_would_round_it_to_infinity(sign: int) -> None:
    last = math.nextafter(FIRST_BEYOND_FLOAT32, 0)
    prices = [sign * value for value in (FLOAT32_MAX, last, FIRST_BEYOND_FLOAT32, 1e308)]

    rows = of_arrow(examples_table(0, 4, price=prices))

    assert [(error["row"], error["code"]) for error in rows.errors] == [(2, "out_of_range"), (3, "out_of_range")]
    assert "float32" in rows.errors[0]["message"]
    assert rows.batch.column("price").to_pylist() == prices[:2]


@given(st.lists(ROW, min_size=1, max_size=8))
def test_bad_rows_are_those_that_a_loop_finds_in_arrow_and_json_alike(rows: list[dict[str, Any]]) -> None:
    table = pa.table(
        {
            "example_id": pa.array([row["example_id"] for row in rows], pa.string()),
            "event_time": pa.array([NOON] * len(rows), pa.timestamp("us", "UTC")),
            "price": pa.array([row["price"] for row in rows], pa.float64()),
            "user_id": pa.array([row["user_id"] for row in rows], pa.string()),
            "item": pa.array([row["item"] for row in rows], pa.int64()),
            "tags": pa.array([row["tags"] for row in rows], pa.list_(pa.string())),
        }
    )
    arrow = of_arrow(table)
    from_json = of_json([{**row, "event_time": "2026-03-01T12:00:00Z"} for row in rows])

    expected = faults_by_hand(rows)
    assert {error["row"]: error["code"] for error in arrow.errors} == expected
    assert arrow.errors == from_json.errors
    assert arrow.batch.equals(from_json.batch)
    kept = [row["example_id"] for number, row in enumerate(rows) if number not in expected]
    assert arrow.batch.column("example_id").to_pylist() == kept


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=60, unique=True), st.integers(1, 9))
def test_every_row_goes_to_its_partition_once_and_in_order(ids: list[str], partitions: int) -> None:
    batch = of_arrow(examples_table(0, len(ids), example_id=ids)).batch

    parts = list(split_by_partition(batch, partitions))

    assert sorted(i for _, part in parts for i in part.column("example_id").to_pylist()) == sorted(ids)
    for partition, part in parts:
        there = part.column("example_id").to_pylist()
        assert set(keys.partitions_of(keys.digest_array(pa.array(there)), partitions)) == {partition}
        assert there == [i for i in ids if i in set(there)]


@given(st.integers(1, 12_000), st.integers(1, 2_000))
def test_chunks_are_within_their_bounds_and_lose_no_row(rows: int, width: int) -> None:
    batch = of_arrow(examples_table(0, rows, user_id=["x" * width] * rows)).batch

    chunks = encode_chunks("ads", ADS, batch)

    assert sum(chunk.num_rows for chunk in chunks) == rows
    assert max(chunk.num_rows for chunk in chunks) <= CHUNK_ROWS
    assert max(len(chunk.data) for chunk in chunks) <= CHUNK_BYTES


def test_the_examples_of_a_body_are_its_list_or_the_body_itself() -> None:
    for body in (b'{"examples": [{"a": 1}]}', b'[{"a": 1}]'):
        assert parse_rows(body, "examples", max_bytes=1000, max_rows=10) == [{"a": 1}]


def test_a_schema_that_fits_one_declaration_is_looked_at_anew_for_another() -> None:
    table = examples_table(0, 1)
    spec = ADS.model_copy()
    assert of_arrow(table, spec).batch.num_rows == of_arrow(table, spec).batch.num_rows == 1

    renamed = ADS.features[0].model_copy(update={"name": "cost"})
    other = spec.model_copy(update={"features": (renamed, *ADS.features[1:])})
    for _ in range(2):
        with pytest.raises(InvalidRowsError) as refused:
            of_arrow(table, other)
        assert [item["column"] for item in refused.value.extra["columns"]] == ["price", "cost"]
        assert of_arrow(table.rename_columns(["example_id", "event_time", "cost", "user_id"]), other).batch.schema == (
            example_schema(other)
        )


def test_schemas_that_fit_are_few_and_small_where_they_are_kept() -> None:
    spec = ADS.model_copy()
    for n in range(20):
        of_arrow(examples_table(0, 1).replace_schema_metadata({"n": str(n), "pad": "x" * (1 << 20)}), spec)
    assert columns._fitting(Identity(spec)).schemas == ()

    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        for price in (pa.float32(), pa.float64()):
            of_arrow(examples_table(0, 1, user_id=pa.array(["u"]).cast(kind), price=pa.array([1], price)), spec)
    assert len(columns._fitting(Identity(spec)).schemas) == columns._KEPT_SCHEMAS
