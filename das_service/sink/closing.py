"""Closing: once an example's label window is over and it is scored, it goes to `closed` with the labels that it got.

Per partition, in steps that a crash anywhere leaves repairable:
1. The watermark says which windows are over. Labels that the log held by then are waited for, since they were posted
   while event time came that far.
2. Examples whose window is over and that are not in `closed` yet, scored by every required FM that they concern,
   dead-lettered, or too long in waiting, are appended with the labels committed so far, in the order of event_time
   and example_id, and a dense ready_seq. The same commit remembers the watermark and the next ready_seq.
3. Labels of these examples that came in time and are out of their window, and labels that were committed after their
   example was closed, go to `late_labels`. That commit remembers how far it looked, in ready_seq and in the labels log.

Of several labels of one task within the window the one with the latest label_time counts, of those the last in the log.
A window reaches from max_future_seconds before event_time (clocks differ) to label_window_seconds after it, inclusive.
"""

import datetime as dt
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from das_service.logs.records import EXAMPLES, LABELS, LogsFile, dead_log, ready_name, scored_log, watermark_name
from das_service.logs.streams import LogCounters, read_counters
from das_service.redis_client import UNREACHABLE
from das_service.sink.close_queries import Sources, closable_rows, from_day, labels_of, number_of, shifted
from das_service.sink.compaction import compact_step
from das_service.sink.feed import VACUUM_SECONDS, Feed, FeedWork
from das_service.sink.late_labels import LateLabels
from das_service.sink.watermarks import Watermarks, latest_name
from das_service.tables.durable_table import DurableTable, LostOwnershipError
from schemas import keys
from schemas.dataset import TIMESTAMP, DatasetSpec
from schemas.entries import Position
from schemas.tables import (
    CLOSED,
    EVENT_DAY,
    closed_table_schema,
    event_days,
)

log = logging.getLogger("das.sink")
Int64s = NDArray[np.int64]
LATE_SECONDS = 10.0
REMEMBER_SECONDS = 600.0
_TURN_SHARE = 2  # a turn reads whole event days: the feeds, in the same thread, come first
_PAUSE_SHARE = 10  # and a look for late labels reads weeks of `closed`
_OLD_PAUSE_SHARE = 30  # or, for labels of old examples, a part of all but these weeks
_FIRST_US = -62_135_596_800_000_000  # the year 1: no event_time and no date lies before it
_EPOCH_DAY = dt.date(1970, 1, 1)
_DAY_US = 86_400_000_000
CLOSED_AT = "closed_at"  # `closed` remembers the latest time that it gave its rows, in microseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How far a partition may be closed once the labels up to a position are committed."""

    watermark_us: int
    labels_through: int


