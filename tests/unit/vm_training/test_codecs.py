"""Decoding in torch gives what numpy gives, for every codec and width."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.codecs import CODECS, Codec, encode
from schemas.codecs import decode as decode_in_numpy
from vm_training.codecs import decode


@pytest.mark.parametrize("codec", CODECS)
@given(rows=st.integers(0, 9), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_torch_decodes_as_numpy_does(codec: Codec, rows: int, size: int, seed: int) -> None:
    packed = encode(np.random.default_rng(seed).uniform(-1, 1, (rows, size)).astype(np.float32), codec)
    np.testing.assert_array_equal(decode(torch.tensor(packed), size, codec), decode_in_numpy(packed, size, codec))


@pytest.mark.parametrize("codec", CODECS)
def test_extreme_values_are_decoded_alike(codec: Codec) -> None:
    packed = encode(np.array([[0.0, -65504.0], [3e-6, 1e-9], [1.0, -1.0]], np.float32), codec)
    np.testing.assert_array_equal(decode(torch.tensor(packed), 2, codec), decode_in_numpy(packed, 2, codec))


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes a row are not 4 values in float16"):
        decode(torch.zeros((2, 3), dtype=torch.uint8), 4, "float16")
