"""What closing asks the tables, as SQL. Names are declared ones, paths are quoted; nothing else is put into a query."""

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow.dataset as pads

from das_service.tables.duck import quoted_path
from das_service.tables.durable_table import DurableTable
from schemas.dataset import DatasetSpec
from schemas.entries import Position
from schemas.tables import EVENT_DAY, EXAMPLE_HASH, LABEL_HASH, LOG_ROW

_SAME = f"{{a}}.{EXAMPLE_HASH} = {{b}}.{EXAMPLE_HASH} AND {{a}}.example_id = {{b}}.example_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The tables that closing reads. outcomes: per required FM its supervision and its dead letters."""

    examples: DurableTable
    labels: DurableTable
    closed: DurableTable
    outcomes: Sequence[Sequence[DurableTable]]

    @staticmethod
    def read(cursor: duckdb.DuckDBPyConnection, name: str, table: DurableTable, days: Iterable[dt.date]) -> str | None:
        """Give what a query reads these event days of a table from, None where it has none."""
        known = table.known_rows(days)
        if isinstance(known, pads.Dataset):
            cursor.register(f"{name}_files", known)
            return f"{name}_files"
        if not known:
            return None
        files = ", ".join(map(quoted_path, known))
        options = "union_by_name = true, hive_partitioning = true, hive_types = {'event_day': DATE}"
        return f"read_parquet([{files}], {options})"


def closable_rows(sources: Sources, cursor: duckdb.DuckDBPyConnection, days: Sequence[dt.date]) -> str:
    """Give the query for examples of these days before $last that are not closed: at most $most, the oldest first.

    Columns: example_id, event_time, received_at, log_position, event_day, the hash, and outcome_<i> per required FM. An
    example that lacks an outcome is among them if it was received before $settled or lies before $start_<i> in the log.
    """
    examples = Sources.read(cursor, "examples", sources.examples, days)
    closed = Sources.read(cursor, "closed", sources.closed, days)
    outcomes, conditions = "", ""
    for place, tables in enumerate(sources.outcomes):
        found = [Sources.read(cursor, f"outcome_{place}_{i}", table, days) for i, table in enumerate(tables)]
        known = " OR ".join(_exists(source, "o") for source in found if source is not None)
        outcomes += f", ({known or 'false'}) AS outcome_{place}"
        waits_no_more = f"epoch_us(received_at) < $settled OR log_position < $start_{place}"
        conditions += f"{' AND' if conditions else ' WHERE'} (outcome_{place} OR {waits_no_more})"
    is_open = "" if closed is None else f" AND NOT {_exists(closed, 'c')}"
    return (
        f"SELECT * FROM (SELECT e.example_id, e.event_time, e.received_at, e.log_position, e.{EVENT_DAY}, "  # noqa: S608
        f"e.{EXAMPLE_HASH}{outcomes} FROM {examples} e WHERE epoch_us(e.event_time) < $last{is_open}){conditions} "
        "ORDER BY event_time, example_id LIMIT $most"
    )


def _exists(source: str, name: str) -> str:
    same = _SAME.format(a=name, b="e")
    return f"EXISTS (SELECT 1 FROM {source} {name} WHERE {same} AND {name}.{EVENT_DAY} = e.{EVENT_DAY})"  # noqa: S608


def _in_window(spec: DatasetSpec, task: str, example: str) -> str:
    """Give the condition that a label l lies in a task's window of an example."""
    window_us = next(t.label_window_seconds for t in spec.tasks if t.name == task) * 1_000_000
    early_us = spec.max_future_seconds * 1_000_000
    since = f"epoch_us(l.label_time) - epoch_us({example}.event_time)"
    return f"({since} BETWEEN {-early_us} AND {window_us})"


def labels_of(spec: DatasetSpec, labels: str | None) -> str:
    """Give the query for what counts for the rows of `asked`: _row, and per task its label, NaN where there is none."""
    if labels is None or not spec.tasks:
        nothing = "".join(f", 'nan'::FLOAT AS \"{task.name}\"" for task in spec.tasks)
        return f"SELECT a._row{nothing} FROM asked a LIMIT 0"  # noqa: S608
    columns = "".join(
        f', coalesce(arg_max(l."{task.name}", (epoch_us(l.label_time), l.log_position, l.{LOG_ROW})) FILTER '
        f'(WHERE l."{task.name}" IS NOT NULL AND {_in_window(spec, task.name, "a")}), \'nan\'::FLOAT) AS "{task.name}"'
        for task in spec.tasks
    )
    return f"SELECT a._row{columns} FROM {labels} l JOIN asked a ON {_SAME.format(a='l', b='a')} GROUP BY a._row"  # noqa: S608


