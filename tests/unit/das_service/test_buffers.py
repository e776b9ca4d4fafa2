"""Buffers of the join: never two windows in one memory, and none that is kept when nobody needs it."""

import gc
from itertools import pairwise

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from das_service.supervision.buffers import BufferPool

MIB = 1024 * 1024


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_that_arrow_still_refers_to_is_not_given_again() -> None:
    pool = BufferPool()
    values = pool.empty((MIB,), np.dtype(np.int64))
    values[:] = 7
    column = pa.Array.from_buffers(pa.int64(), 1000, [None, pa.py_buffer(values[5:])])
    del values

    other = pool.empty((MIB,), np.dtype(np.int64))
    other[:] = 8

    assert column.to_pylist() == [7] * 1000


def test_memory_that_nobody_refers_to_is_given_again() -> None:
    pool = BufferPool()
    values = pool.empty((MIB, 8), np.dtype(np.uint8))
    place = address(values)
    column = pa.Array.from_buffers(pa.binary(8), MIB, [None, pa.py_buffer(values)])
    del values, column
    gc.collect()

    assert address(pool.empty((MIB - 5,), np.dtype(np.int64))) == place


def test_no_more_is_kept_than_may_be() -> None:
    pool = BufferPool(most_free_bytes=6 * MIB)
    arrays = [pool.empty((4 * MIB,), np.dtype(np.uint8)) for _ in range(3)]
    assert pool.free_bytes == 0
    del arrays
    gc.collect()

    assert pool.free_bytes == 4 * MIB

    pool.clear()
    assert pool.free_bytes == 0


def test_what_an_error_held_while_the_pool_was_cleared_is_not_kept() -> None:
    pool = BufferPool()
    array = pool.empty((4 * MIB,), np.dtype(np.uint8))
    pool.clear()
    del array
    gc.collect()
    assert pool.free_bytes == 0

    array = pool.empty((4 * MIB,), np.dtype(np.uint8))
    del array
    gc.collect()
    assert pool.free_bytes == 4 * MIB


@given(st.lists(st.tuples(st.integers(0, 5 * MIB), st.booleans()), max_size=30))
def test_arrays_that_are_held_never_overlap(asked: list[tuple[int, bool]]) -> None:
    pool = BufferPool()
    held: list[np.ndarray] = []
    for number, (num_bytes, is_kept) in enumerate(asked):
        array = pool.empty((num_bytes,), np.dtype(np.uint8))
        array[:1] = array[-1:] = number
        if is_kept:
            held.append(array)
    spans = sorted((address(array), address(array) + len(array)) for array in held if len(array))

    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    kept = [number for number, (num_bytes, is_kept) in enumerate(asked) if is_kept]
    assert [(int(a[0]), int(a[-1])) for a in held if len(a)] == [
        (n, n) for n, a in zip(kept, held, strict=True) if len(a)
    ]
