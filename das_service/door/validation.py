"""Examples as they come through the door: whole requests or single rows are refused here, and nowhere else.

A wrong, missing or unknown column refuses the request (schema_mismatch). A value that its column may not hold refuses
its row; the other rows are kept. Work is by column; a row costs Python only when it is refused or came as JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from das_service.door.arrow_body import Body, Budget, read_batches
from das_service.door.columns import FIRST_US, LAST_US, canonical_columns, refuse_unfit, valid_mask, value_bytes
from das_service.door.json_body import BEYOND_FLOAT32, JSON_SHARE, columns_of_rows, parse_rows
from das_service.door.row_errors import MAX_LISTED, RowErrors
from das_service.errors import InvalidRowsError
from schemas import keys
from schemas.dataset import DatasetSpec, Feature, example_schema
from schemas.hashing import fixed_width_values, list_elements, validity
from schemas.names import EXAMPLE_ID_MAX_BYTES

_DAY_US = 86_400_000_000
_F8 = np.dtype("<f8")
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_NOT_FINITE = "it is NaN or infinite"
_MAX_DECODED_BYTES = 2**31 - 1  # offsets of a string column have 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """What one request may hold."""

    max_rows: int
    max_decoded_bytes: int

    def budget(self) -> Budget:
        """Give a fresh budget of decoded bytes."""
        return Budget(min(self.max_decoded_bytes, _MAX_DECODED_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidRows:
    """The rows of a request that may be stored, in its order, and why others may not.

    batch has example_schema(spec); errors are as contract 3 shows them.
    """

    batch: pa.RecordBatch
    num_refused: int
    errors: list[dict[str, Any]]
    refused_by_code: Mapping[str, int]

    @property
    def errors_truncated(self) -> bool:
        """Whether there are more refused rows than errors."""
        return self.num_refused > MAX_LISTED


def validate_arrow(body: Body, spec: DatasetSpec, *, limits: BodyLimits, now_us: int) -> ValidRows:
    """Give the rows of an Arrow stream that may be stored. now_us: microseconds since 1970, for event_time's bounds.

    Raises:
        BadRequestError: The stream is damaged or was cut.
        InvalidRowsError: schema_mismatch, or code empty: there is no row.
        TooLargeError: It is over a limit.
    """

    def expect(schema: pa.Schema) -> None:
        refuse_unfit(schema, spec)

    budget = limits.budget()
    schema, batches = read_batches(body, budget=budget, max_rows=limits.max_rows, expect=expect)
    errors = RowErrors(sum(batch.num_rows for batch in batches))
    columns = canonical_columns(schema, batches, spec, budget=budget, errors=errors)
    return check_rows(columns, spec, errors=errors, now_us=now_us)


def validate_json(body: Body, spec: DatasetSpec, *, limits: BodyLimits, now_us: int) -> ValidRows:
    """Give the rows of a JSON body that may be stored; raises as validate_arrow does."""
    rows = parse_rows(body, "examples", max_bytes=limits.max_decoded_bytes // JSON_SHARE, max_rows=limits.max_rows)
    errors = RowErrors(len(rows))
    if not rows:
        raise no_rows()
    columns = columns_of_rows(rows, spec, budget=limits.budget(), errors=errors)
    return check_rows(columns, spec, errors=errors, now_us=now_us)


def check_rows(columns: Mapping[str, pa.Array], spec: DatasetSpec, *, errors: RowErrors, now_us: int) -> ValidRows:
    """Give the rows whose values all may be stored; columns are those of an entry, without the digest.

    Raises:
        InvalidRowsError: Code empty: there is no row.
    """
    ids = columns["example_id"]
    if len(ids) == 0:
        raise no_rows()
    check_ids(ids, errors)
    check_times(columns["event_time"], spec, now_us=now_us, errors=errors)
    for feature in spec.features:
        _check_feature(columns[feature.name], feature, errors)
    arrays = [ids, columns["event_time"], *[columns[feature.name] for feature in spec.features]]
    if errors.num_refused:
        arrays = _kept(arrays, errors.good())
    digest = keys.digest_array(arrays[0])
    first = _first_of_its_id(digest)
    if first is not None:
        rows = np.flatnonzero(errors.good())[~first]
        errors.refuse_rows(
            rows.tolist(), column="example_id", code="duplicate_in_request", message="an earlier row has the same id"
        )
        digest, *arrays = _kept([digest, *arrays], first)
    return ValidRows(
        batch=pa.RecordBatch.from_arrays([arrays[0], digest, *arrays[1:]], schema=example_schema(spec)),
        num_refused=errors.num_refused,
        errors=errors.listed(ids),
        refused_by_code=errors.by_code(),
    )


def _kept(arrays: Sequence[pa.Array], rows: NDArray[np.bool_]) -> list[pa.Array]:
    batch = pa.RecordBatch.from_arrays(arrays, [str(place) for place in range(len(arrays))])
    return list(batch.filter(pa.array(rows)).columns)


def no_rows() -> InvalidRowsError:
    """Give the refusal of a request without rows."""
    return InvalidRowsError("the request has no rows", code="empty")


def check_ids(ids: pa.Array, errors: RowErrors) -> None:
    """Refuse rows whose example_id is null, empty or too long."""
    _check_nulls(ids, "example_id", errors)
    lengths = value_bytes(ids)
    is_empty = (lengths == 0) & valid_mask(ids)
    errors.refuse(is_empty, column="example_id", code="empty_id", message="it is the empty string")
    message = f"it is longer than {EXAMPLE_ID_MAX_BYTES} bytes"
    errors.refuse(lengths > EXAMPLE_ID_MAX_BYTES, column="example_id", code="too_long", message=message)


def _check_nulls(array: pa.Array, column: str, errors: RowErrors) -> None:
    if array.null_count:
        errors.refuse(~validity(array), column=column, code="null", message="it is null")


def check_times(
    times: pa.Array, spec: DatasetSpec, *, now_us: int, errors: RowErrors, name: str = "event_time"
) -> None:
    """Refuse rows whose time is null, or outside what the dataset takes."""
    _check_nulls(times, name, errors)
    microseconds = fixed_width_values(times, np.dtype("<i8"))
    valid = valid_mask(times)
    latest = min(now_us + spec.max_future_seconds * 1_000_000, LAST_US)
    message = f"it is more than {spec.max_future_seconds} s ahead of the server's clock"
    errors.refuse((microseconds > latest) & valid, column=name, code="time_in_future", message=message)
    earliest, message = FIRST_US, "it is before the year 1"
    if spec.max_age_days is not None:
        earliest = max(FIRST_US, now_us - spec.max_age_days * _DAY_US)
        message = f"it is more than {spec.max_age_days} days ago"
    errors.refuse((microseconds < earliest) & valid, column=name, code="time_too_old", message=message)


def _check_feature(array: pa.Array, feature: Feature, errors: RowErrors) -> None:
    if array.null_count and not feature.nullable:
        _check_nulls(array, feature.name, errors)
    if feature.type == "float":
        _check_floats(array, feature, errors)
    elif feature.type == "vector":
        values = fixed_width_values(array, np.dtype((np.void, 4 * (feature.size or 0))))
        finite = np.isfinite(values.view("<f4").reshape(len(array), feature.size or 0))
        if not finite.all():
            bad = ~finite.all(axis=1) & valid_mask(array)
            errors.refuse(bad, column=feature.name, code="not_finite", message=_NOT_FINITE)
    elif feature.type == "category_list":
        _check_lists(array, feature, errors)


def _check_floats(array: pa.Array, feature: Feature, errors: RowErrors) -> None:
    """Refuse what is no number, and what models, which are given float32, would see as infinite."""
    values = fixed_width_values(array, _F8)
    if len(values) == 0 or (values.min() >= -_LARGEST_FLOAT32 and values.max() <= _LARGEST_FLOAT32):
        return  # with a NaN both would be false
    with np.errstate(over="ignore", invalid="ignore"):
        fits = np.isfinite(values.astype("<f4"))
    if fits.all():
        return
    finite, valid = np.isfinite(values), valid_mask(array)
    errors.refuse(~finite & valid, column=feature.name, code="not_finite", message=_NOT_FINITE)
    errors.refuse(finite & ~fits & valid, column=feature.name, code="out_of_range", message=BEYOND_FLOAT32)


def _check_lists(array: pa.Array, feature: Feature, errors: RowErrors) -> None:
    elements, bounds = list_elements(array)
    lengths = np.diff(bounds)
    valid = valid_mask(array)
    message = f"the list has more than {feature.max_length} elements"
    errors.refuse((lengths > feature.max_length) & valid, column=feature.name, code="too_long", message=message)
    if elements.null_count:
        holes = np.concatenate([[0], np.cumsum(~validity(elements))])
        with_null = (holes[bounds[1:]] != holes[bounds[:-1]]) & valid
        message = "the list has a null element"
        errors.refuse(with_null, column=feature.name, code="null_element", message=message)


def _first_of_its_id(digest: pa.Array) -> NDArray[np.bool_] | None:
    """Give True for the first row of each id, None if no id repeats. Equal digests (128 bits) are equal ids."""
    words = keys.digest_words(digest)
    firsts = np.sort(words[:, 0])
    if not (firsts[1:] == firsts[:-1]).any():
        return None
    _, places = np.unique(words, axis=0, return_index=True)
    first = np.zeros(len(words), np.bool_)
    first[places] = True
    return None if first.all() else first
