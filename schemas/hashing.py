"""Stable hashes of feature values and of rows: xxh64, the same in every process, version and chunking.

A value's hash is xxh64 of its bytes (UTF-8 of a string, 8 little-endian bytes of an int64 or a float64), seeded by the
name of its feature. A row's content hash is the sum, modulo 2**64, of its columns' hashes, so that it depends neither
on the order of the columns nor on how the rows were cut into chunks. A null adds nothing: a row written before a
nullable feature was declared has the hash of the same row sent again afterwards with nulls.

Source: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md (XXH64).
"""

from collections.abc import Iterable
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
_MASK = (1 << 64) - 1

Uint64s = NDArray[np.uint64]
_T = TypeVar("_T", bound=np.generic)


def feature_seed(name: str) -> int:
    """Give the seed of a feature's values: xxh64 of its name."""
    return xxhash.xxh64_intdigest(name.encode())


def xxh64_int64(values: NDArray[np.int64], seed: int) -> Uint64s:
    """Give xxh64 of the 8 little-endian bytes of each value; same shape, uint64."""
    lanes = np.ascontiguousarray(values, dtype="<i8").view(np.uint64) * _P2
    state = _rotate(lanes, 31) * _P1
    state ^= np.uint64((seed + int(_P5) + 8) & _MASK)
    state = _rotate(state, 27)
    state *= _P1
    state += _P4
    return _avalanche(state)


def hash_values(values: pa.Array, seed: int) -> Uint64s:
    """Give xxh64 of each int64 or string; whatever stands in a null slot has no meaning.

    Strings are hashed once per distinct value. Dictionaries of either type give what their plain arrays give.

    Raises:
        TypeError: The array holds neither integers nor strings.
    """
    if pa.types.is_dictionary(values.type):
        hashes = hash_values(values.dictionary, seed)
        return take_indexed(hashes, values.indices)
    if pa.types.is_integer(values.type):
        return xxh64_int64(fixed_width_values(values.cast(pa.int64()), np.dtype("<i8")), seed)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise TypeError(f"a category is an int64 or a string, not {values.type}")
    encoded = values.dictionary_encode()
    texts = encoded.dictionary.cast(pa.large_binary()).to_pylist()
    hashes = np.fromiter(map(xxhash.xxh64_intdigest, texts, repeat(seed)), np.uint64, len(texts))
    return take_indexed(hashes, encoded.indices)


def content_hash(columns: pa.RecordBatch | pa.Table, names: Iterable[str]) -> NDArray[np.int64]:
    """Give a hash of each row's values in the columns `names`; (rows,) int64.

    Two rows with equal values have equal hashes; others differ but for chance (2**-64). Null, the empty list and the
    empty string are three values; -0.0 is 0.0; a dictionary equals its plain column.

    Raises:
        KeyError: A column is missing.
        TypeError: A column has a type that no feature has.
    """
    total = np.zeros(columns.num_rows, np.uint64)
    for name in names:
        array = plain_array(columns.column(name))
        hashes = _row_hashes(array, feature_seed(name))
        if array.null_count:
            hashes[~validity(array)] = 0
        total += hashes
    return _avalanche(total).view(np.int64)


def plain_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Give the column as one array whose nulls are all in its own validity, none in a dictionary."""
    array = column
    if isinstance(column, pa.ChunkedArray):  # combine_chunks copies a single chunk too
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_dictionary(array.type) and array.dictionary.null_count:
        return array.dictionary_decode()
    return array


def list_elements(array: pa.ListArray) -> tuple[pa.Array, NDArray[np.int64]]:
    """Give the elements of all lists in order, and each list's bounds among them; (length + 1,) int64.

    A null list may have elements too: they are there and have no meaning.
    """
    buffer = array.buffers()[1]
    if buffer is None or len(array) == 0:
        return plain_array(array.values.slice(0, 0)), np.zeros(len(array) + 1, np.int64)
    dtype = np.dtype("<i8" if pa.types.is_large_list(array.type) else "<i4")
    bounds = np.frombuffer(buffer, dtype, count=len(array) + 1, offset=array.offset * dtype.itemsize).astype(np.int64)
    start, end = int(bounds[0]), int(bounds[-1])
    return plain_array(array.values.slice(start, end - start)), bounds - start


def validity(array: pa.Array) -> NDArray[np.bool_]:
    """Give True where the value is not null; (length,) bool."""
    mask: NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    return mask


def fixed_width_values(array: pa.Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Give a view of the values buffer of a primitive array, offset applied; null slots hold anything."""
    buffer = array.buffers()[1]
    if buffer is None or len(array) == 0:
        return np.zeros(len(array), dtype)
    return np.frombuffer(buffer, dtype, count=len(array), offset=array.offset * dtype.itemsize)


def take_indexed(values: NDArray[_T], indices: pa.Array) -> NDArray[_T]:
    """Give values[indices] for the indices of a dictionary array; a null index gives anything."""
    if len(values) == 0:
        return np.zeros(len(indices), values.dtype)
    places = fixed_width_values(indices, np.dtype(indices.type.to_pandas_dtype()))
    if indices.null_count:
        places = np.where(validity(indices), places, 0)
    return values.take(places)


def _row_hashes(array: pa.Array, seed: int) -> Uint64s:
    if pa.types.is_floating(array.type):
        values = fixed_width_values(array.cast(pa.float64()), np.dtype("<f8"))
        return xxh64_int64((values + 0.0).view(np.int64), seed)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _list_hashes(array, seed)
    if pa.types.is_fixed_size_binary(array.type):
        return _binary_hashes(array, seed)
    return hash_values(array, seed)


def _list_hashes(array: pa.ListArray, seed: int) -> Uint64s:
    """Sum of the elements' hashes, each mixed with its place, plus one for the length."""
    elements, bounds = list_elements(array)
    lengths = np.diff(bounds)
    places = np.arange(len(elements), dtype=np.int64) - np.repeat(bounds[:-1], lengths)
    mixed = _avalanche(hash_values(elements, seed) + (places + 1).view(np.uint64) * _P3)
    if elements.null_count:
        mixed[~validity(elements)] = 0
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return running[bounds[1:]] - running[bounds[:-1]] + xxh64_int64(lengths, (seed + 1) & _MASK)


def _binary_hashes(array: pa.FixedSizeBinaryArray, seed: int) -> Uint64s:
    """One multiply-rotate step of xxh64 per 8 bytes of the rows; a last word of 4 bytes is padded with zeros."""
    width = array.type.byte_width
    rows = fixed_width_values(array, np.dtype(f"V{width}")).view(np.uint8).reshape(len(array), width)
    if width % 8:
        rows = np.pad(rows, ((0, 0), (0, 8 - width % 8)))
    words = np.ascontiguousarray(np.ascontiguousarray(rows).view("<u8").T)
    state = np.full(len(array), (seed + int(_P5) + width) & _MASK, np.uint64)
    for word in words:
        state ^= _rotate(word * _P2, 31) * _P1
        state = _rotate(state, 27) * _P1
        state += _P4
    return _avalanche(state)


def _rotate(values: Uint64s, bits: int) -> Uint64s:
    return (values << np.uint64(bits)) | (values >> np.uint64(64 - bits))


def _avalanche(values: Uint64s) -> Uint64s:
    mixed = values ^ (values >> np.uint64(33))
    mixed *= _P2
    mixed ^= mixed >> np.uint64(29)
    mixed *= _P3
    mixed ^= mixed >> np.uint64(32)
    return mixed
