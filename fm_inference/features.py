"""Arrow columns to the model's tensors: the one way, for training, export, the worker and validation.

Rules (the manifest's `inputs` say which apply to which tensor):

- hash: xxh64 of the value, seeded by the feature's name, modulo buckets. A null category is index 0.
- vocabulary: line number in the file from 1; unknown and null are 0.
- float: the value as float32 (beyond its range: infinity), `null` where it is null; a vector gives all its columns.
- pad_to, for one category_list: the first pad_to elements, then zeros; the mask is True on elements. A null list is an
  empty one. A null element is index 0 and counts as an element.

Columns come as a log entry has them (schemas.dataset.Feature.arrow_type) or as a trainer has them: float32,
dictionaries, large strings and lists, vectors as fixed_size_list. Shapes: B rows, F columns, L = pad_to.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from fm_inference.vocabulary import Vocabulary
from schemas.hashing import feature_seed, fixed_width_values, hash_values, list_elements, plain_array, validity
from schemas.snapshot import FloatEncode, HashEncode, Input, VocabularyEncode

NO_VOCABULARIES: Mapping[str, Vocabulary] = {}
type_of = pa.types


class FeatureError(ValueError):
    """Columns that do not give the tensors that the model takes."""


def build_tensors(
    columns: pa.RecordBatch | pa.Table,
    inputs: Sequence[Input],
    vocabularies: Mapping[str, Vocabulary] = NO_VOCABULARIES,
    *,
    pin_memory: bool = False,
) -> dict[str, torch.Tensor]:
    """Give the model's keyword tensors for the rows of `columns`, on the CPU.

    Category inputs are int64 (B, F), float inputs float32 (B, F), padded lists int64 (B, L) with a bool mask (B, L).
    `vocabularies` is keyed by file name. `pin_memory` puts them where a CUDA device can copy from without waiting.

    Raises:
        FeatureError: A column is missing or of a type that its encode cannot take, or a vocabulary is missing.
    """
    source = _Columns(columns, vocabularies)
    tensors: dict[str, torch.Tensor] = {}
    for wanted in inputs:
        encode = wanted.encode
        if isinstance(encode, FloatEncode):
            tensors[wanted.tensor] = _build_floats(source, wanted, encode, pin_memory=pin_memory)
        elif encode.pad_to is not None:
            tensors.update(_build_padded(source, wanted, encode, pin_memory=pin_memory))
        else:
            tensors[wanted.tensor] = _build_categories(source, wanted, encode, pin_memory=pin_memory)
    return tensors


def tensor_names(inputs: Sequence[Input]) -> list[str]:
    """Give the names of all tensors that build_tensors makes for these inputs, masks too."""
    masks = [wanted.encode.mask for wanted in inputs if not isinstance(wanted.encode, FloatEncode)]
    return [wanted.tensor for wanted in inputs] + [mask for mask in masks if mask is not None]


class _Columns:
    """The columns of one call; hashes of a feature that several tensors use are computed once."""

    def __init__(self, columns: pa.RecordBatch | pa.Table, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.num_rows: int = columns.num_rows
        self._columns = columns
        self._vocabularies = vocabularies
        self._hashes: dict[str, NDArray[np.uint64]] = {}

    def array(self, name: str) -> pa.Array:
        places = self._columns.schema.get_all_field_indices(name)
        if len(places) != 1:
            raise FeatureError(f"{name}: there {'is no such column' if not places else 'are several such columns'}")
        return plain_array(self._columns.column(places[0]))

    def index(self, name: str, values: pa.Array, encode: HashEncode | VocabularyEncode) -> NDArray[np.int64]:
        """Give the int64 index of each value of a feature, 0 where it is null."""
        plain = values.type.value_type if type_of.is_dictionary(values.type) else values.type
        if not (type_of.is_integer(plain) or type_of.is_string(plain) or type_of.is_large_string(plain)):
            raise FeatureError(f"{name}: a {encode.kind} takes strings or int64, the column holds {values.type}")
        if isinstance(encode, VocabularyEncode):
            if encode.file not in self._vocabularies:
                raise FeatureError(f"{name}: the vocabulary {encode.file} is not given")
            index = self._vocabularies[encode.file].index(values)
        else:
            index = self._buckets(name, values, encode.buckets)
        if values.null_count:
            index[~validity(values)] = 0
        return index

    def _buckets(self, name: str, values: pa.Array, buckets: int) -> NDArray[np.int64]:
        hashes = self._hashes.get(name)
        if hashes is None:
            hashes = self._hashes[name] = hash_values(values, feature_seed(name))
        divisor = np.uint64(buckets)
        # numpy divides by a constant with SIMD, and takes the remainder ten times slower
        return (hashes - hashes // divisor * divisor).view(np.int64)


def _build_categories(
    source: _Columns, wanted: Input, encode: HashEncode | VocabularyEncode, *, pin_memory: bool
) -> torch.Tensor:
    index_BF = torch.empty((source.num_rows, len(wanted.features)), dtype=torch.int64, pin_memory=pin_memory)
    out = index_BF.numpy()
    for place, name in enumerate(wanted.features):
        array = source.array(name)
        if _is_list(array.type):
            raise FeatureError(f"{name}: a list needs pad_to, and a tensor of its own")
        out[:, place] = source.index(name, array, encode)
    return index_BF


def _build_padded(
    source: _Columns, wanted: Input, encode: HashEncode | VocabularyEncode, *, pin_memory: bool
) -> dict[str, torch.Tensor]:
    if len(wanted.features) != 1:
        raise FeatureError(f"{wanted.tensor}: pad_to takes one category_list, not {len(wanted.features)} features")
    name, pad_to = wanted.features[0], encode.pad_to or 0
    array = source.array(name)
    if not _is_list(array.type):
        raise FeatureError(f"{name}: pad_to is for lists, the column holds {array.type}")
    elements, bounds = list_elements(array)
    index = source.index(name, elements, encode)
    lengths = np.diff(bounds)
    kept = np.minimum(lengths, pad_to)
    if array.null_count:
        kept[~validity(array)] = 0
    index_BL = torch.zeros((source.num_rows, pad_to), dtype=torch.int64, pin_memory=pin_memory)
    mask_BL = torch.empty((source.num_rows, pad_to), dtype=torch.bool, pin_memory=pin_memory)
    np.less(np.arange(pad_to), kept[:, None], out=mask_BL.numpy())
    if kept.sum() != len(index):
        place = np.arange(len(index)) - np.repeat(bounds[:-1], lengths)
        index = index[place < np.repeat(kept, lengths)]
    index_BL.numpy()[mask_BL.numpy()] = index
    tensors = {wanted.tensor: index_BL}
    if encode.mask is not None:
        tensors[encode.mask] = mask_BL
    return tensors


def _build_floats(source: _Columns, wanted: Input, encode: FloatEncode, *, pin_memory: bool) -> torch.Tensor:
    arrays = [source.array(name) for name in wanted.features]
    widths = [_float_width(name, array.type) for name, array in zip(wanted.features, arrays, strict=True)]
    values_BF = torch.empty((source.num_rows, sum(widths)), dtype=torch.float32, pin_memory=pin_memory)
    out, place = values_BF.numpy(), 0
    for array, width in zip(arrays, widths, strict=True):
        with np.errstate(over="ignore"):
            out[:, place : place + width] = _float_rows(array, width, null=encode.null)
        if array.null_count:
            out[~validity(array), place : place + width] = encode.null
        place += width
    return values_BF


def _float_width(name: str, kind: pa.DataType) -> int:
    """Give the columns that a feature of this Arrow type adds to a float tensor."""
    if type_of.is_floating(kind):
        return 1
    if type_of.is_fixed_size_binary(kind) and kind.byte_width % 4 == 0:
        return int(kind.byte_width) // 4
    if type_of.is_fixed_size_list(kind) and type_of.is_floating(kind.value_type):
        return int(kind.list_size)
    raise FeatureError(f"{name}: a float takes numbers or vectors, the column holds {kind}")


def _float_rows(array: pa.Array, width: int, *, null: float) -> NDArray[Any]:
    """Give the (B, width) numbers of a column; null rows hold anything, null elements of a vector `null`."""
    if type_of.is_fixed_size_binary(array.type):
        values = fixed_width_values(array, np.dtype(f"V{4 * width}")).view("<f4")
    elif type_of.is_fixed_size_list(array.type):
        elements = array.values.slice(array.offset * width, len(array) * width)
        values = fixed_width_values(elements, np.dtype(elements.type.to_pandas_dtype()))
        if elements.null_count:
            values = np.where(validity(elements), values, null)
    else:
        values = fixed_width_values(array, np.dtype(array.type.to_pandas_dtype()))
    return values.reshape(len(array), width)


def _is_list(kind: pa.DataType) -> bool:
    return bool(type_of.is_list(kind) or type_of.is_large_list(kind))
