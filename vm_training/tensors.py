"""Rows of a training batch as tensors: a few wide ones, which travel between processes and to a device cheaply.

Nulls: a float is 0.0, a category is 0, a list is empty, a vector is zeros, and a mask says so; a label that is null is
0.0 and not `labeled`; what an FM did not say (any status but present) is zero and not `present`.

Categories: without buckets an int64 as it is, a string as the 64 bits of its hash; with buckets both as their hash
modulo buckets, which is how an FM's inputs are hashed: xxh64 of the value, seeded by xxh64 of the feature's name
(contract 6). Null elements of a list are 0 too.

Shapes: B rows, F float features, C categories, N elements of all lists, D numbers, W bytes, K tasks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, where

from schemas.codecs import Codec
from schemas.hashing import feature_seed, fixed_width_values, hash_values, list_elements, plain_array, validity
from vm_training.codecs import decode
from vm_training.layout import FmLayout, Layout

Buckets = int | Mapping[str, int] | None


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists: row i has values_N[offsets[i]:offsets[i + 1]], as nn.EmbeddingBag(include_last_offset=True) takes them.

    values_N: int64; offsets: int64 (B + 1,); present_B: bool, False where the list is null.
    """

    values_N: Tensor
    offsets: Tensor
    present_B: Tensor


@dataclass(frozen=True, slots=True)
class Vectors:
    """values_BD: float32; present_B: bool, False where the vector is null."""

    values_BD: Tensor
    present_B: Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """An embedding as its codec packs it: bytes_BW uint8."""

    bytes_BW: Tensor
    size: int
    codec: Codec


@dataclass(frozen=True, slots=True)
class Supervision:
    """What one FM said. present_B: bool; logits: float32 (B,) by task."""

    present_B: Tensor
    logits: Mapping[str, Tensor]
    packed: Mapping[str, Packed] = field(default_factory=dict)

    def embedding(self, name: str) -> Tensor:
        """Give an embedding as float32 (B, D), decoded where its bytes lie; zeros where it is not present."""
        packed = self.packed[name]
        return where(self.present_B[:, None], decode(packed.bytes_BW, packed.size, packed.codec), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows as tensors; `dataset.layout` names the columns of dense_BF and categories_BC.

    event_time_B: int64 microseconds since 1970. dense_BF: float32; categories_BC: int64; the masks bool.
    labels: float32 (B,) by task, meant where `labeled`. of_service: asked-for columns of the service by name, times as
    event_time_B. example_ids: strings, where asked for.
    """

    event_time_B: Tensor
    dense_BF: Tensor
    dense_present_BF: Tensor
    categories_BC: Tensor
    categories_present_BC: Tensor
    lists: Mapping[str, Ragged]
    vectors: Mapping[str, Vectors]
    labels: Mapping[str, Tensor]
    labeled: Mapping[str, Tensor]
    fms: Mapping[str, Supervision]
    of_service: Mapping[str, Tensor]
    example_ids: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.event_time_B)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """Give the batch on a device; embeddings travel as bytes."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Give the batch where a CUDA device can copy from without waiting: what DataLoader(pin_memory=True) calls."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: Self = _mapped(self, change)
        return changed


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401 - a tensor, or what holds some
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(item, change) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), change) for f in fields(value)})
    return value


def build_batch(rows: pa.RecordBatch, layout: Layout, *, buckets: Buckets = None, with_ids: bool = False) -> Batch:
    """Give rows as tensors on the CPU, which share no memory with them."""
    columns = {name: plain_array(rows.column(name)) for name in rows.schema.names}
    dense, dense_present = _dense(columns, layout.dense, rows.num_rows)
    categories, categories_present = _categories(columns, layout.categories, rows.num_rows, buckets)
    labels = {task: _floats(columns[task]) for task in layout.tasks}
    return Batch(
        event_time_B=_int64s(columns["event_time"]),
        dense_BF=dense,
        dense_present_BF=dense_present,
        categories_BC=categories,
        categories_present_BC=categories_present,
        lists={name: _ragged(name, columns[name], buckets) for name in layout.lists},
        vectors={name: _vectors(columns[name], size) for name, size in layout.vectors.items()},
        labels=labels,
        labeled={task: _mask(columns[task]) for task in layout.tasks},
        fms={fm: _supervision(fm, columns, outputs) for fm, outputs in layout.fms.items()},
        of_service={name: _of_service(columns[name]) for name in layout.of_service},
        example_ids=columns["example_id"] if with_ids else None,
    )


