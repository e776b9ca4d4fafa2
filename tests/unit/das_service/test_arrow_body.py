"""Bodies made to hurt: they are refused by what their metadata says, before they are decoded."""

import contextlib
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_service.door.arrow_body import MAX_BATCHES, Budget, measure_stream, read_batches
from das_service.door.validation import BodyLimits, validate_arrow
from das_service.errors import BadRequestError, DasError, InvalidRowsError, TooLargeError
from das_service.ingest import encode_chunks
from schemas.dataset import DatasetSpec
from tests.served import NOON_US, SPEC, arrow_body, examples_table

MEGABYTE = 1_000_000
LIMITS = BodyLimits(max_rows=100_000, max_decoded_bytes=20 * MEGABYTE)


def spec_of(*features: dict[str, Any]) -> DatasetSpec:
    return DatasetSpec.model_validate({"features": list(features)})


def refuses_without_decoding(body: bytes, spec: DatasetSpec) -> str:
    """The refusal's words; what Arrow allocated for it stays below four times the limit."""
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(TooLargeError) as caught:
        validate_arrow(body, spec, limits=LIMITS, now_us=NOON_US)
    assert pa.default_memory_pool().max_memory() <= max(before, 4 * LIMITS.max_decoded_bytes)
    return caught.value.detail


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_zeros_are_refused_by_the_length_that_they_state(compression: str) -> None:
    rows = 90_000
    table = examples_table(0, rows, user_id=["\0" * 2000] * rows)
    body = arrow_body(table, compression=compression)
    assert len(body) < 4 * MEGABYTE

    assert "decoded" in refuses_without_decoding(body, DatasetSpec.model_validate(SPEC))


@pytest.mark.parametrize("stated", [2**62, 2**31, 10**12])
def test_a_lie_about_the_decompressed_length_is_refused(stated: int) -> None:
    body = bytearray(arrow_body(examples_table(0, 100), compression="zstd"))
    place = body.index(b"\x28\xb5\x2f\xfd") - 8  # the length stands before the first zstd frame
    struct.pack_into("<q", body, place, stated)

    refuses_without_decoding(bytes(body), DatasetSpec.model_validate(SPEC))


def test_a_length_smaller_than_the_data_is_refused() -> None:
    body = bytearray(arrow_body(examples_table(0, 100), compression="zstd"))
    struct.pack_into("<q", body, body.index(b"\x28\xb5\x2f\xfd") - 8, 1)

    with pytest.raises(BadRequestError):
        validate_arrow(bytes(body), DatasetSpec.model_validate(SPEC), limits=LIMITS, now_us=NOON_US)


def dictionary_of_one(text: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([text]))


def test_a_dictionary_that_explodes_is_refused() -> None:
    body = arrow_body(examples_table(0, 50_000, user_id=dictionary_of_one("x" * 10_000, 50_000)))
    assert len(body) < 4 * MEGABYTE

    refuses_without_decoding(body, DatasetSpec.model_validate(SPEC))


def test_a_dictionary_of_views_that_explodes_is_refused() -> None:
    exploding = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(50_000, np.int8)), pa.array(["x" * 10_000]).cast(pa.string_view())
    )

    refuses_without_decoding(arrow_body(examples_table(0, 50_000, user_id=exploding)), DatasetSpec.model_validate(SPEC))


def test_a_dictionary_inside_lists_that_explodes_is_refused() -> None:
    rows = 20_000
    offsets = pa.array(np.arange(0, 3 * rows + 1, 3, dtype=np.int32))
    tags = pa.ListArray.from_arrays(offsets, dictionary_of_one("x" * 10_000, 3 * rows))

    refuses_without_decoding(arrow_body(examples_table(0, rows, tags=tags)), DatasetSpec.model_validate(SPEC))


def test_views_of_the_same_bytes_that_explode_are_refused() -> None:
    rows = 50_000
    data = pa.py_buffer(b"x" * 10_000)
    views = np.zeros((rows, 4), np.int32)
    views[:] = (10_000, int.from_bytes(b"xxxx", "little"), 0, 0)
    exploding = pa.Array.from_buffers(pa.string_view(), rows, [None, pa.py_buffer(views), data])
    exploding.validate(full=True)
    body = arrow_body(examples_table(0, rows, user_id=exploding))
    assert len(body) < 4 * MEGABYTE

    refuses_without_decoding(body, DatasetSpec.model_validate(SPEC))


def test_missing_columns_that_would_be_huge_nulls_are_refused() -> None:
    spec = spec_of(
        {"name": "price", "type": "float"}, {"name": "image", "type": "vector", "size": 65_536, "nullable": True}
    )

    refuses_without_decoding(arrow_body(examples_table(0, 1000, user_id=None)), spec)


def test_null_lists_that_would_be_huge_vectors_are_refused() -> None:
    spec = spec_of(
        {"name": "price", "type": "float"}, {"name": "image", "type": "vector", "size": 65_536, "nullable": True}
    )
    table = examples_table(0, 1000, user_id=None, image=pa.nulls(1000, pa.list_(pa.float32())))

    refuses_without_decoding(arrow_body(table), spec)


def test_a_large_dictionary_before_many_small_batches_is_refused() -> None:
    values = pa.array([f"{i:0100d}" for i in range(100_000)])
    table = examples_table(0, 2000, user_id=pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), values))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)

    told = refuses_without_decoding(sink.getvalue().to_pybytes(), DatasetSpec.model_validate(SPEC))
    assert "too many batches" in told


