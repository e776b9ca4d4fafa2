"""Late labels: those that an example was closed without, each written once, whatever dies when.

A label is late if it was committed after its example was closed (its position lies after `_labels_through`), or if it
was there and lies out of its task's window. The second kind is looked for right after each commit of `closed`, the
first as labels come: often among examples of the weeks before them, where nearly all are, and seldom among the older
ones, which are all of the table. Which of these two looks finds a label depends on its time and its example's alone.
The table remembers how far each look went: in the labels log, and in ready_seq.
"""

import datetime as dt
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from das_service.logs.records import ready_name
from das_service.sink.close_queries import Sources, from_day, late_after, late_at_closing, number_of, shifted
from das_service.sink.feed import Feed, FeedWork
from das_service.tables.durable_table import DurableTable
from das_service.tables.offline_store import DataFile
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.tables import EXAMPLE_HASH, LATE_LABELS, LOG_ROW, labels_table_schema

_RECENT = dt.timedelta(days=31)  # how long before a label its example is no old one
_OLD_ROWS = 20_000_000  # of old closed examples that a turn goes over: about a second
_OLD_COMMITS = 4  # labels of as many commits are looked for among them at once
_NO_END = 2**63 - 1
_EARLIEST_LABEL_DAYS = 32  # before its example
_SLACK_DAYS = {"day": 0, "week": 6, "month": 30}  # how long before its rows an event_day may lie


def labels_name(partition: int) -> str:
    """Name under which `late_labels` remembers the last position of the labels log that it looked at."""
    return f"labels/{partition}"


def old_labels_name(partition: int) -> str:
    """Name under which it remembers the same of the look among examples that were old when the label came."""
    return f"old_labels/{partition}"


@dataclass(slots=True)
class _Look:
    """Labels after position `lowest` up to `upper`, per partition after `behind` up to `through`."""

    lowest: int
    upper: int
    behind: Mapping[int, int]
    through: Mapping[int, int]
    days: list[dt.date] = field(default_factory=list)
    found: pa.Table | None = None


