"""A backfill from its beginning to its end: snapshot by snapshot, what lacks its row is scored and appended.

It keeps no state: what the supervision table has is done. Rows that were appended and not committed when a run was cut
are scored again, and the sink drops the doubles. It writes to the scored log alone: no online value, no outcome, no
place of a worker in a log changes.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import redis
from numpy.typing import NDArray

from das_service.errors import ConflictError, UnavailableError
from das_service.folder import Folder
from das_service.logs.records import read_logs_file, read_mark, scored_log
from das_service.logs.streams import read_counters
from das_service.registry import Catalog
from das_service.settings import Settings
from das_service.sink.rescore import RESCORE_BYTES, keep_starts
from das_service.sink.table_rows import example_chunk
from das_service.tables.duck import Duck
from fm_inference.backfill_pace import Pace, read_backlog, wait_until
from fm_inference.backfill_rows import Part, StoredExamples
from fm_inference.backfill_spans import Span, spans_between, usable_snapshots
from fm_inference.engine import MACHINE_ERRORS, Scored, TorchEngine, joined_in_order
from fm_inference.outputs import ModelOutputError
from fm_inference.poison import RowsFailedError, resume_attempt, try_rows
from fm_inference.publishing import Publisher, append_backfill, microseconds
from fm_inference.repository import Repository
from schemas import keys
from schemas.entries import Position
from schemas.tables import supervision_table

_LIVE_BATCHES = 4
_BACKLOG_SHARE = 4
_SAID_REASONS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BackfillQuery:
    """What to score: examples of a dataset with first_us <= event_time < end_us, for one FM."""

    dataset: str
    fm: str
    first_us: int
    end_us: int
    rows_per_second: float | None = None
    dry_run: bool = False
    wait: bool = True


@dataclass(slots=True)
class Tally:
    """What a backfill did, in rows. rows: looked at. scored: by snapshot; what a dry run would score.

    already: their snapshot has a served row of them. too_early: no snapshot is old enough. pending: left to the FM's
    workers, which have yet to score them. failed: the model failed on them; reasons: of some.
    """

    total_rows: int = 0
    rows: int = 0
    scored: Counter[str] = field(default_factory=Counter)
    already: int = 0
    too_early: int = 0
    pending: int = 0
    failed: int = 0
    reasons: list[str] = field(default_factory=list)
    stopped: bool = False
    committed: bool = False


class Backfill:
    """One run. One thread; `stopping` may be set by another. on_progress is called after each step."""

    def __init__(
        self,
        settings: Settings,
        client: redis.Redis,
        catalog: Catalog,
        query: BackfillQuery,
        *,
        stopping: threading.Event,
        on_progress: Callable[[Tally], None] = lambda _: None,
    ) -> None:
        """Look up what the run needs.

        Raises:
            UnknownNameError: The dataset or the FM is not declared.
            ConflictError: The FM has no usable snapshot.
            UnavailableError: The FM's logs are not made yet.
        """
        self._settings, self._client, self._catalog, self._query = settings, client, catalog, query
        self._stopping = stopping
        self._on_progress = on_progress
        self._spec, self._fm = catalog.spec(query.dataset), catalog.fm(query.dataset, query.fm)
        self._snapshots = usable_snapshots(catalog, query.dataset, query.fm)
        self._folder = Folder(settings.tables_uri, settings.storage_options)
        logs = read_logs_file(self._folder, query.dataset)
        self._starts = keep_starts(client, self._folder, query.dataset, self._spec.partitions, query.fm)
        if logs is None or len(self._starts) < self._spec.partitions or scored_log(query.fm) not in logs.logs:
            raise UnavailableError(f"the logs of FM {query.fm!r} are not made yet: declare it again", code="no_logs")
        self._epoch = logs.epoch
        self._pace = Pace(
            lambda: read_backlog(client, query.dataset, query.fm, partitions=self._spec.partitions),
            most_bytes=min(RESCORE_BYTES, settings.max_backlog_bytes // _BACKLOG_SHARE),
            most_live_rows=_LIVE_BATCHES * settings.batch_rows,
            rows_per_second=query.rows_per_second,
            stopping=stopping,
        )
        self._appended: set[int] = set()
        self._tally = Tally()

    def run(self) -> Tally:
        """Score and append all that is to be scored, and wait for its commit; give what was done, also if stopped.

        Raises:
            UnavailableError: Nothing moves any more, or the scored log refuses rows.
            SnapshotError: A snapshot can't be loaded.
            OSError, redis.exceptions.RedisError, duckdb.Error: The tables or the server can't be used.
        """
        duck = Duck(memory_bytes=self._settings.duckdb_memory_bytes, threads=1)
        snapshots = Folder(self._settings.snapshots_uri, self._settings.storage_options)
        repository = Repository(snapshots)
        try:
            stored = StoredExamples(
                self._folder, duck, dataset=self._query.dataset, spec=self._spec, fm=self._query.fm,
                starts=self._starts,
            )  # fmt: skip
            parts = stored.parts(spans_between(self._snapshots, self._query.first_us, self._query.end_us))
            self._tally.total_rows = sum(part.num_rows for part in parts)
            scorer = _Scorer(repository, self._settings)
            for part in parts:
                if self._stopping.is_set():
                    break
                self._run_part(stored, scorer, part)
            if self._query.wait and not self._query.dry_run:
                self._await_commit()
        finally:
            repository.close()
            duck.close()
        self._tally.stopped = self._stopping.is_set()
        return self._tally

    def _run_part(self, stored: StoredExamples, scorer: "_Scorer", part: Part) -> None:
        tally, snapshot = self._tally, part.span.snapshot
        if snapshot is None:
            tally.rows += part.num_rows
            tally.too_early += part.num_rows
            self._on_progress(tally)
            return
        found = 0
        for rows, num_pending in stored.iter_unscored(part, only_ids=self._query.dry_run):
            tally.pending += num_pending
            tally.rows += num_pending + rows.num_rows
            found += num_pending + rows.num_rows
            if self._query.dry_run:
                tally.scored[snapshot.snapshot_id] += rows.num_rows
            else:
                self._score(scorer, part.span, rows)
            self._on_progress(tally)
            if self._stopping.is_set():
                return
        tally.already += part.num_rows - found
        tally.rows += part.num_rows - found
        self._on_progress(tally)

    def _score(self, scorer: "_Scorer", span: Span, rows: pa.Table) -> None:
        """Score rows of the examples table and append what was said, some at a time, at the pace of the run."""
        step = self._settings.batch_rows
        if self._query.rows_per_second is not None:
            step = max(1, min(step, int(self._query.rows_per_second)))
        columns = pa.Table.from_batches([example_chunk(rows, self._spec)])
        for first in range(0, rows.num_rows, step):
            some = columns.slice(first, step).combine_chunks()
            if not self._pace.wait(some.num_rows):
                return
            engine = scorer.engine_of(span)
            numbers, scored, failed = score_rows(engine, some)
            self._append(span, some, numbers, scored)
            self._tally.failed += len(failed)
            self._tally.reasons = [*dict.fromkeys([*self._tally.reasons, *failed.values()])][:_SAID_REASONS]

    def _append(self, span: Span, columns: pa.Table, numbers: NDArray[np.int64], scored: Scored) -> None:
        """Append what was said of these rows, partition by partition."""
        publisher = self._publisher(span)
        digests = columns["example_digest"].combine_chunks().take(pa.array(numbers))
        partitions = keys.partitions_of(digests, self._spec.partitions)
        for partition in np.unique(partitions).tolist():
            mine = np.flatnonzero(partitions == partition)
            chosen = columns.take(pa.array(numbers[mine])).combine_chunks()
            refused = append_backfill(
                self._client, publisher, partition, chosen, scored.at(mine), max_bytes=2 * RESCORE_BYTES
            )
            if refused:
                raise UnavailableError(f"what was scored can't be appended: {refused}", code="refused")
            self._appended.add(partition)
            self._tally.scored[publisher.snapshot_id] += chosen.num_rows

    def _publisher(self, span: Span) -> Publisher:
        snapshot, outputs = span.snapshot, self._fm.outputs
        if snapshot is None or snapshot.trained_through is None or outputs is None:
            raise ConflictError(f"FM {self._fm.fm!r} has no validated snapshot", code="no_snapshot")
        return Publisher(
            dataset=self._query.dataset,
            fm=self._fm.fm,
            consumer="",
            snapshot_id=snapshot.snapshot_id,
            snapshot_number=self._fm.snapshots.index(snapshot.snapshot_id),
            trained_through_us=microseconds(snapshot.trained_through),
            generation=self._fm.generation,
            epoch=self._epoch,
            ttl_seconds=self._spec.online_ttl_seconds,
            outputs=outputs,
            has_msetex=False,
        )

    def _await_commit(self) -> None:
        """Wait until the sink has committed what was appended."""
        kind = scored_log(self._fm.fm)
        counters = read_counters(self._client, self._query.dataset, sorted(self._appended), [kind])
        wanted = {
            partition: Position(epoch=found.epoch, seq=found.last).number for (partition, _), found in counters.items()
        }

        def look() -> tuple[bool, object]:
            mark = read_mark(self._folder, self._query.dataset, supervision_table(self._fm.fm))
            reached = {} if mark is None else {p: at.number for p, at in mark.positions.items() if at is not None}
            return all(reached.get(partition, -1) >= number for partition, number in wanted.items()), reached

        self._tally.committed = wait_until(
            look, self._stopping, "what was scored is in the log; the sink commits nothing"
        )


class _Scorer:
    """The one engine of the moment."""

    def __init__(self, repository: Repository, settings: Settings) -> None:
        self._repository = repository
        self._settings = settings
        self._snapshot_id = ""
        self._engine: TorchEngine | None = None

    def engine_of(self, span: Span) -> TorchEngine:
        """Give the engine of a span's snapshot; the one before is let go of first."""
        if span.snapshot is None:
            raise ConflictError("no snapshot is old enough", code="no_snapshot")
        if self._engine is None or self._snapshot_id != span.snapshot.snapshot_id:
            self._engine = None
            self._engine = self._repository.load(span.snapshot, device=self._settings.device, bf16=self._settings.bf16)
            self._snapshot_id = span.snapshot.snapshot_id
        return self._engine


def score_rows(engine: TorchEngine, columns: pa.Table) -> tuple[NDArray[np.int64], Scored, dict[int, str]]:
    """Give the numbers of the rows that were scored, what was said of them, and why the others failed.

    Raises:
        Exception: The device fails on an empty question too, or the machine can't.
    """
    try:
        return np.arange(columns.num_rows), engine.score(columns), {}
    except MACHINE_ERRORS:
        raise
    except Exception:  # noqa: BLE001 - whatever a model raises: its rows are found below
        engine.warm_up()
    done: list[tuple[NDArray[np.int64], Scored]] = [
        (np.zeros(0, np.int64), engine.score(columns.slice(0, 0).combine_chunks()))
    ]

    def forward(rows: NDArray[np.int64]) -> None:
        try:
            done.append((rows, engine.score(columns.take(pa.array(rows)))))
        except ModelOutputError as error:
            if error.rows:
                raise RowsFailedError(str(error)[:500], error.rows) from error
            raise
        except Exception:
            engine.warm_up()
            raise

    attempt = resume_attempt(None, columns.num_rows)
    failed = try_rows(attempt, np.arange(columns.num_rows), note=lambda _: None, forward=forward)
    return *joined_in_order(done), failed
