"""Columns as callers send them, made into the columns of a log entry (schemas.dataset.example_schema).

What a caller may send is wider than what we keep: float32 is made float64, large strings, views and dictionaries are
made strings, any timestamp with a zone is made microseconds UTC where that is exact, a vector is made one binary.
Expansion is held against the request's budget before it happens.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from das_service.door.arrow_body import Budget
from das_service.door.row_errors import MAX_LISTED, RowErrors
from das_service.errors import InvalidRowsError
from schemas.dataset import TIMESTAMP, DatasetSpec, Feature
from schemas.hashing import fixed_width_values, validity
from schemas.identity import Identity

FIRST_US, LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999
_KEPT_SCHEMAS, _KEPT_SCHEMA_BYTES = 4, 256 * 1024
_FLOAT32, _FLOAT64, _F4, _F8 = pa.float32(), pa.float64(), np.dtype("<f4"), np.dtype("<f8")
_PER_SECOND = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}


def lookup_differences(schema: pa.Schema) -> list[dict[str, str]]:
    """Give what is wrong with the columns of a lookup: example_id, and event_time if the caller likes."""
    found = [_difference(name, "repeated", "the column is there twice") for name in _repeated(schema)]
    found += [
        _difference(name, "unknown", "a lookup takes example_id and event_time alone")
        for name in schema.names
        if name not in _RESERVED
    ]
    if "example_id" not in schema.names:
        found.append(_difference("example_id", "missing", "the column is missing"))
    problems = {field.name: _type_problem(field.name, field.type, None) for field in schema}
    return found + [_difference(name, "type", problem) for name, problem in problems.items() if problem]


def label_differences(schema: pa.Schema, spec: DatasetSpec) -> list[dict[str, str]]:
    """Give what is wrong with the columns of labels; those that are no task are told row by row, where they say any."""
    found = [_difference(name, "repeated", "the column is there twice") for name in _repeated(schema)]
    found += [
        _difference(name, "missing", "the column is missing")
        for name in ("example_id", "label_time")
        if name not in schema.names
    ]
    tasks = {task.name for task in spec.tasks}
    for field in schema:
        if field.name == "label_time":
            problem = _time_problem(field.type)
        elif field.name == "example_id":
            problem = _id_problem(field.type)
        else:
            problem = _label_problem(field.type) if field.name in tasks else None
        if problem:
            found.append(_difference(field.name, "type", problem))
    return found


def _label_problem(kind: pa.DataType) -> str | None:
    is_number = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    return None if is_number else f"it is {kind}; float32 is wanted, from 0 to 1"


def augment_differences(schema: pa.Schema, added: Collection[str]) -> list[dict[str, str]]:
    """Give what is wrong with the columns of a table to augment: example_id, event_time, and any that we do not add."""
    found = [_difference(name, "repeated", "the column is there twice") for name in _repeated(schema)]
    found += [_difference(name, "missing", "the column is missing") for name in _RESERVED if name not in schema.names]
    found += [
        _difference(
            name, "collision", "the answer has a column of this name; rename yours, or ask for columns=supervision"
        )
        for name in schema.names
        if name in added
    ]
    problems = {field.name: _type_problem(field.name, field.type, None) for field in schema}
    return found + [_difference(name, "type", problem) for name, problem in problems.items() if problem]


def _repeated(schema: pa.Schema) -> list[str]:
    return [name for name, count in Counter(schema.names).items() if count > 1]


def refuse_unfit(schema: pa.Schema, spec: DatasetSpec) -> None:
    """Raise if the columns of a request do not fit the dataset. One that fits is known again, as the next one has it.

    Raises:
        InvalidRowsError: schema_mismatch, with all differences.
    """
    known = _fitting(Identity(spec))
    if any(schema.equals(one) for one in known.schemas):
        return
    refuse_differences(schema_differences(schema, spec))
    if schema.serialize().size <= _KEPT_SCHEMA_BYTES:
        known.schemas = (schema, *known.schemas[: _KEPT_SCHEMAS - 1])


@dataclass(slots=True)
class _Fitting:
    schemas: tuple[pa.Schema, ...] = ()


@lru_cache(maxsize=64)
def _fitting(_: Identity[DatasetSpec]) -> _Fitting:
    return _Fitting()


def refuse_differences(differences: list[dict[str, str]]) -> None:
    """Raise if there are any.

    Raises:
        InvalidRowsError: schema_mismatch, with all differences.
    """
    if differences:
        told = "; ".join(f"{item['column']}: {item['message']}" for item in differences[:5])
        more = f" (and {len(differences) - 5} more)" if len(differences) > 5 else ""
        raise InvalidRowsError(
            f"the columns do not fit the dataset: {told}{more}", extra={"columns": differences[:MAX_LISTED]}
        )


def schema_differences(schema: pa.Schema, spec: DatasetSpec) -> list[dict[str, str]]:
    """Give what is wrong with the columns of a request, by column; empty when they fit the dataset."""
    fields = {field.name: field.type for field in schema}
    features = {feature.name: feature for feature in spec.features}
    unknown = [name for name in fields if name not in features and name not in _RESERVED]
    wanted = [*_RESERVED, *[name for name, feature in features.items() if not feature.nullable]]
    found = [_difference(name, "repeated", "the column is there more than once") for name in _repeated(schema)]
    found += [_difference(name, "unknown", "the dataset has no such feature; declare it first") for name in unknown]
    found += [
        _difference(name, "missing", "the column is missing and is not nullable")
        for name in wanted
        if name not in fields
    ]
    problems = {name: _type_problem(name, kind, features.get(name)) for name, kind in fields.items()}
    return found + [_difference(name, "type", problem) for name, problem in problems.items() if problem]


def _type_problem(name: str, kind: pa.DataType, feature: Feature | None) -> str | None:
    if feature is not None:
        return _feature_problem(feature, kind)
    return _RESERVED[name](kind) if name in _RESERVED else None


def _difference(column: str, problem: str, message: str) -> dict[str, str]:
    return {"column": column, "problem": problem, "message": message}


def is_text(kind: pa.DataType) -> bool:
    """Give whether a column of this type holds strings, in whatever layout."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type) and not pa.types.is_dictionary(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_int64(kind: pa.DataType) -> bool:
    return pa.types.is_int64(kind) or (pa.types.is_dictionary(kind) and pa.types.is_int64(kind.value_type))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _id_problem(kind: pa.DataType) -> str | None:
    return None if is_text(kind) else f"it is {kind}; string is wanted"


