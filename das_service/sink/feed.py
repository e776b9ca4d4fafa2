"""One log on its way into one table: when a commit is due, what is in it, and what follows when it can't be made.

Nothing is buffered between commits: the log holds the rows and its counters say how many wait. A commit reads strictly
after the table's own positions, settles identity at the version that it builds on, and moves the positions with the
rows. The log is freed by trimming.py, after that.
"""

import datetime as dt
import errno
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads
import redis
from deltalake.exceptions import DeltaError

from das_service.folder import Folder
from das_service.logs.records import EXAMPLES, LABELS, LogsFile
from das_service.logs.streams import LogCounters, read_after, read_raw_after
from das_service.metrics import Metrics
from das_service.redis_client import UNREACHABLE
from das_service.settings import Settings
from das_service.sink.aside_rows import outcomes_of, settle_asides, with_asides
from das_service.sink.commit_cut import Bounds, Cut, LogGapError, Waiting, refuse_gap, refuse_hole
from das_service.sink.compaction import compact_step
from das_service.sink.dead_chunks import RawEntry, divert
from das_service.sink.identity import Known, Verdict, settle_identity
from das_service.sink.table_rows import NewerSchemaError, TableContent
from das_service.sink.watermarks import mark_late
from das_service.tables.duck import Duck
from das_service.tables.durable_table import DurableTable, LostOwnershipError, TableBehindMarkError
from das_service.tables.offline_store import ALL_KINDS, OUTCOME, SERVED, rows_at
from schemas.entries import Entry, NewerFormatError, Position, parse_entry, parse_position
from schemas.tables import EVENT_DAY

log = logging.getLogger("das.sink")
Counters = Mapping[tuple[int, str], LogCounters]
Taken = Sequence[tuple[int, Entry]]
TRIES = 5
_BURST_ROWS, _QUIET_SECONDS = 5_000, 0.5
VACUUM_SECONDS = 3600.0
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 30.0
_EPOCH_DAY = dt.date(1970, 1, 1).toordinal()


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedWork:
    """What a feed works with; one for all feeds of the process."""

    client: redis.Redis
    folder: Folder
    duck: Duck
    settings: Settings
    metrics: Metrics


@dataclass(slots=True)
class _Trouble:
    """Why the last attempt failed, and when the next is due (monotonic seconds)."""

    text: str = ""
    tries: int = 0
    pause_seconds: float = 0.0
    retry_at: float = 0.0


