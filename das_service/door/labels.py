"""Labels as they come through the door: columns example_id, label_time, and one per task, null where nothing is said.

A wrong or missing column refuses the request; a value that can't be stored refuses its row, and so does a value for a
task that the dataset does not have. Several labels of one example in one request are in order: each is kept.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from das_service.door.arrow_body import Body, read_batches
from das_service.door.columns import id_column, label_differences, refuse_differences, time_column
from das_service.door.json_body import JSON_SHARE, label_columns_of_rows, parse_rows
from das_service.door.row_errors import RowErrors
from das_service.door.validation import (
    BodyLimits,
    ValidRows,
    check_ids,
    check_times,
    no_rows,
)
from schemas import keys
from schemas.dataset import DatasetSpec, label_schema
from schemas.hashing import fixed_width_values

KEYS = ("example_id", "label_time")
_MOST_UNKNOWN = 100
Mask = NDArray[np.bool_]


def validate_labels_arrow(body: Body, spec: DatasetSpec, *, limits: BodyLimits, now_us: int) -> ValidRows:
    """Give the labels of an Arrow stream that may be stored. now_us: microseconds since 1970, for label_time's bounds.

    Raises:
        BadRequestError: The stream is damaged or was cut.
        InvalidRowsError: schema_mismatch, or code empty: there is no row.
        TooLargeError: It is over a limit.
    """

    def expect(schema: pa.Schema) -> None:
        refuse_differences(label_differences(schema, spec))

    budget = limits.budget()
    schema, batches = read_batches(body, budget=budget, max_rows=limits.max_rows, expect=expect)
    errors = RowErrors(sum(batch.num_rows for batch in batches))
    known = {task.name for task in spec.tasks}
    columns = {
        "example_id": id_column(schema, batches, budget),
        "label_time": time_column(schema, batches, errors, name="label_time"),
    }
    unknown: dict[str, Mask] = {}
    for place, name in enumerate(schema.names):
        chunks = [batch.column(place) for batch in batches]
        if name in known:
            columns[name] = pa.concat_arrays([_as_float(chunk) for chunk in chunks] or [pa.array([], pa.float64())])
        elif name not in KEYS:
            _add_unknown(unknown, name, chunks)
    return check_labels(columns, unknown, spec, errors=errors, now_us=now_us)


def validate_labels_json(body: Body, spec: DatasetSpec, *, limits: BodyLimits, now_us: int) -> ValidRows:
    """Give the labels of a JSON body that may be stored; raises as validate_labels_arrow does."""
    max_bytes = limits.max_decoded_bytes // JSON_SHARE
    rows = parse_rows(body, "labels", max_bytes=max_bytes, max_rows=limits.max_rows)
    errors = RowErrors(len(rows))
    columns = label_columns_of_rows(rows, spec, budget=limits.budget(), errors=errors)
    known = {*KEYS, *(task.name for task in spec.tasks)}
    unknown = _unknown_of_rows(rows, known)
    return check_labels(columns, unknown, spec, errors=errors, now_us=now_us)


def _unknown_of_rows(rows: Sequence[Mapping[str, object]], known: Collection[str]) -> dict[str, Mask]:
    """Give by name that is no task the rows that say something of it: each row under the first of its names."""
    found: dict[str, Mask] = {}
    for number, row in enumerate(rows):
        name = next((name for name, value in row.items() if value is not None and name not in known), None)
        if name is not None:
            _mask_of(found, name, len(rows))[number] = True
    return found


def _mask_of(unknown: dict[str, Mask], name: str, num_rows: int) -> Mask:
    """Give the mask of a name; names beyond _MOST_UNKNOWN share one, so that what is held does not grow with them."""
    key = name if name in unknown or len(unknown) < _MOST_UNKNOWN else ""
    return unknown[key] if key in unknown else unknown.setdefault(key, np.zeros(num_rows, np.bool_))


def check_labels(
    columns: Mapping[str, pa.Array],
    unknown: Mapping[str, Mask],
    spec: DatasetSpec,
    *,
    errors: RowErrors,
    now_us: int,
) -> ValidRows:
    """Give the labels whose values all may be stored.

    columns: example_id, label_time and tasks as float64; unknown: per name that is no task, which rows have a value.

    Raises:
        InvalidRowsError: Code empty: there is no row.
    """
    ids = columns["example_id"]
    if len(ids) == 0:
        raise no_rows()
    check_ids(ids, errors)
    check_times(columns["label_time"], spec, now_us=now_us, errors=errors, name="label_time")
    for name, rows in unknown.items():
        errors.refuse(rows, column=name, code="unknown_task", message="the dataset has no such task")
    tasks = {task.name: columns.get(task.name, pa.nulls(len(ids), pa.float64())) for task in spec.tasks}
    is_silent = np.ones(len(ids), np.bool_)
    for name, labels in tasks.items():
        is_silent &= np.asarray(labels.is_null())
        _check_range(labels, name, errors)
    errors.refuse(is_silent, column="", code="no_label", message="the row has a label for none of the tasks")
    arrays = [ids, columns["label_time"], *(_kept(labels) for labels in tasks.values())]
    batch = pa.RecordBatch.from_arrays(arrays, ["example_id", "label_time", *tasks])
    if errors.num_refused:
        batch = batch.filter(pa.array(errors.good()))
    arrays = [batch.column(0), keys.digest_array(batch.column(0)), *batch.columns[1:]]
    return ValidRows(
        batch=pa.RecordBatch.from_arrays(arrays, schema=label_schema(spec)),
        num_refused=errors.num_refused,
        errors=errors.listed(ids),
        refused_by_code=errors.by_code(),
    )


def _check_range(labels: pa.Array, name: str, errors: RowErrors) -> None:
    values = np.where(np.asarray(labels.is_null()), 0.0, fixed_width_values(labels, np.dtype("<f8")))
    outside = ~((values >= 0.0) & (values <= 1.0))  # NaN too
    errors.refuse(outside, column=name, code="out_of_range", message="a label is a number from 0 to 1")


def _kept(labels: pa.Array) -> pa.Array:
    """Give labels as they are stored; those of refused rows may be anything."""
    return pc.cast(labels, pa.float32(), safe=False)


def _as_float(chunk: pa.Array) -> pa.Array:
    if pa.types.is_boolean(chunk.type):
        chunk = chunk.cast(pa.int8())
    return pc.cast(chunk, pa.float64(), safe=False)


def _add_unknown(unknown: dict[str, Mask], name: str, chunks: Sequence[pa.Array]) -> None:
    """Note the rows of a column that is no task where it says something."""
    num_rows = sum(map(len, chunks))
    if sum(chunk.null_count for chunk in chunks) < num_rows:
        mask = _mask_of(unknown, name, num_rows)
        mask |= np.concatenate([np.asarray(chunk.is_valid()) for chunk in chunks])