def _late_columns(spec: DatasetSpec, *, only_outside: bool) -> tuple[str, str]:
    """Give the columns of a late label, and the condition that it has one; c is its closed example."""
    tasks = {}
    for task in spec.tasks:
        inside = _in_window(spec, task.name, "c")
        tasks[task.name] = (
            f'CASE WHEN {inside} THEN NULL ELSE l."{task.name}" END' if only_outside else f'l."{task.name}"'
        )
    columns = "".join(f', {expression} AS "{name}"' for name, expression in tasks.items())
    own = ("example_id", "label_time", "received_at", "log_position", EVENT_DAY, LOG_ROW, LABEL_HASH, EXAMPLE_HASH)
    head = ", ".join(f"l.{name}" for name in own)
    return head + columns, " OR ".join(f"({expression}) IS NOT NULL" for expression in tasks.values())


def late_at_closing(spec: DatasetSpec, closed: str | None, labels: str | None) -> str:
    """Give the query for labels of closed rows in `ranges` that were there in time and lie out of their window."""
    columns, is_late = _late_columns(spec, only_outside=True)
    if closed is None or labels is None:
        return _nothing(spec)
    return (
        f"SELECT {columns} FROM {labels} l JOIN {closed} c ON {_SAME.format(a='l', b='c')} "  # noqa: S608
        "JOIN ranges r ON c._partition = r.partition AND c.ready_seq >= r.first AND c.ready_seq < r.end "
        f"WHERE l.log_position <= c._labels_through AND ({is_late})"
    )


def late_after(spec: DatasetSpec, closed: str | None, labels: str | None, *, recent: dt.timedelta, old: bool) -> str:
    """Give the query for labels after position $lowest, up to $upper, whose example was closed without them.

    old: of examples that lie further than `recent` before the label's time, each label once; else of the others.
    """
    columns, is_late = _late_columns(spec, only_outside=False)
    if closed is None or labels is None:
        return _nothing(spec)
    once = f"DISTINCT ON (l.log_position, l.{LOG_ROW}, l.{EXAMPLE_HASH}) " if old else ""
    return (
        f"SELECT {once}{columns} FROM {labels} l JOIN {closed} c ON {_SAME.format(a='l', b='c')} "  # noqa: S608
        f"WHERE l.log_position > $lowest AND l.log_position <= $upper "
        f"AND l.log_position > c._labels_through AND ({is_late}) "
        f"AND epoch_us(l.label_time) - epoch_us(c.event_time) {'>' if old else '<='} "
        f"{recent // dt.timedelta(microseconds=1)}"
    )


def _nothing(spec: DatasetSpec) -> str:
    tasks = "".join(f', NULL::FLOAT AS "{task.name}"' for task in spec.tasks)
    head = (
        "NULL::VARCHAR AS example_id, NULL::TIMESTAMPTZ AS label_time, NULL::TIMESTAMPTZ AS received_at, "
        f"NULL::BIGINT AS log_position, NULL::DATE AS {EVENT_DAY}, NULL::INTEGER AS {LOG_ROW}, "
        f"NULL::BIGINT AS {LABEL_HASH}, NULL::BIGINT AS {EXAMPLE_HASH}"
    )
    return f"SELECT {head}{tasks} LIMIT 0"


def number_of(position: Position | None) -> int:
    """Give a position as a number, -1 before the first."""
    return -1 if position is None else position.number


def from_day(days: Iterable[dt.date], first: dt.date) -> list[dt.date]:
    """Give the days from the first on, in order."""
    return [day for day in sorted(days) if day >= first]


def shifted(day: dt.date, days: int) -> dt.date:
    """Give the day so many days later, the first or last one that there is at the ends of time."""
    return dt.date.fromordinal(min(max(day.toordinal() + days, 1), dt.date.max.toordinal()))