class Feed:
    """Moves one log of a dataset into its table. The sink's one thread uses it."""

    def __init__(
        self, work: FeedWork, table: DurableTable, *, kind: str, logs: LogsFile, content: TableContent
    ) -> None:
        self.kind = kind
        self.table = table
        self.committed_at: float | None = None
        self._content = content
        self._work = work
        self._logs = logs
        self._is_open = False
        self._trouble = _Trouble()
        self._waiting_since: float | None = None
        self._waiting_rows = 0
        self._grew_at = 0.0
        self._burst_ended_at = 0
        self.has_older_epochs = logs.epoch > 1
        self._base: dict[int, tuple[int, int]] = {}
        self._counted = dict.fromkeys(("rows", "duplicates", "conflicting", "outcome_rows"), 0)
        self.other_outcomes: Feed | None = None
        self._vacuumed_at = time.monotonic()

    @property
    def problem(self) -> str:
        """What keeps rows from the table, in words; empty when nothing does."""
        return self._trouble.text

    @property
    def positions(self) -> dict[int, Position | None]:
        """Durable positions by partition; empty until the table is open."""
        return self.table.state.positions if self._is_open else {}

    @property
    def epoch(self) -> int:
        """The epoch that the log is in."""
        return self._logs.epoch

    def follow(self, logs: LogsFile, content: TableContent) -> None:
        """Take notice of a new epoch of the logs, or of more features."""
        if logs.epoch != self._logs.epoch:
            self._trouble = _Trouble()
            self.has_older_epochs = True
            self.close()
        if not content.schema.equals(self._content.schema):
            self.table.declare(content.schema)
            self.close()
        self._logs, self._content = logs, content

    def known_rows(self, rows: pa.Table, kinds: Collection[str] = (OUTCOME,)) -> Known:
        """Give what the table holds of the event days of these rows, at the version that the next commit builds on."""
        self._open()
        days = rows[EVENT_DAY].unique().cast(pa.int32()).to_pylist()
        event_days = (dt.date.fromordinal(_EPOCH_DAY + day) for day in days)
        return self.table.known_rows(event_days, kinds=kinds)

    def close(self) -> None:
        """Forget the loaded table: the next turn opens it again."""
        self._is_open = False
        self._base = {}

    def turn(self, counters: Counters, *, now: float, draining: bool = False) -> bool:
        """Make a commit if one is due, and give whether one was made. now: monotonic seconds.

        Raises:
            redis.exceptions.ConnectionError: The server can't be reached.
        """
        if now < self._trouble.retry_at and not draining:
            return False
        try:
            self._open()
            waiting = self._look(counters)
            if not self._is_due(waiting, now=now, draining=draining):
                if self._trouble.tries == 0:
                    self._trouble = _Trouble()
                return False
            is_moved = self._advance(waiting)
        except UNREACHABLE:
            raise
        except Exception as error:  # noqa: BLE001 - a table that fails must not stop the others; health shows it
            self._note(error, now)
            return False
        self._trouble = _Trouble()
        self._waiting_since = None
        if is_moved:
            self.committed_at = now
        return is_moved

    def compact(self, *, now: float, most_small_files: int) -> bool:
        """Put some small files together if there are too many; give whether that was done. now: monotonic seconds."""
        if not self._is_open or now < self._trouble.retry_at:
            return False
        settings = self._work.settings
        try:
            with self._work.metrics.stage_seconds.labels("sink", "compact").time():
                replaced = compact_step(
                    self.table, most_small_files=most_small_files, target_bytes=settings.compact_target_bytes
                )
            if now - self._vacuumed_at >= VACUUM_SECONDS:
                self._vacuumed_at = now
                self.table.vacuum()
        except Exception as error:  # noqa: BLE001 - as in turn
            self._note(error, now)
            return False
        self._count()
        return replaced > 0

    def _open(self) -> None:
        if not self._is_open:
            self.table.open(epoch=self._logs.epoch)
            self._is_open = True
            self._base = {}
            self._count()

    def _look(self, counters: Counters) -> Waiting:
        """Give what waits in the log.

        Raises:
            LogGapError: The log does not agree with the table.
        """
        entries = num_rows = num_bytes = 0
        for partition, position in self.table.state.positions.items():
            where = f"log {self.kind}, partition {partition}"
            found = refuse_gap(counters.get((partition, self.kind)), position, epoch=self.epoch, where=where)
            is_same_epoch = position is not None and position.epoch == found.epoch
            behind = found.last - position.seq if position is not None and is_same_epoch else found.last + 1
            if behind > 0:
                rows, size = self._base.get(partition, (found.first_rows, found.first_bytes))
                entries += behind
                num_rows += max(0, found.rows - rows)
                num_bytes += max(0, found.bytes - size)
        self._work.metrics.backlog_entries.labels(self.table.dataset, self.kind, "sink").set(entries)
        return Waiting(entries=entries + self.has_older_epochs, num_rows=num_rows, num_bytes=num_bytes)

    def _is_due(self, waiting: Waiting, *, now: float, draining: bool) -> bool:
        if waiting.entries == 0:
            self._waiting_since = None
            return False
        if self._waiting_since is None:
            self._waiting_since = now
        if waiting.num_rows != self._waiting_rows:
            self._waiting_rows, self._grew_at = waiting.num_rows, now
        is_end_of_burst = self._is_end_of_burst(waiting, now)
        settings = self._work.settings
        return (
            draining
            or self._trouble.tries > 0
            or waiting.num_rows >= settings.commit_rows
            or waiting.num_bytes >= settings.commit_bytes
            or is_end_of_burst
            or now - self._waiting_since >= settings.commit_seconds
        )

    def _advance(self, waiting: Waiting) -> bool:
        """Make the next commit, entry by entry after too many failures; give whether there was anything to commit."""
        if self._trouble.tries >= TRIES:
            return self._commit_one_by_one(waiting)
        taken = self._read(waiting)
        self._commit(taken)
        return bool(taken)

    def _is_end_of_burst(self, waiting: Waiting, now: float) -> bool:
        """Give whether much has come and no more does: worth a commit before its time.

        A trickle must not get there row by row: it takes _BURST_ROWS rows since the last such commit.
        """
        rows = self.table.state.rows + waiting.num_rows
        if now - self._grew_at < _QUIET_SECONDS or rows - self._burst_ended_at < _BURST_ROWS:
            return False
        self._burst_ended_at = rows
        return True

    def _read(self, waiting: Waiting) -> Taken:
        """Give the entries of the next commit.

        Raises:
            LogGapError: An entry that the counters promise is not there.
        """
        settings = self._work.settings
        bounds = Bounds(
            num_rows=settings.commit_rows,
            num_bytes=settings.commit_bytes,
            num_event_days=settings.commit_event_days,
        )
        cut = Cut(bounds, self._content.event_days_of, dict(self.table.state.positions))
        count = waiting.entries_per_read(len(cut.at))
        more, has_older_epochs = set(cut.at), False
        while more and not cut.is_full:
            after = {partition: cut.at[partition] for partition in more}
            reply = read_after(self._work.client, self.table.dataset, self.kind, after, count=count)
            has_older_epochs |= any(e.position.epoch < self.epoch for entries in reply.values() for e in entries)
            cut.add(reply)
            more = {partition for partition, entries in reply.items() if len(entries) == count}
        if not cut.taken and waiting.entries > self.has_older_epochs:
            raise LogGapError("log_lost", f"log {self.kind}: {waiting.entries} entries are counted, none is there")
        self.has_older_epochs &= has_older_epochs  # of all that was read: a cut may leave them behind newer ones
        return cut.taken

    def _commit(self, taken: Taken) -> None:
        if not taken:
            return
        stage = self._work.metrics.stage_seconds
        dataset = self.table.dataset
        with self._work.metrics.commit_seconds.labels(dataset, self.table.table).time():
            with stage.labels("sink", "rows").time():
                rows = self._content.rows_of([entry for _, entry in taken])
                numbers: dict[str, int] = {}
                if self._content.lateness_us is not None:
                    rows, numbers = mark_late(
                        rows, taken, self.table.state.numbers, lateness_us=self._content.lateness_us
                    )
            with stage.labels("sink", "identity").time():
                verdict = self._settle(rows)
            with stage.labels("sink", "commit").time():
                kept = rows_at(rows, verdict.kept)
                outcomes = outcomes_of(kept)
                if outcomes.num_rows < kept.num_rows:
                    numbers = {**numbers, **with_asides(self.table.state.numbers, kept)}
                self.table.commit(
                    kept,
                    {partition: entry.position for partition, entry in taken},
                    duplicates=len(verdict.duplicate),
                    conflicting=len(verdict.conflicting),
                    mended=self._count_mended(outcomes),
                    numbers=numbers,
                )
        for partition, entry in taken:
            self._base[partition] = (entry.rows_total, entry.bytes_total)
            if entry.trace:
                log.debug("%s: %d/%s, trace %s", self._name, partition, entry.position.entry_id, entry.trace_id)
        self._count()
        self._report_freshness(outcomes_of(rows))

    def _settle(self, rows: pa.Table) -> Verdict:
        duck, key, outcomes = self._work.duck, self._content.key, outcomes_of(rows)
        if outcomes.num_rows == rows.num_rows:
            return settle_identity(rows, self.known_rows(rows), duck, key)
        first = settle_identity(outcomes, self.known_rows(outcomes), duck, key)
        known = {kinds: self.known_rows(rows, kinds) for kinds in (SERVED, ALL_KINDS)}
        return settle_asides(rows, first, known[SERVED], known[ALL_KINDS], duck)

    def _count_mended(self, rows: pa.Table) -> int:
        """Give how many of these rows are of examples that have the FM's other outcome too, a score or a failure."""
        other = self.other_outcomes
        known = other.known_rows(rows) if other is not None and rows.num_rows else []
        if not isinstance(known, pads.Dataset) and not known:
            return 0
        return rows.num_rows - len(settle_identity(rows, known, self._work.duck).kept)

    def _commit_one_by_one(self, waiting: Waiting) -> bool:
        """Commit each entry by itself; one that can't be goes to `dead_chunks` and its position is passed."""
        count = waiting.entries_per_read(len(self.positions))
        reply = read_raw_after(self._work.client, self.table.dataset, self.kind, self.positions, count=count)
        for partition, raw_entries in reply.items():
            for entry_id, fields in raw_entries:
                refuse_hole(partition, self.positions[partition], parse_position(entry_id))
                try:
                    self._commit([(partition, parse_entry(entry_id, fields))])
                except Exception as error:
                    if _is_systemic(error):
                        raise
                    self._divert(partition, RawEntry(entry_id, fields), error)
        return any(reply.values())

    def _divert(self, partition: int, entry: RawEntry, error: Exception) -> None:
        """Put an entry into `dead_chunks` and pass it, unless its commit went through before it failed."""
        self.table.open(epoch=self.epoch)
        at, position = self.table.state.positions.get(partition), entry.position
        if at is not None and at.number >= position.number:
            return
        log.error("%s: entry %s goes to dead_chunks", self._name, position.entry_id, exc_info=error)
        divert(
            self._work.folder,
            self.table.dataset,
            kind=self.kind,
            partition=partition,
            entry=entry,
            reason=f"{type(error).__name__}: {error}",
            retention_hours=self._work.settings.retention_hours,
        )
        self._work.metrics.dead_chunks.labels(self.table.dataset, self.kind).inc()
        diverted = 0 if entry.is_aside else entry.num_rows
        self.table.commit(self._content.schema.empty_table(), {partition: position}, diverted=diverted)

    def _note(self, error: Exception, now: float) -> None:
        """Say what went wrong, and when to try again; the table is opened anew."""
        self.close()
        trouble = self._trouble
        trouble.text = f"{self._name}: {_reason(error)}"
        if not _is_systemic(error):
            trouble.tries += 1
            log.error("%s: attempt %d failed", self._name, trouble.tries, exc_info=error)
        elif not isinstance(error, LostOwnershipError | NewerSchemaError):
            log.warning("%s", trouble.text)
        if isinstance(error, LostOwnershipError | NewerSchemaError):
            trouble.pause_seconds = _PAUSE_SECONDS
        else:
            trouble.pause_seconds = min(_LONGEST_PAUSE_SECONDS, max(_PAUSE_SECONDS, 2 * trouble.pause_seconds))
        trouble.retry_at = now + trouble.pause_seconds

    @property
    def _name(self) -> str:
        return f"table {self.table.table} of dataset {self.table.dataset}"

    def _count(self) -> None:
        """Bring the counters to the durable totals, and the gauges up to date."""
        state, metrics = self.table.state, self._work.metrics
        dataset, (name, _, fm) = self.table.dataset, self.table.table.partition("/")
        added = {total: max(0, getattr(state, total) - seen) for total, seen in self._counted.items()}
        self._counted = {total: getattr(state, total) for total in self._counted}
        metrics.committed_rows.labels(dataset, self.table.table).inc(added["rows"])
        metrics.table_files.labels(dataset, self.table.table).set(sum(map(len, self.table.days.values())))
        if name == EXAMPLES:
            metrics.duplicates.labels(dataset).inc(added["duplicates"])
            metrics.conflicting.labels(dataset).inc(added["conflicting"])
        elif name == LABELS:
            metrics.duplicate_labels.labels(dataset).inc(added["duplicates"])
        elif name == "supervision":
            metrics.scored_rows.labels(dataset, fm).inc(added["outcome_rows"])

    def _report_freshness(self, rows: pa.Table) -> None:
        if "trained_through" in rows.column_names and rows.num_rows:
            times = ["event_time", "trained_through", "scored_at"]
            newest = rows.slice(rows.num_rows - 1).select(times).to_pylist()[0]
            names, metrics = (self.table.dataset, self.table.table.partition("/")[2]), self._work.metrics
            gap, age = newest["event_time"] - newest["trained_through"], newest["scored_at"] - newest["event_time"]
            metrics.freshness_gap_seconds.labels(*names).set(gap.total_seconds())
            metrics.supervision_age_seconds.labels(*names).set(age.total_seconds())


def _is_systemic(error: Exception) -> bool:
    """Give whether an error says nothing about the rows: another owner, the disk, memory, the server, the log."""
    kinds = (
        LostOwnershipError, TableBehindMarkError, LogGapError, NewerSchemaError, NewerFormatError,
        OSError, MemoryError, duckdb.IOException, duckdb.OutOfMemoryException, redis.RedisError,
    )  # fmt: skip
    return isinstance(error, kinds) or (isinstance(error, DeltaError) and "os error" in str(error))


def _reason(error: Exception) -> str:
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "os error 28" in str(error):
        return "the disk is full; the log keeps the rows"
    return f"{type(error).__name__}: {error}"
