"""Supervision put beside a caller's own rows, as the kind of table that the caller has.

Neither pandas nor polars is imported: who hands in a frame of theirs has imported them.
"""

import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from das_service.client.arrow import to_table

_DAY_US = 86_400_000_000
_KEYS = ("example_id", "event_time")


def own_table(data: Any) -> Any:  # noqa: ANN401 - whatever holds a table
    """Give an Arrow table and a pandas or polars frame as they are, and whatever else holds a table as an Arrow table.

    Raises:
        TypeError: It is no table.
    """
    if isinstance(data, pa.Table) or _is_frame(data, "pandas") or _is_frame(data, "polars"):
        return data
    name = type(data).__name__
    if name == "LazyFrame":
        raise TypeError("a LazyFrame has no rows yet: collect() it first")
    if name == "Series":
        raise TypeError("a Series is one column: give the table with example_id and event_time")
    return to_table(data)


def join_keys(table: Any) -> pa.Table:  # noqa: ANN401 - what own_table gives
    """Give the columns example_id and event_time.

    Raises:
        ValueError: One is missing.
    """
    names = _names(table)
    missing = [name for name in _KEYS if name not in names]
    if missing:
        has = ", ".join(map(str, names)) or "none"
        raise ValueError(f"the table has no column {' and no column '.join(missing)}; its columns: {has}")
    return to_table(table[list(_KEYS)] if _is_frame(table, "pandas") else table.select(list(_KEYS)))


def cut_at_days(table: pa.Table, *, most_rows: int) -> list[tuple[int, pa.Table]]:
    """Give pieces of at most most_rows rows, at least one, each with the number of its first row.

    A piece ends where the UTC day of event_time changes, if it does in its second half: the service reads the tables of
    a day for each piece with rows of it.
    """
    pieces = []
    start = 0
    while start == 0 or start < table.num_rows:
        num_rows = most_rows
        if start + most_rows < table.num_rows:
            num_rows = most_rows // 2 + _last_day_change(
                table["event_time"].slice(start + most_rows // 2, -(-most_rows // 2))
            )
        pieces.append((start, table.slice(start, num_rows)))
        start += num_rows
    return pieces


def _last_day_change(event_time: pa.ChunkedArray) -> int:
    """Give the number of the first row of the last day; all rows where there is but one day, or no times."""
    if not pa.types.is_timestamp(event_time.type):
        return len(event_time)
    microseconds = event_time.cast(pa.timestamp("us", event_time.type.tz), safe=False).cast(pa.int64())
    run_ends = pc.run_end_encode(pc.divide(microseconds, _DAY_US).combine_chunks()).run_ends
    return int(run_ends[-2].as_py()) if len(run_ends) > 1 else len(event_time)


def refuse_collision(table: Any, added: Sequence[str]) -> None:  # noqa: ANN401
    """Raise if the caller's table has a column that is to be added.

    Raises:
        ValueError: It has; the message names them.
    """
    both = sorted(set(_names(table)) & set(added))
    if both:
        raise ValueError(f"the table has columns that would be added: {', '.join(both)}; rename or drop them")


def with_columns(table: Any, added: pa.Table) -> Any:  # noqa: ANN401
    """Give the caller's table with columns appended, as the kind of table that it is."""
    if _is_frame(table, "polars"):
        polars = sys.modules["polars"]
        return table.hstack(polars.from_arrow(added))
    if _is_frame(table, "pandas"):
        pandas = sys.modules["pandas"]
        frame = added.to_pandas()
        frame.index = table.index
        return pandas.concat([table, frame], axis=1)
    for field, column in zip(added.schema, added.columns, strict=True):
        table = table.append_column(field, column)
    return table


def _names(table: Any) -> list[Any]:  # noqa: ANN401
    return list(table.column_names if isinstance(table, pa.Table) else table.columns)


def _is_frame(data: Any, library: str) -> bool:  # noqa: ANN401
    return type(data).__name__ == "DataFrame" and type(data).__module__.split(".")[0] == library
