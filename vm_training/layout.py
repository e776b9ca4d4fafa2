"""Which column of a stream of training batches goes into which tensor: read off the stream's Arrow schema.

The types tell the columns apart, and the names that the service keeps for itself: a float feature is a double, a label
a float32, a category a string or an int64, a list a list, a vector a fixed-size list. What an FM said begins with its
name and two underscores; an embedding's field says its size and codec.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import pyarrow as pa

from schemas.codecs import Codec

OF_SERVICE = ("ready_seq", "closed_at", "received_at", "is_late")
_STATUS, _LOGIT = "__status", "__logit"
_NOT_OUTPUTS = ("status", "snapshot_id", "trained_through", "scored_at")
type_of = pa.types


@dataclass(frozen=True, slots=True)
class FmLayout:
    """Outputs of an FM: tasks, and embeddings by name as (size, codec)."""

    tasks: tuple[str, ...]
    embeddings: Mapping[str, tuple[int, Codec]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names in the order of the tensors' columns: dense of dense_BF, categories of categories_BC.

    vectors: sizes by name. fms: by name. of_service: columns of OF_SERVICE that were asked for.
    """

    dense: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    vectors: Mapping[str, int] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    fms: Mapping[str, FmLayout] = field(default_factory=dict)
    of_service: tuple[str, ...] = ()


def read_layout(schema: pa.Schema) -> Layout:
    """Give the layout of a stream.

    Raises:
        ValueError: An FM has no outputs yet, or the stream's embeddings are not encoded.
    """
    first = [i for i, f in enumerate(schema) if type_of.is_dictionary(f.type) and f.name.endswith(_STATUS)]
    said = {
        schema.field(start).name.removesuffix(_STATUS): [schema.field(i) for i in range(start, end)]
        for start, end in pairwise([*first, len(schema)])
    }  # an FM's columns stand together and begin with its status
    own = [f for f in list(schema)[: first[0] if first else None] if f.name not in {"example_id", "event_time"}]
    features = [f for f in own if f.name not in OF_SERVICE]
    return Layout(
        dense=tuple(f.name for f in features if type_of.is_float64(f.type)),
        categories=tuple(f.name for f in features if type_of.is_string(f.type) or type_of.is_int64(f.type)),
        lists=tuple(f.name for f in features if type_of.is_list(f.type)),
        vectors={f.name: f.type.list_size for f in features if type_of.is_fixed_size_list(f.type)},
        tasks=tuple(f.name for f in features if type_of.is_float32(f.type)),
        fms={fm: _fm_layout(fm, fields) for fm, fields in said.items()},
        of_service=tuple(f.name for f in own if f.name in OF_SERVICE),
    )


def _fm_layout(fm: str, fields: Sequence[pa.Field]) -> FmLayout:
    names = {f.name.removeprefix(f"{fm}__"): f for f in fields}
    if set(names) == {"status"}:
        raise ValueError(f"FM {fm} has no snapshot yet, so its outputs are not known: leave it out, or wait for one")
    outputs = {name: f for name, f in names.items() if name not in _NOT_OUTPUTS}
    tasks = tuple(name.removesuffix(_LOGIT) for name, f in outputs.items() if type_of.is_float32(f.type))
    return FmLayout(
        tasks, {name: _embedding(fm, name, f) for name, f in outputs.items() if not type_of.is_float32(f.type)}
    )


def _embedding(fm: str, name: str, given: pa.Field) -> tuple[int, Codec]:
    note = given.metadata or {}
    if b"codec" not in note or b"size" not in note:
        raise ValueError(f"embedding {name} of FM {fm} is not encoded: ask for embedding_format=encoded")
    return int(note[b"size"]), cast("Codec", note[b"codec"].decode())
