"""Late labels: those that an example was closed without, each written once, whatever dies when.

A label is late if it was committed after its example was closed (its position lies after `_labels_through`), or if it
was there and lies out of its task's window. The second kind is looked for right after each commit of `closed`, the
first as labels come: often among examples of the weeks before them, where nearly all are, and seldom among the older
ones, which are all of the table. Which of these two looks finds a label depends on its time and its example's alone.
The table remembers how far each look went: in the labels log, and in ready_seq.
"""

import datetime as dt
from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa

from das_service.logs.records import ready_name
from das_service.sink.close_queries import Sources, from_day, late_after, late_at_closing, number_of, shifted
from das_service.sink.feed import Feed, FeedWork
from das_service.tables.durable_table import DurableTable
from das_service.tables.offline_store import DataFile
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.tables import LATE_LABELS, labels_table_schema

_RECENT = dt.timedelta(days=31)  # how long before a label its example is no old one
_NO_END = 2**63 - 1
_EARLIER_DAYS = 32  # an event_day is the first of a month at most; and a label's may be the month before its example's


def labels_name(partition: int) -> str:
    """Name under which `late_labels` remembers the last position of the labels log that it looked at."""
    return f"labels/{partition}"


def old_labels_name(partition: int) -> str:
    """Name under which it remembers the same of the look among examples that were old when the label came."""
    return f"old_labels/{partition}"


class LateLabels:
    """Writes the late labels of one dataset. The sink's one thread uses it; `closed` is the closer's."""

    def __init__(self, work: FeedWork, closed: DurableTable, spec: DatasetSpec) -> None:
        self.spec = spec
        self.has_more = False
        self._fruitless: dict[str, int] = {}  # how far looks went that found nothing; written with the next commit
        self._work = work
        self._closed = closed
        self.table = DurableTable(
            work.folder,
            closed.dataset,
            LATE_LABELS,
            schema=labels_table_schema(spec),
            partitions=spec.partitions,
            retention_hours=work.settings.retention_hours,
            numbers=[name(p) for p in range(spec.partitions) for name in (ready_name, labels_name, old_labels_name)],
        )

    def open(self, *, epoch: int) -> None:
        """Take what the table remembers."""
        self._fruitless = {}
        self.table.open(epoch=epoch)

    def write_of_closed(self, labels: Feed, *, days: Collection[dt.date] | None = None) -> bool:
        """Write the labels that were there when their example was closed, and out of its window.

        days: event days of the examples that were closed since the last time, if known.
        """
        closed, late = self._closed.state.numbers, self.table.state.numbers
        ranges = {p: (late.get(ready_name(p), 0), closed.get(ready_name(p), 0)) for p in range(self.spec.partitions)}
        ranges = {p: (first, end) for p, (first, end) in ranges.items() if end > first}
        if not ranges or not self.spec.tasks:
            return False
        with self._work.duck.cursor() as cursor:
            cursor.register(
                "ranges",
                pa.table(
                    {
                        "partition": pa.array(list(ranges), pa.int32()),
                        "first": pa.array([first for first, _ in ranges.values()], pa.int64()),
                        "end": pa.array([end for _, end in ranges.values()], pa.int64()),
                    }
                ),
            )
            read = sorted(self._closed.days if days is None else days)
            first_label = shifted(read[0] if read else dt.date.min, -_EARLIER_DAYS)
            closed_files = Sources.read(cursor, "closed", self._closed, read)
            label_files = Sources.read(cursor, "labels", labels.table, from_day(labels.table.days, first_label))
            found = cursor.sql(late_at_closing(self.spec, closed_files, label_files)).to_arrow_table()
        self._commit(found, {ready_name(p): end for p, (_, end) in ranges.items()})
        return True

    def write_after(self, labels: Feed, *, old: bool = False) -> bool:
        """Write the labels that were committed after their example was closed, of about a commit's labels at a time.

        old: those of examples that were old when the label was given, else the others. has_more says whether labels
        wait for the next such call. Gives whether a commit was made.
        """
        name = old_labels_name if old else labels_name
        looked = {**self.table.state.numbers, **self._fruitless}
        through = {p: number_of(at) for p, at in labels.positions.items()}
        behind = {p: looked.get(name(p), -1) for p in through}
        self.has_more = False
        if not self.spec.tasks or all(behind[p] >= through[p] for p in through):
            return False
        lowest = min(behind[p] for p in through if behind[p] < through[p])
        upper = min(self._last_of_a_commit(labels, lowest), max(through.values()))
        self.has_more = any(at > upper for at in through.values())
        through = {p: max(behind[p], min(at, upper)) for p, at in through.items()}
        found = self._committed_after(labels, lowest, upper, old=old)
        partitions = keys.partitions_of(keys.digest_array(found["example_id"].combine_chunks()), self.spec.partitions)
        since = np.array([behind.get(p, -1) for p in range(self.spec.partitions)])
        found = found.filter(pa.array(found["log_position"].to_numpy() > since[partitions]))
        self._fruitless |= {name(p): at for p, at in through.items()}
        if old and not found.num_rows:
            return False
        self._commit(found, {})
        return True

    def _committed_after(self, labels: Feed, lowest: int, upper: int, *, old: bool) -> pa.Table:
        """Give the labels after position `lowest`, up to `upper`, whose example was closed without them."""
        with self._work.duck.cursor() as cursor:
            days = [
                day
                for day, files in sorted(labels.table.days.items())
                if any(_may_hold(file, lowest, upper) for file in files)
            ]
            label_files = Sources.read(cursor, "labels", labels.table, days)
            closed_files = Sources.read(cursor, "closed", self._closed, self._days_of(days, old=old))
            query = late_after(self.spec, closed_files, label_files, recent=_RECENT, old=old)
            is_empty = closed_files is None or label_files is None  # a query of nothing takes no parameters
            values = {} if is_empty else {"lowest": lowest, "upper": upper}
            return cursor.sql(query, params=values).to_arrow_table()

    def _days_of(self, days: list[dt.date], *, old: bool) -> list[dt.date]:
        """Give the event days of closed examples that are old, or are not, for some label of these days."""
        if not days:
            return []
        first = shifted(days[0], -_RECENT.days - 1 - _EARLIER_DAYS)
        last = shifted(days[-1], _EARLIER_DAYS - _RECENT.days)
        return [day for day in sorted(self._closed.days) if (day <= last if old else day >= first)]

    def _last_of_a_commit(self, labels: Feed, lowest: int) -> int:
        """Give up to which log position the labels after `lowest` are about as many as a commit may have."""
        files = [file for files in labels.table.days.values() for file in files if _may_hold(file, lowest, _NO_END)]
        num_rows = 0
        for file in sorted(files, key=_last_position):
            num_rows += file.num_rows
            if num_rows >= self._work.settings.commit_rows:
                return _last_position(file)
        return _NO_END

    def _commit(self, rows: pa.Table, numbers: Mapping[str, int]) -> None:
        schema = labels_table_schema(self.spec)
        table = pa.table([rows[field.name].cast(field.type) for field in schema], schema=schema)
        self.table.commit(table, {}, numbers={**self._fruitless, **numbers})
        self._fruitless = {}
        if rows.num_rows:
            self._work.metrics.late_labels.labels(self._closed.dataset).inc(rows.num_rows)


def _last_position(file: DataFile) -> int:
    return _NO_END if file.last_position is None else file.last_position


def _may_hold(file: DataFile, lowest: int, upper: int) -> bool:
    """Give whether a file may hold positions after lowest and up to upper."""
    return _last_position(file) > lowest and (file.first_position is None or file.first_position <= upper)