def _dense(columns: Mapping[str, pa.Array], names: tuple[str, ...], num_rows: int) -> tuple[Tensor, Tensor]:
    values_BF = np.empty((num_rows, len(names)), np.float32)
    present_BF = np.ones((num_rows, len(names)), np.bool_)
    for place, name in enumerate(names):
        array = columns[name]
        values_BF[:, place] = fixed_width_values(array, np.dtype("<f8"))
        if array.null_count:
            present_BF[:, place] = validity(array)
            values_BF[~present_BF[:, place], place] = 0.0
    return torch.from_numpy(values_BF), torch.from_numpy(present_BF)


def _categories(
    columns: Mapping[str, pa.Array], names: tuple[str, ...], num_rows: int, buckets: Buckets
) -> tuple[Tensor, Tensor]:
    values_BC = np.empty((num_rows, len(names)), np.int64)
    present_BC = np.ones((num_rows, len(names)), np.bool_)
    for place, name in enumerate(names):
        array = columns[name]
        values_BC[:, place] = _indices(name, array, buckets)
        if array.null_count:
            present_BC[:, place] = validity(array)
            values_BC[~present_BC[:, place], place] = 0
    return torch.from_numpy(values_BC), torch.from_numpy(present_BC)


def _indices(name: str, values: pa.Array, buckets: Buckets) -> NDArray[np.int64]:
    """Give what stands for each value; null slots hold anything."""
    wanted = buckets.get(name) if isinstance(buckets, Mapping) else buckets
    if wanted is None and pa.types.is_int64(values.type):
        return fixed_width_values(values, np.dtype("<i8"))
    hashes = hash_values(values, feature_seed(name))
    if wanted is None:
        return hashes.view(np.int64)
    divisor = np.uint64(wanted)
    # numpy divides by a constant with SIMD, and takes the remainder ten times slower
    return (hashes - hashes // divisor * divisor).view(np.int64)


def _ragged(name: str, array: pa.Array, buckets: Buckets) -> Ragged:
    elements, bounds = list_elements(array)
    values, present = np.array(_indices(name, elements, buckets)), validity(array)
    if elements.null_count:
        values[~validity(elements)] = 0
    if array.null_count:  # a null list may have elements too
        lengths = np.diff(bounds)
        values = values[np.repeat(present, lengths)]
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.where(present, lengths, 0))])
    return Ragged(torch.from_numpy(values), torch.from_numpy(np.array(bounds)), torch.from_numpy(np.array(present)))


def _vectors(array: pa.Array, size: int) -> Vectors:
    elements = array.values.slice(array.offset * size, len(array) * size)
    values_BD = fixed_width_values(elements, np.dtype("<f4")).reshape(len(array), size).copy()
    present = validity(array)
    values_BD[~present] = 0.0
    return Vectors(torch.from_numpy(values_BD), torch.from_numpy(np.array(present)))


def _supervision(fm: str, columns: Mapping[str, pa.Array], outputs: FmLayout) -> Supervision:
    status = columns[f"{fm}__status"]
    place = status.dictionary.index("present").as_py()
    present = np.asarray(status.indices) == place
    return Supervision(
        torch.from_numpy(present),
        {task: _floats(columns[f"{fm}__{task}__logit"]) for task in outputs.tasks},
        {name: _packed(columns[f"{fm}__{name}"], *how) for name, how in outputs.embeddings.items()},
    )


def _packed(array: pa.Array, size: int, codec: Codec) -> Packed:
    width = array.type.byte_width
    packed = fixed_width_values(array, np.dtype(f"V{width}")).view(np.uint8).reshape(len(array), width)
    return Packed(torch.from_numpy(packed.copy()), size, codec)


def _floats(array: pa.Array) -> Tensor:
    values = fixed_width_values(array, np.dtype("<f4")).copy()
    if array.null_count:
        values[~validity(array)] = 0.0
    return torch.from_numpy(values)


def _mask(array: pa.Array) -> Tensor:
    return torch.from_numpy(np.array(validity(array)) if array.null_count else np.ones(len(array), np.bool_))


def _int64s(array: pa.Array) -> Tensor:
    return torch.from_numpy(fixed_width_values(array, np.dtype("<i8")).copy())


def _of_service(array: pa.Array) -> Tensor:
    if pa.types.is_boolean(array.type):
        return torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())
    return _int64s(array)