def _time_problem(kind: pa.DataType) -> str | None:
    if not pa.types.is_timestamp(kind):
        return f"it is {kind}; timestamp[us, tz=UTC] is wanted"
    if kind.tz is None:
        return (
            f"it is {kind} without a time zone; say which zone it is in, e.g. "
            "pc.assume_timezone(column, 'UTC') or column.dt.tz_localize('UTC')"
        )
    return None


def _feature_problem(feature: Feature, kind: pa.DataType) -> str | None:
    if feature.type == "float":
        fits, wanted = pa.types.is_float32(kind) or pa.types.is_float64(kind), "float64 or float32"
    elif feature.type == "vector":
        is_list = _is_list(kind) or pa.types.is_fixed_size_list(kind)
        fits = is_list and pa.types.is_float32(kind.value_type)
        wanted = f"fixed_size_list<float32>[{feature.size}]"
    else:
        value = kind
        fits, wanted = True, str(feature.value_type)
        if feature.type == "category_list":
            fits, wanted = _is_list(kind), f"list<{feature.value_type}>"
            value = kind.value_type if fits else kind
        fits = fits and (is_text(value) if feature.value_type == "string" else _is_int64(value))
    return None if fits else f"it is {kind}; {wanted} is wanted"


_RESERVED: dict[str, Callable[[pa.DataType], str | None]] = {"example_id": _id_problem, "event_time": _time_problem}


def canonical_columns(
    schema: pa.Schema, batches: Sequence[pa.RecordBatch], spec: DatasetSpec, *, budget: Budget, errors: RowErrors
) -> dict[str, pa.Array]:
    """Give example_id, event_time and all features, each one array of the type that entries have.

    The schema must fit (schema_differences is empty). Nullable features that are missing are null throughout.
    """
    num_rows = sum(batch.num_rows for batch in batches)
    place_of = {name: place for place, name in enumerate(schema.names)}
    columns = {
        "example_id": id_column(schema, batches, budget),
        "event_time": time_column(schema, batches, errors),
    }
    parts = list(zip(*[batch.columns for batch in batches], strict=True)) or [()] * len(schema)
    with np.errstate(invalid="ignore"):  # a signalling NaN; what is no number is refused later
        for feature in spec.features:
            place = place_of.get(feature.name)
            if place is None:
                columns[feature.name] = null_column(feature, num_rows, budget)
            elif feature.type == "vector":
                array = _one_array(parts[place], pa.list_(pa.float32()))
                columns[feature.name] = packed_vectors(array, feature, budget=budget, errors=errors)
            else:
                columns[feature.name] = _plain_column(parts[place], feature.arrow_type, budget)
    return columns


