"""Embeddings come back from their bytes as close as their codec promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from schemas.codecs import CODECS, Codec, decode, encode, encoded_width

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
FINITE = hnp.arrays(np.float32, SHAPES, elements=st.floats(-(2.0**60), 2.0**60, width=32))
UNIT = hnp.arrays(np.float32, SHAPES, elements=st.floats(-1, 1, width=32))


@given(FINITE, st.sampled_from(CODECS))
def test_a_row_has_its_fixed_width(values: NDArray[np.float32], codec: Codec) -> None:
    assert encode(values, codec).shape == (values.shape[0], encoded_width(values.shape[1], codec))


@given(FINITE)
def test_float32_comes_back_as_it_was(values: NDArray[np.float32]) -> None:
    assert np.array_equal(decode(encode(values, "float32"), values.shape[1], "float32"), values)


@given(FINITE)
def test_float16_comes_back_rounded_and_saturated(values: NDArray[np.float32]) -> None:
    expected = np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)
    assert np.array_equal(decode(encode(values, "float16"), values.shape[1], "float16"), expected)


@given(FINITE)
def test_int8_is_off_by_half_a_step_of_the_rows_largest_value(values: NDArray[np.float32]) -> None:
    back = decode(encode(values, "int8"), values.shape[1], "int8")
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    assert (np.abs(back - values) <= step * 0.501 + 1e-37).all()


@given(UNIT)
def test_int4_is_off_by_a_sixteenth_below_seven_eighths(values: NDArray[np.float32]) -> None:
    back = decode(encode(values, "int4"), values.shape[1], "int4")
    assert (np.abs(back - np.clip(values, -1, 0.875)) <= 1 / 16).all()


@given(FINITE, st.sampled_from(CODECS))
def test_encoding_what_was_decoded_changes_nothing_more(values: NDArray[np.float32], codec: Codec) -> None:
    size = values.shape[1]
    once = decode(encode(values, codec), size, codec)
    assert np.allclose(decode(encode(once, codec), size, codec), once, rtol=1e-6, atol=0)


@given(FINITE, st.sampled_from(CODECS), st.data())
def test_a_row_is_encoded_alone_as_among_others(values: NDArray[np.float32], codec: Codec, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, values.shape[0] - 1))
    assert np.array_equal(encode(values[row : row + 1], codec)[0], encode(values, codec)[row])


@pytest.mark.parametrize("codec", CODECS)
def test_no_rows_encode_to_no_rows(codec: Codec) -> None:
    packed = encode(np.zeros((0, 5), np.float32), codec)
    assert decode(packed, 5, codec).shape == (0, 5)


@pytest.mark.parametrize(
    ("codec", "packed"),
    [
        ("float32", "0000803f000000c0"),
        ("float16", "003c00c0"),
        ("int8", "0402813c40" + "81"),
        ("int4", "0f"),
    ],
)
def test_bytes_stay_what_they_were(codec: Codec, packed: str) -> None:
    assert encode(np.array([[1, -2]], np.float32), codec).tobytes().hex() == packed


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes a row are not 2 values in float16"):
        decode(np.zeros((1, 3), np.uint8), 2, "float16")