class LateLabels:
    """Writes the late labels of one dataset. The sink's one thread uses it; `closed` is the closer's."""

    def __init__(self, work: FeedWork, closed: DurableTable, spec: DatasetSpec) -> None:
        self.spec = spec
        self.has_more = False
        self._old_look: _Look | None = None
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
        self._old_look, self._fruitless = None, {}
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
            first_label = shifted(read[0] if read else dt.date.min, -_EARLIEST_LABEL_DAYS - self._slack_days)
            closed_files = Sources.read(cursor, "closed", self._closed, read)
            label_files = Sources.read(cursor, "labels", labels.table, from_day(labels.table.days, first_label))
            found = cursor.sql(late_at_closing(self.spec, closed_files, label_files)).to_arrow_table()
        self._commit(found, {ready_name(p): end for p, (_, end) in ranges.items()})
        return True

    def write_after(self, labels: Feed) -> bool:
        """Write labels that were committed after their example was closed, if that was no old one when they were given.

        Of about a commit's labels at a time; has_more says whether others wait for the next call.
        """
        self.has_more = False
        look = self._next_look(labels, labels_name, commits=1)
        if look is None:
            return False
        days = self._days_of_labels(labels, look)
        first = shifted(days[0], -_RECENT.days - self._slack_days) if days else dt.date.max
        found = self._committed_after(labels, look, from_day(self._closed.days, first), old=False)
        self._commit(_of_look(look, found, self.spec), {labels_name(p): at for p, at in look.through.items()})
        self.has_more = any(number_of(at) > look.upper for at in labels.positions.values())
        return True

    def write_old(self, labels: Feed) -> bool:
        """Go over some of the old examples for labels that were committed after these were closed.

        Those that are found are written once all old examples were gone over, each once, of however many examples its
        id stands for. Gives whether a commit was made.
        """
        look = self._old_look or self._next_look(labels, old_labels_name, commits=_OLD_COMMITS)
        if look is None:
            return False
        if self._old_look is None:
            last_label = max(self._days_of_labels(labels, look), default=dt.date.min)
            last = shifted(last_label, self._slack_days - _RECENT.days)
            look.days = [day for day in sorted(self._closed.days) if day <= last]
            self._old_look = look
        found = _of_look(look, self._committed_after(labels, look, self._take_days(look), old=True), self.spec)
        look.found = found if look.found is None else _each_once(pa.concat_tables([look.found, found]))
        if look.days:
            return False
        found, self._old_look = look.found, None
        self._fruitless |= {old_labels_name(p): at for p, at in look.through.items()}
        if found.num_rows:
            self._commit(found, {})
        return found.num_rows > 0

    def _next_look(self, labels: Feed, name: Callable[[int], str], *, commits: int) -> _Look | None:
        """Give the labels that are looked for next, about as many as so many commits have; None if there are none."""
        looked = {**self.table.state.numbers, **self._fruitless}
        through = {p: number_of(at) for p, at in labels.positions.items()}
        behind = {p: looked.get(name(p), -1) for p in through}
        if not self.spec.tasks or all(behind[p] >= through[p] for p in through):
            return None
        lowest = min(behind[p] for p in through if behind[p] < through[p])
        most_rows = commits * self._work.settings.commit_rows
        upper = min(_last_of(labels, lowest, most_rows), max(through.values()))
        through = {p: max(behind[p], min(at, upper)) for p, at in through.items()}
        return _Look(lowest=lowest, upper=upper, behind=behind, through=through)

    def _take_days(self, look: _Look) -> list[dt.date]:
        """Take as many of the days that are left as a turn may go over, at least one."""
        taken: list[dt.date] = []
        num_rows = 0
        while look.days and (not taken or num_rows < _OLD_ROWS):
            taken.append(look.days.pop(0))
            num_rows += sum(file.num_rows for file in self._closed.days.get(taken[-1], []))
        return taken

    def _committed_after(self, labels: Feed, look: _Look, days: list[dt.date], *, old: bool) -> pa.Table:
        """Give the labels of a look whose example, of these days, was closed without them."""
        with self._work.duck.cursor() as cursor:
            label_files = Sources.read(cursor, "labels", labels.table, self._days_of_labels(labels, look))
            closed_files = Sources.read(cursor, "closed", self._closed, days)
            query = late_after(self.spec, closed_files, label_files, recent=_RECENT, old=old)
            is_empty = closed_files is None or label_files is None  # a query of nothing takes no parameters
            values = {} if is_empty else {"lowest": look.lowest, "upper": look.upper}
            return cursor.sql(query, params=values).to_arrow_table()

    def _days_of_labels(self, labels: Feed, look: _Look) -> list[dt.date]:
        """Give the days, in order, whose files may hold labels of a look."""
        days = labels.table.days
        return sorted(d for d, files in days.items() if any(_may_hold(f, look.lowest, look.upper) for f in files))

    @property
    def _slack_days(self) -> int:
        return _SLACK_DAYS[self.spec.table_granularity]

    def _commit(self, rows: pa.Table, numbers: Mapping[str, int]) -> None:
        schema = labels_table_schema(self.spec)
        table = pa.table([rows[field.name].cast(field.type) for field in schema], schema=schema)
        self.table.commit(table, {}, numbers={**self._fruitless, **numbers})
        self._fruitless = {}
        if rows.num_rows:
            self._work.metrics.late_labels.labels(self._closed.dataset).inc(rows.num_rows)


def _of_look(look: _Look, found: pa.Table, spec: DatasetSpec) -> pa.Table:
    """Give the labels that lie in the look's span of their own partition, not only in that of all."""
    partitions = keys.partitions_of(keys.digest_array(found["example_id"].combine_chunks()), spec.partitions)
    since = np.array([look.behind.get(p, _NO_END) for p in range(spec.partitions)])
    through = np.array([look.through.get(p, -1) for p in range(spec.partitions)])
    positions = found["log_position"].to_numpy()
    return found.filter(pa.array((positions > since[partitions]) & (positions <= through[partitions])))


def _each_once(labels: pa.Table) -> pa.Table:
    """Give each label once: they are the same of all examples that an id stands for."""
    place = ["log_position", LOG_ROW, EXAMPLE_HASH]
    numbered = labels.append_column("_row", pa.array(np.arange(labels.num_rows)))
    rows = numbered.group_by(place, use_threads=False).aggregate([("_row", "min")])["_row_min"]
    return labels.take(rows)


def _last_of(labels: Feed, lowest: int, most_rows: int) -> int:
    """Give up to which log position the labels after `lowest` are about so many."""
    files = [file for files in labels.table.days.values() for file in files if _may_hold(file, lowest, _NO_END)]
    num_rows = 0
    for file in sorted(files, key=_last_position):
        num_rows += file.num_rows
        if num_rows >= most_rows:
            return _last_position(file)
    return _NO_END


def _last_position(file: DataFile) -> int:
    return _NO_END if file.last_position is None else file.last_position


def _may_hold(file: DataFile, lowest: int, upper: int) -> bool:
    """Give whether a file may hold positions after lowest and up to upper."""
    return _last_position(file) > lowest and (file.first_position is None or file.first_position <= upper)
