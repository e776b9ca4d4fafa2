"""Filters on training rows: a list of [column, operator, value], all of which must hold. Never SQL.

A row whose value is null passes no comparison; [column, "=", null] and [column, "!=", null] ask for that.
"""

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

from schemas.dataset import DatasetSpec

Condition: TypeAlias = tuple[str, str, Any]
OPERATORS = {"=": "=", "==": "=", "!=": "<>", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
MEMBERSHIP = {"in": "IN", "not in": "NOT IN"}
MOST_CONDITIONS, MOST_VALUES = 64, 10_000
_INT64 = 1 << 63
_EXAMPLE_COLUMNS = {"is_late": bool}
_CLOSED_COLUMNS = {"example_id": str, "event_time": datetime}


class FilterError(ValueError):
    """It is no filter; the message says which part and why."""


def parse_filter(text: str) -> list[Any]:
    """Give the list that a query parameter spells.

    Raises:
        FilterError: It is no JSON list.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise FilterError(f'a filter is a JSON list such as [["display","!=","0"]], not {text[:80]!r}') from None
    if not isinstance(found, list):
        raise FilterError('a filter is a list of [column, operator, value], such as [["display","!=","0"]]')
    return found


def checked_filter(spec: DatasetSpec, conditions: Sequence[Any]) -> tuple[Condition, ...]:
    """Give the conditions once each fits the dataset; times as RFC 3339 in UTC.

    Raises:
        FilterError: One is not [column, operator, value], or names no column of single values, or has another type.
    """
    if len(conditions) > MOST_CONDITIONS:
        raise FilterError(f"a filter may have {MOST_CONDITIONS} conditions, not {len(conditions)}")
    return tuple(_checked(spec, place, condition) for place, condition in enumerate(conditions))


def _checked(spec: DatasetSpec, place: int, condition: Any) -> Condition:  # noqa: ANN401 - whatever came
    if not (isinstance(condition, list | tuple) and len(condition) == 3 and isinstance(condition[0], str)):
        raise FilterError(f"condition {place} is not [column, operator, value]")
    column, operator, value = condition
    if not isinstance(operator, str):
        raise FilterError(f'condition {place}: an operator is a text such as "=", not {_shown(operator)}')
    kind = _kind_of(spec, column)
    if operator in MEMBERSHIP:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST_VALUES:
            raise FilterError(f"condition {place}: {operator!r} takes a list of 1 to {MOST_VALUES} values")
        return column, operator, tuple(_typed(place, column, kind, item) for item in value)
    if operator not in OPERATORS:
        known = ", ".join([*OPERATORS, *MEMBERSHIP])
        raise FilterError(f"condition {place}: there is no operator {operator!r}; there are {known}")
    if value is None and OPERATORS[operator] in {"=", "<>"}:
        return column, operator, None
    return column, operator, _typed(place, column, kind, value)


def _kind_of(spec: DatasetSpec, column: str) -> type:
    """Give the type of a column's values."""
    if column in _EXAMPLE_COLUMNS or column in _CLOSED_COLUMNS:
        return {**_EXAMPLE_COLUMNS, **_CLOSED_COLUMNS}[column]
    if column in {task.name for task in spec.tasks}:
        return float
    feature = spec.feature(column)
    if feature is None:
        raise FilterError(f"there is no column {column!r} to filter by: it is neither a feature nor a task")
    if feature.type not in {"float", "category"}:
        raise FilterError(f"column {column!r} is a {feature.type}; filters take single values")
    if feature.type == "float":
        return float
    return int if feature.value_type == "int64" else str


def _typed(place: int, column: str, kind: type, value: Any) -> Any:  # noqa: ANN401 - one of the types
    """Give a value as the type of its column.

    Raises:
        FilterError: It has another.
    """
    if kind is datetime:
        return _time(place, column, value)
    is_bool = isinstance(value, bool)
    if kind is bool and is_bool:
        return value
    if kind is str and isinstance(value, str) and _is_text(value):
        return value
    if kind is int and isinstance(value, int) and not is_bool and -_INT64 <= value < _INT64:
        return value
    if kind is float and isinstance(value, int | float) and not is_bool and _is_finite(value):
        return float(value)
    name = {str: "a string", int: "an int64", float: "a finite number", bool: "true or false"}[kind]
    raise FilterError(f"condition {place}: column {column!r} holds {name}, not {_shown(value)}")


def _is_text(value: str) -> bool:
    """Give whether a text can be written down: JSON may hold halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _time(place: int, column: str, value: Any) -> str:  # noqa: ANN401
    try:
        at = datetime.fromisoformat(value)
        return at.astimezone(UTC).isoformat() if at.tzinfo is not None else _refuse_naive()
    except (TypeError, ValueError, OverflowError):
        raise FilterError(
            f"condition {place}: column {column!r} holds times: give one as 2024-05-01T12:00:00Z, not {_shown(value)}"
        ) from None


def _refuse_naive() -> str:
    raise ValueError("no zone")


def _shown(value: Any) -> str:  # noqa: ANN401
    return repr(value)[:80]


def filters_examples(spec: DatasetSpec, column: str) -> bool:
    """Give whether a column is one of the `examples` table: a feature, or what came with the row."""
    return column in _EXAMPLE_COLUMNS or spec.feature(column) is not None


def sql_of(conditions: Sequence[Condition], *, prefix: str) -> tuple[str, dict[str, Any]]:
    """Give the conditions as SQL over checked column names, and the values of its parameters."""
    values: dict[str, Any] = {}
    parts = [_part(condition, values, f"{prefix}{place}") for place, condition in enumerate(conditions)]
    return " AND ".join(parts), values


def _part(condition: Condition, values: dict[str, Any], name: str) -> str:
    column, operator, value = condition
    if operator in MEMBERSHIP:
        names = [f"{name}_{place}" for place in range(len(value))]
        values.update(zip(names, value, strict=True))
        listed = ", ".join(_parameter(column, each) for each in names)
        return f'"{column}" {MEMBERSHIP[operator]} ({listed})'
    if value is None:
        return f'"{column}" IS {"NOT " if OPERATORS[operator] == "<>" else ""}NULL'
    values[name] = value
    return f'"{column}" {OPERATORS[operator]} {_parameter(column, name)}'


def _parameter(column: str, name: str) -> str:
    return f"CAST(${name} AS TIMESTAMPTZ)" if column == "event_time" else f"${name}"
