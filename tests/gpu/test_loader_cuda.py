"""A batch on a CUDA device holds what it holds on the CPU, and its embeddings are decoded there."""

import numpy as np
import pytest
import torch

from schemas.codecs import CODECS, Codec, encode
from schemas.codecs import decode as decode_in_numpy
from tests.unit.vm_training.test_tensors import built
from vm_training.codecs import decode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("codec", CODECS)
def test_a_device_decodes_as_numpy_does(codec: Codec) -> None:
    packed = encode(np.random.default_rng(1).uniform(-1, 1, (33, 5)).astype(np.float32), codec)
    values_BD = decode(torch.tensor(packed).to("cuda"), 5, codec)
    assert values_BD.is_cuda
    np.testing.assert_array_equal(values_BD.cpu(), decode_in_numpy(packed, 5, codec))


def test_a_batch_moves_from_pinned_memory_whole() -> None:
    batch = built(buckets=10)
    moved = batch.pin_memory().to("cuda")
    torch.cuda.synchronize()
    assert moved.categories_BC.cpu().equal(batch.categories_BC)
    assert moved.lists["tags"].offsets.cpu().equal(batch.lists["tags"].offsets)
    assert moved.fms["f"].embedding("hidden").cpu().equal(batch.fms["f"].embedding("hidden"))