def id_column(schema: pa.Schema, batches: Sequence[pa.RecordBatch], budget: Budget) -> pa.Array:
    """Give example_id alone as strings."""
    index = schema.get_field_index("example_id")
    return _plain_column([batch.column(index) for batch in batches], pa.string(), budget)


def time_column(
    schema: pa.Schema, batches: Sequence[pa.RecordBatch], errors: RowErrors, *, name: str = "event_time"
) -> pa.Array:
    """Give a column of times alone in microseconds UTC; refuses rows as canonical_times does."""
    index = schema.get_field_index(name)
    return canonical_times(_one_array([batch.column(index) for batch in batches], TIMESTAMP), errors, name=name)


def null_column(feature: Feature, num_rows: int, budget: Budget) -> pa.Array:
    """Give a column of nulls for a feature that was not sent."""
    budget.spend(num_rows * (4 * feature.size if feature.size else 8))
    return pa.nulls(num_rows, feature.arrow_type)


def _one_array(chunks: Sequence[pa.Array], empty: pa.DataType) -> pa.Array:
    if not chunks:
        return pa.array([], empty)
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def _plain_column(chunks: Sequence[pa.Array], wanted: pa.DataType, budget: Budget) -> pa.Array:
    if not chunks or chunks[0].type == wanted:
        return _one_array(chunks, wanted)
    if len(chunks) == 1 and chunks[0].type == _FLOAT32 and chunks[0].null_count == 0:
        return _as_float64(chunks[0])
    for chunk in chunks:
        budget.spend(expanded_bytes(chunk))
    return _one_array([_without_views(chunk).cast(wanted) for chunk in chunks], wanted)


def _as_float64(array: pa.Array) -> pa.Array:
    """Give floats without nulls as doubles; numpy has less to do than Arrow before it begins."""
    values = fixed_width_values(array, _F4).astype(_F8)
    return pa.Array.from_buffers(_FLOAT64, len(array), [None, pa.py_buffer(values)])


def expanded_bytes(array: pa.Array) -> int:
    """Give the bytes that the values of an array take when each row has its own copy, where the body counts fewer."""
    kind = array.type
    if _is_list(kind):
        return expanded_bytes(array.values)
    if pa.types.is_dictionary(kind):
        valid = array.indices.drop_null()
        places = fixed_width_values(valid, np.dtype(valid.type.to_pandas_dtype()))
        lengths = value_bytes(array.dictionary)
        return int(lengths[places].sum(dtype=np.int64)) + 4 * len(array) if len(places) else 4 * len(array)
    if pa.types.is_string_view(kind):
        return int(value_bytes(array).sum(dtype=np.int64))
    return 0


def value_bytes(array: pa.Array) -> NDArray[np.integer]:
    """Give the bytes of each value; 0 for null."""
    if pa.types.is_string_view(array.type):
        buffer = array.buffers()[1]
        if buffer is None or len(array) == 0:
            return np.zeros(len(array), np.int64)
        views = np.frombuffer(buffer, "<i4", count=4 * len(array), offset=16 * array.offset)
        lengths = views[0::4].astype(np.int64)
        return np.where(validity(array), lengths, 0) if array.null_count else lengths
    if pa.types.is_int64(array.type):
        return np.full(len(array), 8, np.int64)
    if pa.types.is_string(array.type) and array.null_count == 0 and len(array):
        return np.diff(np.frombuffer(array.buffers()[1], "<i4", count=len(array) + 1, offset=4 * array.offset))
    return pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _without_views(array: pa.Array) -> pa.Array:
    """Give the array with dictionaries of string views made dictionaries of strings: pyarrow can't cast the former."""
    kind = array.type
    if pa.types.is_dictionary(kind) and pa.types.is_string_view(kind.value_type):
        return pa.DictionaryArray.from_arrays(array.indices, array.dictionary.cast(pa.string()))
    if _is_list(kind) and pa.types.is_dictionary(kind.value_type):
        make = pa.ListArray if pa.types.is_list(kind) else pa.LargeListArray
        mask = pc.is_null(array) if array.null_count else None
        offsets = array.offsets
        if mask is not None and offsets.offset:
            offsets = pa.concat_arrays([offsets])
        return make.from_arrays(offsets, _without_views(array.values), mask=mask)
    return array


