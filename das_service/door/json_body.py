"""Untrusted JSON bodies: strict about types, bounded in size, made into the same columns as Arrow bodies.

A JSON body takes many times its size as objects, so it may be a sixteenth of the decoded limit. A value of another JSON
type than its column has refuses the whole request; a value that its type can't hold refuses its row.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from das_service.door.arrow_body import Body, Budget
from das_service.door.columns import binary_rows, null_column
from das_service.door.row_errors import RowErrors
from das_service.errors import BadRequestError, InvalidRowsError, TooLargeError
from schemas.dataset import TIMESTAMP, DatasetSpec, Feature

JSON_SHARE = 16
BEYOND_FLOAT32 = "it is beyond float32's range, in which models compute (about 3.4e38)"
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,6})(\d*))?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_NO_TIME = "it is no RFC 3339 time with an offset, such as 2026-01-31T12:00:00.5Z"
_INEXACT = "it is finer than a microsecond; round it first"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INT64 = range(-(2**63), 2**63)
_MAX_DIFFERENCES = 100

Differences: TypeAlias = list[dict[str, str]]
_M = TypeVar("_M", bound=BaseModel)


def parse_json(body: Body, *, max_bytes: int) -> Any:  # noqa: ANN401 - whatever was sent
    """Give what a JSON body says. Objects with a repeated key are refused.

    Raises:
        BadRequestError: It is not JSON in UTF-8, is nested too deeply, or repeats a key.
        TooLargeError: It is longer than max_bytes.
    """
    if len(body) > max_bytes:
        raise TooLargeError(f"a JSON body may have {max_bytes} bytes; send Arrow for more")
    try:
        return json.loads(bytes(body).decode(), object_pairs_hook=_object)
    except RecursionError:
        raise BadRequestError("the JSON body is nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the body is not JSON that we read: {str(error)[:200]}") from None


def parse_model(body: Body, model: type[_M], *, max_bytes: int) -> _M:
    """Give a JSON body as the model says, strict about types.

    Raises:
        BadRequestError: As parse_json.
        InvalidRowsError: invalid_body, with the errors by field.
        TooLargeError: It is longer than max_bytes.
    """
    parse_json(body, max_bytes=max_bytes)
    try:
        return model.model_validate_json(bytes(body), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        raise BadRequestError(f"the body is not JSON that we read: {found[0]['msg']}")
    errors = [{"field": ".".join(map(str, item["loc"])), "message": item["msg"]} for item in found[:100]]
    told = "; ".join(f"{item['field']}: {item['message']}" for item in errors[:5])
    raise InvalidRowsError(told, code="invalid_body", extra={"errors": errors})


def parse_time(value: object) -> datetime:
    """Give the time that an RFC 3339 text says, in UTC; pydantic alone would take numbers for times too.

    Raises:
        ValueError: It is something else, or finer than a microsecond.
    """
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    at = None if match is None else _microseconds(match)
    if match is None or at is None:
        raise ValueError(_NO_TIME)
    if (match[4] or "").strip("0"):
        raise ValueError(_INEXACT)
    try:
        return _EPOCH + timedelta(microseconds=at)
    except OverflowError:
        raise ValueError("it is outside the years 1 to 9999") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has the same key twice")
    return members


def parse_rows(body: Body, member: str, *, max_bytes: int, max_rows: int) -> list[dict[str, Any]]:
    """Give the rows of `{"<member>": [...]}` or of a bare list.

    Raises:
        BadRequestError: It is not JSON.
        InvalidRowsError: It has another shape.
        TooLargeError: It has too many bytes or rows.
    """
    content = parse_json(body, max_bytes=max_bytes)
    if isinstance(content, dict):
        unknown = sorted(set(content) - {member})
        if unknown or member not in content:
            raise _mismatch([_difference(member, "shape", f'the body is not {{"{member}": [...]}}')])
        content = content[member]
    if not isinstance(content, list):
        raise _mismatch([_difference(member, "shape", f"{member} is not a list")])
    if len(content) > max_rows:
        raise TooLargeError(f"the body has more than the {max_rows} rows that a request may")
    for number, row in enumerate(content):
        if not isinstance(row, dict):
            raise _mismatch([_difference(member, "shape", f"row {number} is not an object")])
    return content


@dataclass(slots=True)
class _Gathering:
    """What the columns of one request are gathered with."""

    errors: RowErrors
    differences: Differences
    budget: Budget


def columns_of_rows(
    rows: Sequence[dict[str, Any]], spec: DatasetSpec, *, budget: Budget, errors: RowErrors
) -> dict[str, pa.Array]:
    """Give the columns of a log entry; rows that can't be said in their types are refused in `errors`.

    A key that a row lacks is null in it.

    Raises:
        InvalidRowsError: schema_mismatch: a key is unknown, no row has a column that is not nullable, or a value has
            another type than its column.
    """
    present: set[str] = set().union(*rows)
    features = {feature.name: feature for feature in spec.features}
    wanted = {"example_id", "event_time", *[f.name for f in spec.features if not f.nullable]}
    differences = [
        _difference(name, "unknown", "the dataset has no such feature; declare it first")
        for name in sorted(present - features.keys() - {"example_id", "event_time"})[:_MAX_DIFFERENCES]
    ]
    differences += [
        _difference(name, "missing", "the column is missing and is not nullable") for name in sorted(wanted - present)
    ]
    gathering = _Gathering(errors, differences, budget)
    columns = {
        "example_id": _strings([row.get("example_id") for row in rows], "example_id", gathering),
        "event_time": _times([row.get("event_time") for row in rows], gathering),
    }
    for feature in spec.features:
        if feature.name in present:
            budget.spend(8 * len(rows))  # a row without the key takes its place too
            values = [row.get(feature.name) for row in rows]
            columns[feature.name] = _COLUMNS[feature.type](values, feature, gathering)
        else:
            columns[feature.name] = null_column(feature, len(rows), budget)
    if differences:
        raise _mismatch(differences)
    return columns


def label_columns_of_rows(
    rows: Sequence[dict[str, Any]], spec: DatasetSpec, *, budget: Budget, errors: RowErrors
) -> dict[str, pa.Array]:
    """Give example_id, label_time and the tasks (float64) of labels; keys that are no task are left to the caller.

    Raises:
        InvalidRowsError: schema_mismatch: no row has an id or a time, or a value has another type than its column.
    """
    present: set[str] = set().union(*rows)
    gathering = _Gathering(
        errors,
        [_difference(name, "missing", "the column is missing") for name in ("example_id", "label_time")
         if rows and name not in present],
        budget,
    )  # fmt: skip
    columns = {
        "example_id": _strings([row.get("example_id") for row in rows], "example_id", gathering),
        "label_time": _times([row.get("label_time") for row in rows], gathering, name="label_time"),
    }
    for task in spec.tasks:
        if task.name in present:
            budget.spend(8 * len(rows))
            columns[task.name] = _numbers([row.get(task.name) for row in rows], task.name, gathering)
    if gathering.differences:
        raise _mismatch(gathering.differences)
    return columns


def _difference(column: str, problem: str, message: str) -> dict[str, str]:
    return {"column": column, "problem": problem, "message": message}


def _mismatch(differences: Differences) -> InvalidRowsError:
    first = differences[0]
    return InvalidRowsError(
        f"{first['column']}: {first['message']}" + (f" (and {len(differences) - 1} more)" if differences[1:] else ""),
        extra={"columns": differences},
    )


def _has_only(values: Sequence[object], kinds: set[type], name: str, wanted: str, gathering: _Gathering) -> bool:
    """Give whether all values have one of the JSON types; notes a difference if not."""
    if set(map(type, values)) <= kinds | {type(None)}:
        return True
    row = next(i for i, value in enumerate(values) if value is not None and type(value) not in kinds)
    gathering.differences.append(
        _difference(name, "type", f"row {row} is {_json_type(values[row])}; {wanted} is wanted")
    )
    return False


def _json_type(value: object) -> str:
    names = {
        bool: "a boolean",
        str: "a string",
        int: "an integer",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _strings(values: list[Any], name: str, gathering: _Gathering) -> pa.Array:
    if not _has_only(values, {str}, name, "a string", gathering):
        return pa.nulls(len(values), pa.string())
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        broken = [i for i, value in enumerate(values) if value is not None and not _is_utf8(value)]
        _refuse(gathering, broken, name, "not_utf8", "the text holds half of a surrogate pair")
        return pa.array([None if value is None or not _is_utf8(value) else value for value in values], pa.string())


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(gathering: _Gathering, rows: Sequence[int], column: str, code: str, message: str) -> None:
    gathering.errors.refuse_rows(rows, column=column, code=code, message=message)


def _times(values: list[Any], gathering: _Gathering, name: str = "event_time") -> pa.Array:
    if not _has_only(values, {str}, name, "an RFC 3339 string", gathering):
        return pa.nulls(len(values), TIMESTAMP)
    micros: list[int | None] = []
    malformed, inexact = [], []
    for row, text in enumerate(values):
        match = None if text is None else _TIME.fullmatch(text)
        at = None if match is None else _microseconds(match)
        micros.append(at)
        if text is not None and at is None:
            malformed.append(row)
        elif match is not None and (match[4] or "").strip("0"):
            inexact.append(row)
    _refuse(gathering, malformed, name, "malformed_time", _NO_TIME)
    _refuse(gathering, inexact, name, "inexact_time", _INEXACT)
    return pa.array(micros, pa.int64()).cast(TIMESTAMP)


def _microseconds(match: "re.Match[str]") -> int | None:
    day, clock, fraction, _, zone = match.groups()
    try:
        naive = datetime.fromisoformat(f"{day}T{clock}.{(fraction or '').ljust(6, '0')}+00:00")
        hours, minutes = (0, 0) if zone in "Zz" else (int(zone[1:3]), int(zone[4:6]))
        if hours > 23 or minutes > 59:
            return None
    except ValueError:
        return None
    offset = timedelta(hours=hours, minutes=minutes) * (-1 if zone[0] == "-" else 1)
    return (naive - _EPOCH - offset) // timedelta(microseconds=1)


def _floats(values: list[Any], feature: Feature, gathering: _Gathering) -> pa.Array:
    if not _has_only(values, {int, float}, feature.name, "a number", gathering):
        return pa.nulls(len(values), pa.float64())
    return pa.array([None if value is None else _as_float(value) for value in values], pa.float64(), from_pandas=False)


def _numbers(values: list[Any], name: str, gathering: _Gathering) -> pa.Array:
    if not _has_only(values, {int, float, bool}, name, "a number from 0 to 1", gathering):
        return pa.nulls(len(values), pa.float64())
    return pa.array([None if value is None else _as_float(value) for value in values], pa.float64(), from_pandas=False)


def _as_float(value: float) -> float:
    """Give the number; an integer that no float holds is made the largest, which is beyond every range too."""
    try:
        return float(value)
    except OverflowError:
        return sys.float_info.max if value > 0 else -sys.float_info.max


def _categories(values: list[Any], feature: Feature, gathering: _Gathering) -> pa.Array:
    if feature.value_type == "string":
        return _strings(values, feature.name, gathering)
    if not _has_only(values, {int}, feature.name, "an integer", gathering):
        return pa.nulls(len(values), pa.int64())
    outside = [row for row, value in enumerate(values) if value is not None and value not in _INT64]
    _refuse(gathering, outside, feature.name, "out_of_range", "the integer does not fit 64 bits")
    return pa.array([value if value is None or value in _INT64 else None for value in values], pa.int64())


def _category_lists(values: list[Any], feature: Feature, gathering: _Gathering) -> pa.Array:
    kind, wanted = (str, "a string") if feature.value_type == "string" else (int, "an integer")
    nothing = pa.nulls(len(values), feature.arrow_type)
    if not _has_only(values, {list}, feature.name, f"a list, each of them {wanted},", gathering):
        return nothing
    flat = [item for value in values if value for item in value]
    if not _has_only(flat, {kind}, feature.name, f"{wanted} in each list", gathering):
        return nothing
    if kind is int:
        bad = _rows_where(values, lambda item: item is not None and item not in _INT64)
        _refuse(gathering, bad, feature.name, "out_of_range", "an integer of the list does not fit 64 bits")
    else:
        bad = _rows_where(values, lambda item: item is not None and not _is_utf8(item))
        _refuse(gathering, bad, feature.name, "not_utf8", "a text of the list holds half of a surrogate pair")
    unsayable = set(bad)
    return pa.array([None if row in unsayable else value for row, value in enumerate(values)], feature.arrow_type)


def _rows_where(values: Sequence[Any], is_bad: Callable[[Any], bool]) -> list[int]:
    return [row for row, value in enumerate(values) if value and any(map(is_bad, value))]


def _vectors(values: list[Any], feature: Feature, gathering: _Gathering) -> pa.Array:
    size = feature.size or 0
    nothing = pa.nulls(0, feature.arrow_type)
    if not _has_only(values, {list}, feature.name, "a list of numbers", gathering):
        return nothing
    flat = [item for value in values if value for item in value]
    if not _has_only(flat, {int, float}, feature.name, "a number in each vector", gathering):
        return nothing
    wrong = [row for row, value in enumerate(values) if value is not None and len(value) != size]
    _refuse(gathering, wrong, feature.name, "wrong_size", f"the vector has another size than {size}")
    holes = _rows_where(values, lambda item: item is None)
    _refuse(gathering, holes, feature.name, "null_element", "the vector has a null element")
    gathering.budget.spend(4 * size * len(values))
    rows = np.zeros((len(values), size), "<f4")
    unusable, beyond = {*wrong, *holes}, []
    with np.errstate(over="ignore"):
        for row, value in enumerate(values):
            if value is not None and row not in unusable:
                exact = np.array([_as_float(item) for item in value])
                rows[row] = exact
                if (np.isinf(rows[row]) & np.isfinite(exact)).any():
                    beyond.append(row)
    _refuse(gathering, beyond, feature.name, "out_of_range", BEYOND_FLOAT32)
    valid = np.array([value is not None for value in values], np.bool_)
    return binary_rows(rows.reshape(-1), feature.arrow_type, None if valid.all() else valid)


_COLUMNS: dict[str, Callable[[list[Any], Feature, _Gathering], pa.Array]] = {
    "float": _floats,
    "category": _categories,
    "category_list": _category_lists,
    "vector": _vectors,
}