def test_more_batches_than_a_body_may_have_are_refused() -> None:
    table = examples_table(0, 1).slice(0, 0)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for _ in range(MAX_BATCHES + 1):
            writer.write_batch(pa.RecordBatch.from_pylist([], table.schema))

    assert "batches" in refuses_without_decoding(sink.getvalue().to_pybytes(), DatasetSpec.model_validate(SPEC))


def test_more_rows_than_allowed_are_counted_over_all_batches() -> None:
    table = examples_table(0, 100)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    body = sink.getvalue().to_pybytes()

    assert measure_stream(body, budget=Budget(MEGABYTE), max_rows=100) == 100
    with pytest.raises(TooLargeError, match="99 rows"):
        measure_stream(body, budget=Budget(MEGABYTE), max_rows=99)


@pytest.mark.parametrize("rows", [-1, 0, 51, 2**31, 2**62])
def test_a_lie_about_the_number_of_rows_is_refused(rows: int) -> None:
    body = bytearray(arrow_body(examples_table(0, 50)))
    for place in [i for i in range(0, len(body) - 8, 8) if struct.unpack_from("<q", body, i)[0] == 50]:
        struct.pack_into("<q", body, place, rows)

    with pytest.raises(DasError) as caught:
        validate_arrow(bytes(body), DatasetSpec.model_validate(SPEC), limits=LIMITS, now_us=NOON_US)
    assert caught.value.http_status in {400, 413, 422}


def test_the_schema_is_looked_at_before_a_batch_is_decoded() -> None:
    def expect(_: pa.Schema) -> None:
        raise TooLargeError("seen")

    damaged = bytearray(arrow_body(examples_table(0, 50, user_id=["é"] * 50)))
    damaged[damaged.rindex(b"\xc3\xa9")] = 0xFF
    with pytest.raises(TooLargeError, match="seen"):
        read_batches(bytes(damaged), budget=Budget(MEGABYTE), max_rows=100, expect=expect)
    with pytest.raises(BadRequestError, match="damaged"):
        read_batches(bytes(damaged), budget=Budget(MEGABYTE), max_rows=100, expect=lambda _: None)


def test_delta_and_replaced_dictionaries_are_read() -> None:
    batches = [
        pa.RecordBatch.from_arrays(
            [pa.DictionaryArray.from_arrays(pa.array([0, len(words) - 1], pa.int32()), pa.array(words))], ["a"]
        )
        for words in (["x", "y"], ["x", "y", "z"], ["w"])
    ]
    for deltas in (True, False):
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=deltas)
        with pa.ipc.new_stream(sink, batches[0].schema, options=options) as writer:
            for batch in batches:
                writer.write_batch(batch)
        body = sink.getvalue().to_pybytes()

        _, read = read_batches(body, budget=Budget(MEGABYTE), max_rows=100, expect=lambda _: None)

        assert [value for batch in read for value in batch.column(0).to_pylist()] == ["x", "y", "x", "z", "w", "w"]


def _seeds() -> list[bytes]:
    rows = 12
    columns: list[dict[str, Any]] = [
        {
            "item": pa.array([1, None] * 6, pa.int64()).dictionary_encode(),
            "user_id": pa.array(["a", "b", "c"] * 4).dictionary_encode(),
            "tags": pa.ListArray.from_arrays(
                pa.array(range(0, 25, 2), pa.int32()), pa.array(["x", "y"] * 12).dictionary_encode()
            ),
            "image": pa.array([[1.0, 2, 3, 4]] * rows, pa.list_(pa.float32(), 4)),
        },
        {
            "user_id": pa.array(["a", "b" * 20, "c"] * 4).cast(pa.string_view()),
            "tags": pa.array([["x"], None, []] * 4, pa.list_(pa.string_view())),
            "image": pa.array([[1.0, 2, 3, 4], None] * 6, pa.list_(pa.float32())),
        },
    ]
    tables = [examples_table(0, rows, **each) for each in columns]
    return [arrow_body(table, compression=codec) for table in tables for codec in (None, "lz4", "zstd")]


SEEDS = _seeds()


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes_are_refused_or_are_valid_rows(seed: bytes, flips: list[tuple[int, int]]) -> None:
    body = bytearray(seed)
    for place, value in flips:
        body[place % len(body)] = value
    spec = DatasetSpec.model_validate(SPEC)
    rows = None
    with contextlib.suppress(BadRequestError, TooLargeError, InvalidRowsError):
        rows = validate_arrow(bytes(body), spec, limits=LIMITS, now_us=NOON_US)
    if rows is not None:
        rows.batch.validate(full=True)
        assert sum(chunk.num_rows for chunk in encode_chunks("ads", spec, rows.batch)) == rows.batch.num_rows


@given(st.sampled_from(SEEDS), st.integers(0, 2**16))
def test_a_body_cut_anywhere_is_refused(seed: bytes, cut: int) -> None:
    with pytest.raises(BadRequestError):
        validate_arrow(seed[: cut % len(seed)], DatasetSpec.model_validate(SPEC), limits=LIMITS, now_us=NOON_US)


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        validate_arrow(body, DatasetSpec.model_validate(SPEC), limits=LIMITS, now_us=NOON_US)
