"""Everything that the sink does for one dataset: its feeds, trimming its logs, and what it reports."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import redis

from das_service.logs.records import (
    BACKFILL_ROWS,
    EXAMPLES,
    LABELS,
    SHADOW_ROWS,
    LogsFile,
    dead_log,
    scored_log,
    table_of_log,
)
from das_service.logs.streams import LogCounters, read_counters
from das_service.redis_client import UNREACHABLE
from das_service.registry import Catalog, FmRecord
from das_service.sink.closing import Closer
from das_service.sink.feed import Feed, FeedWork
from das_service.sink.rescore import Rescorer, keep_starts, leave_log
from das_service.sink.table_rows import (
    TableContent,
    dead_letters_content,
    examples_content,
    labels_content,
    supervision_content,
)
from das_service.sink.trimming import Trimmer, kinds_of
from das_service.sink.watermarks import latest_name
from das_service.tables.durable_table import DurableTable
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.entries import Position
from schemas.tables import IS_SHADOW, dead_letters_table, supervision_table

log = logging.getLogger("das.sink")
_COMPACT_SECONDS = 2.0
_CATCH_UP_SECONDS = 0.5
_BUSY_FACTOR = 2


class DatasetSink:
    """The sink of one dataset. One thread."""

    def __init__(self, work: FeedWork, dataset: str, spec: DatasetSpec) -> None:
        self.dataset = dataset
        self._work = work
        self._spec = spec
        self._fms: dict[str, FmRecord] = {}
        self._feeds: dict[str, Feed] = {}
        self._compact_order: list[str] = []
        self._trimmer = Trimmer(work.client, dataset)
        self._rescorer: Rescorer | None = None
        self._counters: dict[tuple[int, str], LogCounters] = {}
        self._tending_problem = ""
        self._closer: Closer | None = None
        self._starts: dict[str, dict[int, Position]] = {}
        self.is_complete = False

    @property
    def feeds(self) -> Mapping[str, Feed]:
        """The feeds by kind of log."""
        return self._feeds

    @property
    def problems(self) -> list[str]:
        """What keeps rows from tables, in words."""
        found = [feed.problem for feed in self._feeds.values()]
        found += [self._tending_problem, self._closer.problem if self._closer else ""]
        return [problem for problem in found if problem]

    def refresh(self, catalog: Catalog, logs: LogsFile | None) -> None:
        """Take over what is declared now: features, FMs, their outputs, and which logs there are."""
        self._spec = catalog.datasets[self.dataset]
        self._fms = catalog.fms.get(self.dataset, {})
        if logs is None:
            self.is_complete = False
            return
        wanted = self._contents()
        for kind, content in wanted.items():
            if kind not in logs.logs:
                continue
            if kind in self._feeds:
                self._feeds[kind].follow(logs, content)
            else:
                self._feeds[kind] = self._new_feed(kind, content, logs)
                self._compact_order.append(kind)
        for fm in self._fms:
            scored, dead = self._feeds.get(scored_log(fm)), self._feeds.get(dead_log(fm))
            if scored is not None and dead is not None:
                scored.other_outcomes, dead.other_outcomes = dead, scored
        self.is_complete = set(wanted) <= set(logs.logs)
        client, folder = self._work.client, self._work.folder
        self._rescorer = Rescorer(
            client, folder, self._work.duck, dataset=self.dataset, spec=self._spec, epoch=logs.epoch
        )  # fmt: skip
        for fm in self._fms:
            self._starts[fm] = keep_starts(client, folder, self.dataset, logs.partitions, fm)
            self.is_complete &= len(self._starts[fm]) == logs.partitions
        self._closer = self._closer_of(logs)

    def turn(self, *, now: float, draining: bool = False) -> bool:
        """Give each log that is due one commit, and trim after it; give whether any was made."""
        if not self._feeds:
            return False
        partitions = range(self._spec.partitions)
        self._counters = read_counters(self._work.client, self.dataset, partitions, kinds_of(self._fms))
        busy = False
        for kind, feed in self._feeds.items():
            if feed.turn(self._counters, now=now, draining=draining):
                busy = True
                self._trim(kind)
        if self._closer is not None and not draining:
            required = {fm: self._starts.get(fm, {}) for fm, record in self._fms.items() if record.required}
            busy |= self._closer.turn(self._feeds, required, now=now, now_us=time.time_ns() // 1000)
        return busy

    def tend(self, *, now: float, is_busy: bool = False) -> None:
        """Do what is due now and then: trim what FMs have finished, let stragglers leave, feed them, compact.

        now: monotonic seconds. is_busy: commits are being made all the time, so that compaction can wait a while.

        Raises:
            redis.exceptions.ConnectionError: The server can't be reached.
        """
        try:
            for kind in self._feeds:
                self._trim(kind)
            for fm in self._fms:
                self._trimmer.trim_rescore(fm, self._counters)
            self._let_stragglers_leave()
            self._catch_up()
        except UNREACHABLE:
            raise
        except Exception as error:
            self._tending_problem = f"dataset {self.dataset}: {type(error).__name__}: {error}"
            log.warning("%s", self._tending_problem, exc_info=error)
        else:
            self._tending_problem = ""
        self._report_backlogs()
        self._compact(now, is_busy=is_busy)

    def close(self) -> None:
        """Forget the loaded tables: another process owns them."""
        for feed in self._feeds.values():
            feed.close()
        if self._closer is not None:
            self._closer.close()

    def info(self, *, now: float) -> dict[str, Any]:
        """Give what `das status` shows of the dataset. now: monotonic seconds."""
        examples = self._feeds.get(EXAMPLES)
        state = None if examples is None or not examples.positions else examples.table.state
        return {
            "rows": state.rows if state else 0,
            "duplicates": state.duplicates if state else 0,
            "conflicting": state.conflicting if state else 0,
            "positions": {} if examples is None else _positions(examples),
            "last_commit_age_seconds": _age(examples, now),
            "fms": {fm: self._fm_info(fm) for fm in self._fms},
        }

    def _contents(self) -> dict[str, TableContent]:
        granularity = self._spec.table_granularity
        contents = {EXAMPLES: examples_content(self._spec), LABELS: labels_content(self._spec)}
        for fm, record in self._fms.items():
            if record.outputs is not None:
                contents[scored_log(fm)] = supervision_content(record.outputs, granularity)
            contents[dead_log(fm)] = dead_letters_content(granularity)
        return contents

    def _new_feed(self, kind: str, content: TableContent, logs: LogsFile) -> Feed:
        numbers = [latest_name(partition) for partition in range(logs.partitions)] if kind == EXAMPLES else []
        if IS_SHADOW in content.schema.names:
            numbers += [SHADOW_ROWS, BACKFILL_ROWS]
        table = DurableTable(
            self._work.folder,
            self.dataset,
            table_of_log(kind) or kind,
            schema=content.schema,
            partitions=logs.partitions,
            retention_hours=self._work.settings.retention_hours,
            numbers=numbers,
        )
        return Feed(self._work, table, kind=kind, logs=logs, content=content)

    def _closer_of(self, logs: LogsFile) -> Closer:
        closer = self._closer
        if closer is None or closer.logs != logs:
            closer = Closer(self._work, self.dataset, self._spec, logs)
        closer.follow(self._spec)
        return closer

    def _trim(self, kind: str) -> None:
        declared = [keys.group(fm) for fm in self._fms] if kind == EXAMPLES else []
        try:
            self._trimmer.trim(kind, self._feeds[kind].positions, groups=declared)
        except redis.exceptions.ResponseError as error:
            log.warning("log %s of dataset %s can't be trimmed: %s", kind, self.dataset, error)

    def _let_stragglers_leave(self) -> None:
        examples = self._feeds.get(EXAMPLES)
        if examples is None or not examples.positions:
            return
        bound = self._work.settings.catch_up_bytes
        for fm in self._trimmer.leavers(self._fms, self._counters, catch_up_bytes=bound):
            gaps = leave_log(self._work.client, self._work.folder, self.dataset, fm, examples.positions)
            if gaps:
                log.warning("FM %s of dataset %s left the examples log; it is fed from the table", fm, self.dataset)
                self._trim(EXAMPLES)

    def _catch_up(self) -> None:
        """Feed FMs what they have to get from the examples table, once the tables have all that survived a loss."""
        examples = self._feeds.get(EXAMPLES)
        if self._rescorer is None or examples is None or not examples.positions:
            return
        until = time.monotonic() + _CATCH_UP_SECONDS
        for fm in self._fms:
            feeds = [self._feeds.get(kind) for kind in (EXAMPLES, scored_log(fm), dead_log(fm))]
            if any(feed is not None and feed.has_older_epochs for feed in feeds):
                continue
            while self._rescorer.has_room(fm) and self._rescorer.feed(fm) is not None and time.monotonic() < until:
                pass

    def _compact(self, now: float, *, is_busy: bool) -> None:
        """Take a compaction step, so that commits do not wait long; at the wish of `das compact` as many as it takes.

        Then every event day's small files are put together, and the wish is met when there are none.
        """
        client, settings = self._work.client, self._work.settings
        wish = client.hget(keys.COMPACT, self.dataset)
        most = settings.compact_files * (_BUSY_FACTOR if is_busy else 1) if wish is None else 1
        until = time.monotonic() + _COMPACT_SECONDS
        busy = True
        while busy and time.monotonic() < until:
            busy = self._compact_next(now, most)
            busy = (self._closer is not None and self._closer.compact(now=now, most_small_files=most)) or busy
            if wish is None:
                return
        is_met = not busy and not self.problems and all(feed.positions for feed in self._feeds.values())
        if is_met and client.hget(keys.COMPACT, self.dataset) == wish:
            client.hdel(keys.COMPACT, self.dataset)

    def _compact_next(self, now: float, most_small_files: int) -> bool:
        """Take a step in the first table that needs one, and give whether there was one; each table has its turn."""
        for kind in list(self._compact_order):
            if self._feeds[kind].compact(now=now, most_small_files=most_small_files):
                self._compact_order.remove(kind)
                self._compact_order.append(kind)
                return True
        return False

    def _report_backlogs(self) -> None:
        kept: dict[str, int] = {}
        for (_, kind), found in self._counters.items():
            kept[kind] = kept.get(kind, 0) + found.kept_bytes
        for kind, num_bytes in kept.items():
            self._work.metrics.backlog_bytes.labels(self.dataset, kind).set(num_bytes)
        for fm in self._fms:
            self._work.metrics.dead_letters.labels(self.dataset, fm).set(self._num_failed(fm))

    def _num_failed(self, fm: str) -> int:
        """Give how many examples the FM has failed on and not scored since."""
        found = [self._feeds.get(kind) for kind in (scored_log(fm), dead_log(fm))]
        scored, dead = (feed.table.state if feed and feed.positions else None for feed in found)
        mended = sum(state.mended for state in (scored, dead) if state)
        return max(0, dead.rows - mended) if dead else 0

    def _fm_info(self, fm: str) -> dict[str, Any]:
        scored = self._feeds.get(scored_log(fm))
        return {
            supervision_table(fm).partition("/")[0]: scored.table.state.outcome_rows
            if scored and scored.positions
            else 0,
            dead_letters_table(fm).partition("/")[0]: self._num_failed(fm),
        }


def _positions(feed: Feed) -> dict[str, str | None]:
    return {str(partition): None if at is None else at.entry_id for partition, at in feed.positions.items()}


def _age(feed: Feed | None, now: float) -> float | None:
    return None if feed is None or feed.committed_at is None else round(max(0.0, now - feed.committed_at), 1)