class Closer:
    """Closes the examples of one dataset. The sink's one thread uses it."""

    def __init__(self, work: FeedWork, dataset: str, spec: DatasetSpec, logs: LogsFile) -> None:
        self.spec = spec
        self.problem = ""
        self._work = work
        self._dataset = dataset
        self.logs = logs
        self.closed = DurableTable(
            work.folder,
            dataset,
            CLOSED,
            schema=closed_table_schema(spec),
            partitions=logs.partitions,
            retention_hours=work.settings.retention_hours,
            numbers=[CLOSED_AT, *(name(p) for p in range(logs.partitions) for name in (watermark_name, ready_name))],
        )
        self.late = LateLabels(work, self.closed, spec)
        self._is_open = False
        self._watermarks = Watermarks()
        self._bounds: dict[int, Bound] = {}
        self._due_at = float("-inf")
        self._late_due_at = float("-inf")
        self._old_due_at: float | None = None
        self._remembered_at = float("-inf")
        self._vacuumed_at = time.monotonic()

    def follow(self, spec: DatasetSpec) -> None:
        """Take notice of other limits and windows."""
        self.spec = self.late.spec = spec

    def close(self) -> None:
        """Forget the loaded tables: the next turn opens them again."""
        self._is_open = False

    def turn(
        self,
        feeds: Mapping[str, Feed],
        required: Mapping[str, Mapping[int, Position]],
        *,
        now: float,
        now_us: int,
    ) -> bool:
        """Close what is due; give whether a commit was made. now: monotonic seconds; now_us: of the clock.

        required: FMs whose outcome is waited for, each with its first position in the examples log per partition.
        """
        if now < self._due_at:
            return False
        self._due_at = now + self._work.settings.commit_seconds
        examples, labels = feeds.get(EXAMPLES), feeds.get(LABELS)
        if examples is None or labels is None or not examples.positions or not labels.positions:
            return False
        started_at = time.monotonic()
        try:
            self._open()
            closed_at = self._closed_at(now_us)
            is_moved = self._advance(feeds, required, now=now, now_us=now_us, closed_at=closed_at)
            self._work.client.hset(keys.CLOSED_THROUGH, self._dataset, closed_at)
        except UNREACHABLE:
            raise
        except Exception as error:  # closing that fails must not stop the feeds; health shows it
            self._is_open = False
            self.problem = f"table {CLOSED} of dataset {self._dataset}: {type(error).__name__}: {error}"
            log.warning("%s", self.problem, exc_info=not isinstance(error, LostOwnershipError | OSError))
            return False
        self.problem = ""
        if self._due_at > now:
            self._due_at = max(self._due_at, now + _TURN_SHARE * (time.monotonic() - started_at))
        return is_moved

    def compact(self, *, now: float, most_small_files: int) -> bool:
        """Put some small files together if there are too many; give whether that was done. now: monotonic seconds."""
        if not self._is_open:
            return False
        target_bytes = self._work.settings.compact_target_bytes
        try:
            if now - self._vacuumed_at >= VACUUM_SECONDS:
                self._vacuumed_at = now
                for table in (self.closed, self.late.table):
                    table.vacuum()
            return any(
                compact_step(table, most_small_files=most_small_files, target_bytes=target_bytes)
                for table in (self.closed, self.late.table)
            )
        except Exception as error:  # noqa: BLE001 - as in turn
            self._is_open = False
            self.problem = f"table {CLOSED} of dataset {self._dataset}: {type(error).__name__}: {error}"
            log.warning("%s", self.problem)
            return False

    def _open(self) -> None:
        if self._is_open:
            return
        self.closed.open(epoch=self.logs.epoch)
        self.late.open(epoch=self.logs.epoch)
        self._is_open = True
        self._bounds = {}
        for partition in range(self.logs.partitions):
            reached = self.closed.state.numbers.get(watermark_name(partition))
            if reached is not None:
                known = self._watermarks.reached.get(partition, reached)
                self._watermarks.reached[partition] = max(reached, known)

    def _closed_at(self, now_us: int) -> int:
        """Give the time that rows closed now get: later than all before, and than what readers were told is settled."""
        known = int(self._work.client.hget(keys.CLOSED_THROUGH, self._dataset) or -1)
        return max(now_us, known + 1, self.closed.state.numbers.get(CLOSED_AT, -1) + 1)

    def _advance(
        self,
        feeds: Mapping[str, Feed],
        required: Mapping[str, Mapping[int, Position]],
        *,
        now: float,
        now_us: int,
        closed_at: int,
    ) -> bool:
        examples, labels = feeds[EXAMPLES], feeds[LABELS]
        is_moved = self.late.write_of_closed(labels)
        self._look(examples, now=now)
        closable = self._closable(labels)
        if closable:
            sources = self._sources(feeds, list(required))
            rows = self._rows_to_close(examples, sources, closable, required, now_us=now_us)
            if rows is not None:
                self._close_rows(rows, labels, closable, closed_at=closed_at)
                is_moved = True
            else:
                is_moved |= self._remember(examples, closable, now=now)
            if rows is not None and rows.num_rows >= self._work.settings.commit_rows:
                self._due_at = now  # there may be more, up to the same bounds
            else:
                for partition in closable:
                    del self._bounds[partition]
        return self._look_for_late(labels, now=now) or is_moved

    def _look_for_late(self, labels: Feed, *, now: float) -> bool:
        """Write late labels where a look is due; give whether a commit was made.

        A look that fails is paced as others are: closing goes on meanwhile.
        """
        is_moved = False
        if now >= self._late_due_at:
            started_at = time.monotonic()
            try:
                is_moved = self.late.write_after(labels)
            finally:
                pause = _PAUSE_SHARE * (time.monotonic() - started_at)
                self._late_due_at = now + (pause if self.late.has_more else max(LATE_SECONDS, pause))
        if self._old_due_at is None:
            self._old_due_at = now + LATE_SECONDS  # after a start the feeds have most to do
        elif now >= self._old_due_at:
            started_at = time.monotonic()
            try:
                is_moved |= self.late.write_old(labels)
            finally:
                self._old_due_at = now + max(LATE_SECONDS, _OLD_PAUSE_SHARE * (time.monotonic() - started_at))
        return is_moved

    # ---- how far

    def _look(self, examples: Feed, *, now: float) -> None:
        """Bring the watermarks up to date, and note which labels each waits for.

        The logs' ends are read here, after the examples that moved the watermarks: what was posted before them counts.
        """
        partitions = range(self.logs.partitions)
        counters = read_counters(self._work.client, self._dataset, partitions, (EXAMPLES, LABELS))
        numbers = examples.table.state.numbers
        latest = {partition: numbers.get(latest_name(partition)) for partition in partitions}
        waiting = {
            partition: max(
                0, _last(counters.get((partition, EXAMPLES))) - number_of(examples.positions.get(partition))
            )  # a log that was lost ends before the table does
            for partition in partitions
        }
        reached = self._watermarks.look(
            latest, waiting, lateness_us=self.spec.allowed_lateness_seconds * 1_000_000, now=now
        )
        for partition, watermark in reached.items():
            self._work.metrics.watermark.labels(self._dataset, str(partition)).set(watermark / 1e6)
            if partition not in self._bounds:
                end = _last(counters.get((partition, LABELS)))
                self._bounds[partition] = Bound(watermark_us=watermark, labels_through=end)

    def _closable(self, labels: Feed) -> dict[int, Bound]:
        """Give the partitions whose labels are committed as far as their watermark asks."""
        return {
            partition: bound
            for partition, bound in self._bounds.items()
            if number_of(labels.positions.get(partition)) >= bound.labels_through
        }

    def _remember(self, examples: Feed, closable: Mapping[int, Bound], *, now: float) -> bool:
        """Write down the watermarks now and then while rows are open, so that a restart does not lose quiet time."""
        is_due = now - self._remembered_at >= REMEMBER_SECONDS
        if not is_due or self.closed.state.rows >= examples.table.state.rows:
            return False
        self._remembered_at = now
        numbers = self._numbers_at(closable)
        if numbers == self.closed.state.numbers:
            return False
        self.closed.commit(closed_table_schema(self.spec).empty_table(), {}, numbers=numbers)
        return True

    def _numbers_at(self, closable: Mapping[int, Bound]) -> dict[str, int]:
        """Give what `closed` remembers once these watermarks are reached."""
        numbers = dict(self.closed.state.numbers)
        for partition, bound in closable.items():
            name = watermark_name(partition)
            numbers[name] = max(bound.watermark_us, numbers.get(name, bound.watermark_us))
        return numbers

    # ---- which rows

    def _sources(self, feeds: Mapping[str, Feed], fms: Sequence[str]) -> Sources:
        outcomes = [
            [feeds[kind].table for kind in (scored_log(fm), dead_log(fm)) if kind in feeds and feeds[kind].positions]
            for fm in fms
        ]
        return Sources(
            examples=feeds[EXAMPLES].table, labels=feeds[LABELS].table, closed=self.closed, outcomes=outcomes
        )

    def _rows_to_close(
        self,
        examples: Feed,
        sources: Sources,
        closable: Mapping[int, Bound],
        required: Mapping[str, Mapping[int, Position]],
        *,
        now_us: int,
    ) -> pa.Table | None:
        """Give up to a commit's rows whose window is over, without labels yet; None if there are none."""
        window_us = self.spec.label_window_seconds * 1_000_000
        last_us = max(bound.watermark_us for bound in closable.values()) - window_us
        settings = self._work.settings
        settled_us = now_us - int(settings.close_wait_seconds * 1_000_000)
        days = self._open_days(examples.table, last_us)
        starts = [max((at.number for at in places.values()), default=0) for places in required.values()]
        waited = {f"start_{place}": start for place, start in enumerate(starts)} | (
            {"settled": settled_us} if starts else {}
        )
        for first in range(0, len(days), settings.commit_event_days):
            part = days[first : first + settings.commit_event_days]
            with self._work.duck.cursor() as cursor:
                query = closable_rows(sources, cursor, part)
                values = {"last": last_us, "most": 2 * settings.commit_rows, **waited}
                found = cursor.sql(query, params=values).to_arrow_table()
            rows = self._due(found, closable, required, window_us=window_us, settled_us=settled_us)
            if rows.num_rows:
                return rows.slice(0, settings.commit_rows)
        return None

    def _open_days(self, examples: DurableTable, last_us: int) -> list[dt.date]:
        """Give the event days before last_us of which `closed` has fewer rows than `examples`."""
        last_day = shifted(_EPOCH_DAY, last_us // _DAY_US)
        closed = self.closed.days
        return [
            day
            for day, files in sorted(examples.days.items())
            if day <= last_day
            and sum(file.num_rows for file in files) > sum(file.num_rows for file in closed.get(day, []))
        ]

    def _due(
        self,
        found: pa.Table,
        closable: Mapping[int, Bound],
        required: Mapping[str, Mapping[int, Position]],
        *,
        window_us: int,
        settled_us: int,
    ) -> pa.Table:
        """Give the rows that are due, in ready order, with their partition."""
        partitions = keys.partitions_of(keys.digest_array(found["example_id"].combine_chunks()), self.spec.partitions)
        times = found["event_time"].cast(pa.int64()).to_numpy()
        position = found["log_position"].to_numpy()
        last = np.full(self.spec.partitions, np.iinfo(np.int64).min)
        for partition, bound in closable.items():
            last[partition] = bound.watermark_us - window_us
        is_due = times < last[partitions]
        is_settled = found["received_at"].cast(pa.int64()).to_numpy() < settled_us
        pending = np.zeros(found.num_rows, np.bool_)
        for place, starts in enumerate(required.values()):
            start = np.array([starts[p].number if p in starts else 0 for p in range(self.spec.partitions)])
            has_outcome = found[f"outcome_{place}"].to_numpy(zero_copy_only=False)
            pending |= ~has_outcome & (position >= start[partitions])
        numbers = np.flatnonzero(is_due & (is_settled | ~pending))
        rows = found.select(["example_id", "event_time", "_example_hash", EVENT_DAY]).append_column(
            "_partition", pa.array(partitions.astype(np.int32))
        )
        rows = rows.take(pa.array(numbers))
        return rows.sort_by([("event_time", "ascending"), ("example_id", "ascending")])

    def _close_rows(self, rows: pa.Table, labels: Feed, closable: Mapping[int, Bound], *, closed_at: int) -> None:
        """Append rows with their labels."""
        numbers = {**self._numbers_at(closable), CLOSED_AT: closed_at}
        partitions = rows["_partition"].to_numpy()
        ready = np.empty(rows.num_rows, np.int64)
        through = np.empty(rows.num_rows, np.int64)
        for partition in np.unique(partitions).tolist():
            mine = np.flatnonzero(partitions == partition)
            first = numbers.get(ready_name(partition), 0)
            ready[mine] = first + np.arange(len(mine))
            through[mine] = number_of(labels.positions.get(partition))
            numbers[ready_name(partition)] = first + len(mine)
        said = self._labels_of(rows, labels.table)
        columns = {
            **{name: rows[name] for name in rows.column_names},
            **{name: said[name] for name in said.column_names},
            "ready_seq": pa.array(ready),
            "closed_at": pa.array(np.full(rows.num_rows, closed_at)).cast(TIMESTAMP),
            "_labels_through": pa.array(through),
        }
        schema = closed_table_schema(self.spec)
        table = pa.table([columns[field.name].cast(field.type) for field in schema], schema=schema)
        self.closed.commit(table, {}, numbers=numbers)
        self._work.metrics.committed_rows.labels(self._dataset, CLOSED).inc(rows.num_rows)
        self.late.write_of_closed(labels, days=set(rows[EVENT_DAY].to_pylist()))

    # ---- labels

    def _labels_of(self, rows: pa.Table, labels: DurableTable) -> pa.Table:
        """Give a column per task: what counts for each row, null where nothing does and silence says nothing."""
        asked = _numbered(rows)
        days = self._label_days(labels, rows)
        with self._work.duck.cursor() as cursor:
            cursor.register("asked", asked)
            query = labels_of(self.spec, Sources.read(cursor, "labels", labels, days))
            found = cursor.sql(query).to_arrow_table()
        columns = {}
        place = found["_row"].to_numpy()
        for task in self.spec.tasks:
            values = np.zeros(rows.num_rows, np.float32)
            valid = np.full(rows.num_rows, task.negative_if_silent)
            said = found[task.name].to_numpy()
            is_said = ~np.isnan(said)
            values[place[is_said]] = said[is_said]
            valid[place[is_said]] = True
            columns[task.name] = pa.array(values, mask=~valid)
        return pa.table(columns) if columns else pa.table({})

    def _label_days(self, labels: DurableTable, rows: pa.Table) -> list[dt.date]:
        """Give the days in which labels of the rows may lie within their windows."""
        times = pc.min_max(rows["event_time"].cast(pa.int64())).as_py()
        earliest_us = max(_FIRST_US, times["min"] - self.spec.max_future_seconds * 1_000_000)
        last_day = shifted(_EPOCH_DAY, (times["max"] + self.spec.label_window_seconds * 1_000_000) // _DAY_US)
        days = from_day(labels.days, _day_of(earliest_us, self.spec.table_granularity))
        return [day for day in days if day <= last_day]


def _numbered(rows: pa.Table) -> pa.Table:
    asked = rows.select(["example_id", "event_time", "_example_hash"])
    return asked.append_column("_row", pa.array(np.arange(rows.num_rows)))


def _day_of(microseconds: int, granularity: str) -> dt.date:
    day: dt.date = event_days(pa.array([microseconds]).cast(TIMESTAMP), granularity)[0].as_py()
    return day


def _last(counted: LogCounters | None) -> int:
    """Give the position of a log's last entry, also of one that survived from an earlier epoch; -1 if it has none."""
    if counted is None:
        return -1
    if counted.last < 0:
        return number_of(counted.older)
    return Position(epoch=counted.epoch, seq=counted.last).number