def canonical_times(array: pa.Array, errors: RowErrors, *, name: str = "event_time") -> pa.Array:
    """Give timestamps of any unit and zone in microseconds UTC; refuses rows that this can't say exactly."""
    per_second = _PER_SECOND[array.type.unit]
    ticks = fixed_width_values(array, np.dtype("<i8"))
    if per_second == _PER_SECOND["us"]:
        microseconds = ticks
    elif per_second > _PER_SECOND["us"]:
        microseconds, rest = np.divmod(ticks, per_second // _PER_SECOND["us"])
        inexact = (rest != 0) & valid_mask(array)
        errors.refuse(
            inexact, column=name, code="inexact_time", message="it is finer than a microsecond; round it first"
        )
    else:
        factor = _PER_SECOND["us"] // per_second
        microseconds = np.clip(ticks, FIRST_US // factor - 1, LAST_US // factor + 1) * factor
    validity_buffer = pa.array(valid_mask(array)).buffers()[1] if array.null_count else None
    data = pa.py_buffer(np.ascontiguousarray(microseconds))
    return pa.Array.from_buffers(TIMESTAMP, len(array), [validity_buffer, data])


def valid_mask(array: pa.Array) -> NDArray[np.bool_]:
    """Give True where the array has a value."""
    return validity(array) if array.null_count else np.ones(len(array), np.bool_)


def packed_vectors(array: pa.Array, feature: Feature, *, budget: Budget, errors: RowErrors) -> pa.Array:
    """Give (rows,) vectors as fixed-size binaries; refuses rows of another size or with null elements."""
    size = feature.size or 0
    valid = valid_mask(array)
    starts, lengths = _list_bounds(array)
    wrong = (lengths != size) & valid
    errors.refuse(wrong, column=feature.name, code="wrong_size", message=f"the vector has another size than {size}")
    usable = valid & ~wrong
    elements = array.values
    if elements.null_count:
        holes = np.concatenate([[0], np.cumsum(~validity(elements))])
        with_null = usable & (holes[starts + np.where(usable, lengths, 0)] != holes[starts])
        errors.refuse(with_null, column=feature.name, code="null_element", message="the vector has a null element")
    values = fixed_width_values(elements, np.dtype("<f4"))
    dense = len(array) > 0 and bool((lengths == size).all()) and bool((np.diff(starts) == size).all())
    if dense:
        packed = values[int(starts[0]) : int(starts[0]) + len(array) * size]
    else:
        budget.spend(4 * size * len(array))
        rows = np.zeros((len(array), size), "<f4")
        rows[usable] = values[starts[usable][:, None] + np.arange(size)]
        packed = rows.reshape(-1)
    return binary_rows(np.ascontiguousarray(packed), feature.arrow_type, valid if array.null_count else None)


def binary_rows(values: NDArray[Any], kind: pa.DataType, valid: NDArray[np.bool_] | None) -> pa.Array:
    """Give packed rows as an array of fixed-size binaries."""
    rows = values.nbytes // kind.byte_width
    validity_buffer = None if valid is None else pa.array(valid).buffers()[1]
    return pa.Array.from_buffers(kind, rows, [validity_buffer, pa.py_buffer(values)])


def _list_bounds(array: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give where each list starts in array.values, and its length."""
    if pa.types.is_fixed_size_list(array.type):
        width = array.type.list_size
        starts = (np.arange(len(array), dtype=np.int64) + array.offset) * width
        return starts, np.full(len(array), width, np.int64)
    buffer = array.buffers()[1]
    if buffer is None or len(array) == 0:
        return np.zeros(len(array), np.int64), np.zeros(len(array), np.int64)
    dtype = np.dtype("<i8" if pa.types.is_large_list(array.type) else "<i4")
    bounds = np.frombuffer(buffer, dtype, count=len(array) + 1, offset=array.offset * dtype.itemsize).astype(np.int64)
    return bounds[:-1], np.diff(bounds)
