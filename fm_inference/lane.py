"""One FM of one dataset at work: a reader thread that prefetches exactly one batch, and a device thread.

The reader returns with whatever waits, so an idle device never waits for a batch to fill and a busy one gets bigger
batches. What was scored is published by a third thread while the device is at the next batch, one batch at a time. The
engine may be replaced between two batches; a batch keeps the engine that it was prepared with.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import redis
from numpy.typing import NDArray

from das_service.beats import Peer
from das_service.errors import UnavailableError
from das_service.folder import Folder
from das_service.logs.streams import check_logs
from das_service.redis_client import UNREACHABLE, connect, run_script
from das_service.registry import Registry
from das_service.role import RoleContext
from fm_inference.delivery import Delivery, Intake
from fm_inference.engine import Prepared, Scored, TorchEngine, joined_in_order
from fm_inference.outputs import ModelOutputError
from fm_inference.pace import PublishPace
from fm_inference.poison import RowsFailedError, resume_attempt, try_rows
from fm_inference.publishing import Outcome, Published, Publisher, publish
from fm_inference.rows import NewerSpecError, Rows, read_rows
from fm_inference.shadow import Shadower
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.entries import EntryError

log = logging.getLogger("das.worker")
_BLOCK_MS = 500
_RETRY_SECONDS = 0.2
_LOOK_SECONDS = 0.005
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A snapshot that is ready: its engine, how its outputs are published, and the declaration they belong to."""

    engine: TorchEngine
    publisher: Publisher
    spec: DatasetSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """The other processes as the worker's observer last saw them. looked_at: monotonic seconds.

    trust_absence: a process that it did not see is dead, as long as the look is new: the observer's thread also loads
    models, for minutes, and who started meanwhile is not in it.
    """

    by_instance: dict[str, Peer]
    trust_absence: bool
    looked_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    loaded: Loaded
    rows: Rows
    prepared: Prepared | None  # None: suspect, to be tried range by range


class LaneStoppedError(Exception):
    """The role is stopping; what is in hand stays pending and is taken over."""


def refusal(client: redis.Redis, tables: Folder, dataset: str) -> str:
    """Give why nothing may be read from this server, or published to it, in words; '' if all is well.

    A server that came back with less than lies beside the tables has lost entries, or the numbers of snapshots.
    """
    try:
        Registry(client, tables).check()
        problems = check_logs(client, tables, dataset)
    except UnavailableError as error:
        return error.detail
    except (OSError, ValueError, KeyError) as error:
        return f"the tables' folder can't be read ({error!r})"
    return f"log {problems[0].log}: {problems[0].detail}; run `das recover`" if problems else ""


class Lane:
    """Scores one FM's examples until the role stops. `loaded`, `former`, `halted` and `peers` are set by the worker.

    former: what was at work before, kept warm for a roll-back.
    busy_since: when the device thread took the batch that it is at (monotonic seconds), None when it waits for one.
    """

    def __init__(
        self, context: RoleContext, *, dataset: str, fm: str, partitions: int, hurry: Callable[[], None] = lambda: None
    ) -> None:
        """Make it; nothing runs yet. hurry: lets the worker look at once, since what is loaded was withdrawn."""
        self._context = context
        self._hurry = hurry
        self.dataset = dataset
        self.fm = fm
        self.loaded: Loaded | None = None
        self.former: Loaded | None = None
        self.halted = ""
        self.peers = Peers(by_instance={}, trust_absence=False)
        self.rows_scored = 0
        self.busy_since: float | None = None
        self.threads: list[threading.Thread] = []
        self._tables = Folder(context.settings.tables_uri, context.settings.storage_options)
        self._guard = connect(context.settings)
        self._reads = connect(context.settings, on_connect=self._check_logs)
        self._client = connect(context.settings, on_connect=self._check_logs)
        self._intake = Intake(
            self._reads, dataset=dataset, fm=fm, partitions=partitions, consumer=context.instance,
            batch_rows=context.settings.batch_rows,
            count_unreadable=context.metrics.unreadable_entries.labels(dataset, fm).inc,
        )  # fmt: skip
        self.shadower = Shadower(
            context,
            connect(context.settings, on_connect=self._check_logs),
            dataset=dataset,
            fm=fm,
            partitions=partitions,
        )
        self._pace = PublishPace(context.metrics, dataset, fm)
        self._queue: queue.Queue[_Work] = queue.Queue(maxsize=1)
        self._publishing: Future[None] | None = None
        self._stages = context.metrics.stage_seconds
        self._looked_at = 0.0

    @property
    def name(self) -> str:
        """Names the lane in beats and messages."""
        return f"{self.dataset}/{self.fm}"

    def resume(self) -> None:
        """Go on after a halt: the logs agree with the tables again."""
        self._intake.recheck()
        self.halted = ""

    def is_stopping(self) -> bool:
        """Give whether to take no more work."""
        return self._context.stopping.is_set()

    def _check_logs(self) -> None:
        """Compare the server with the tables before a new connection is used: it may have come back with less.

        Raises:
            redis.exceptions.ConnectionError: It has; nothing is read or published until `das recover` was run.
        """
        problem = refusal(self._guard, self._tables, self.dataset)
        if problem:
            self.halted = problem
            raise redis.exceptions.ConnectionError(self.halted)

    # ---- reader thread

    def read_until_stopped(self) -> None:
        """Read, leave out what is known, make tensors, hand over."""
        while not self.is_stopping():
            loaded = self.loaded
            if loaded is None or self.halted:
                self._context.stopping.wait(_RETRY_SECONDS)
                continue
            try:
                self._take_over(loaded)
                deliveries = self._intake.read(block_ms=_BLOCK_MS)
                if deliveries and deliveries[0].suspect:  # what a process of our name left: all of them are
                    self._hand_over_singly(self.loaded or loaded, deliveries)
                elif deliveries:
                    self._hand_over(self.loaded or loaded, deliveries, suspect=False)
            except UNREACHABLE as error:
                self._wait_for_server(error)
            except redis.exceptions.ResponseError as error:
                self._halt(error)
            except LaneStoppedError:
                return

    def _take_over(self, loaded: Loaded) -> None:
        """Once a second, go on with what dead peers hold, entry by entry."""
        if time.monotonic() - self._looked_at < 1.0:
            return
        self._looked_at = time.monotonic()
        peers = self.peers
        is_new = self._looked_at - peers.looked_at < self._context.settings.dead_after_seconds
        taken = self._intake.take_over(peers.by_instance, trust_absence=peers.trust_absence and is_new)
        self._hand_over_singly(loaded, taken)

    def _hand_over(self, loaded: Loaded, deliveries: Sequence[Delivery], *, suspect: bool) -> None:
        try:
            with self._timed("read"):
                rows = read_rows(self._reads, self.dataset, self.fm, loaded.spec, deliveries)
            prepared = None
            if not suspect:
                with self._timed("prepare"):
                    prepared = loaded.engine.prepare(rows.selected())
        except (*UNREACHABLE, redis.exceptions.ResponseError):
            self._intake.finished(deliveries)
            raise
        except NewerSpecError:  # the worker is about to read the new declaration
            self._intake.finished(deliveries)
            self._intake.recheck()
            self._context.stopping.wait(_RETRY_SECONDS)
            return
        except EntryError:
            if suspect:
                log.exception("%s: an entry can't be read and is passed by", self.name)
                self._intake.pass_by(deliveries[0])
                return
            self._hand_over_singly(loaded, deliveries)
            return
        except Exception:
            if suspect:
                raise
            log.exception("%s: a batch can't be prepared; its entries are tried one by one", self.name)
            self._hand_over_singly(loaded, deliveries)
            return
        self._put(_Work(loaded=loaded, rows=rows, prepared=prepared))

    def _hand_over_singly(self, loaded: Loaded, deliveries: Sequence[Delivery]) -> None:
        """Hand entries over one by one, to be tried; what is not handed over is let go, to be read again."""
        for i, delivery in enumerate(deliveries):
            try:
                self._hand_over(loaded, [delivery], suspect=True)
            except redis.exceptions.RedisError:
                self._intake.finished(deliveries[i + 1 :])
                raise

    def _put(self, work: _Work) -> None:
        while not self.is_stopping():
            try:
                self._queue.put(work, timeout=0.2)
            except queue.Full:
                continue
            return
        raise LaneStoppedError

    def _wait_for_server(self, error: Exception) -> None:
        log.warning("%s: the server can't be reached (%s); trying again", self.name, error)
        self._intake.recheck()
        self._context.stopping.wait(_RETRY_SECONDS)

    def _halt(self, error: Exception) -> None:
        """Stop reading: the group or the log is gone; the worker lifts it when the logs agree with the tables."""
        log.error("%s: %s", self.name, error)
        self.halted = f"the log can't be read ({error})"
        self._intake.recheck()

    # ---- device thread

    def score_until_stopped(self) -> None:
        """Run the model and publish, batch by batch; what was taken is finished before the thread ends."""
        with ThreadPoolExecutor(1, thread_name_prefix=f"publish {self.name}") as publishing:
            try:
                while self._score_next(publishing):
                    pass
            except LaneStoppedError:
                return

    def _score_next(self, publishing: ThreadPoolExecutor) -> bool:
        """Score the next batch, if one comes; give whether to go on."""
        try:
            work = self._queue.get(timeout=0.2)
        except queue.Empty:
            self._end_publishing()
            return not self.is_stopping()
        self.busy_since = time.monotonic()
        self._score(work, publishing)
        self.busy_since = None
        return True

    def _end_publishing(self) -> None:
        """Wait until the batch before this one is published; raises what that raised."""
        if self._publishing is not None:
            self._publishing.result()
            self._publishing = None

    def _score(self, work: _Work, publishing: ThreadPoolExecutor) -> None:
        deliveries = work.rows.deliveries
        if work.prepared is None:
            self._end_publishing()
            with self.shadower.held():
                self._score_suspect(work)
            return
        try:
            scored = self._forward(work.loaded, work.prepared)
        except Exception as error:  # noqa: BLE001 - whatever a model raises
            log.warning("%s: the model failed on %d rows (%s)", self.name, work.prepared.num_rows, _line(error))
            work.loaded.engine.warm_up()  # a broken device raises here, which ends the process
            self._end_publishing()
            for i in range(len(deliveries)):
                with self.shadower.held():
                    self._score_suspect(_Work(loaded=work.loaded, rows=_one_delivery(work.rows, i), prepared=None))
            return
        outcomes = []
        for i, delivery in enumerate(deliveries):
            lo, hi = int(work.rows.bounds[i]), int(work.rows.bounds[i + 1])
            first, last = np.searchsorted(work.rows.wanted, [lo, hi])
            outcomes.append(
                Outcome(
                    delivery=delivery,
                    columns=work.rows.columns,
                    scored_rows=work.rows.wanted[first:last],
                    scored=scored.at(slice(int(first), int(last))),
                    failed={},
                )
            )
        self._end_publishing()
        self._publishing = publishing.submit(self._publish, work.loaded, outcomes)

    def _forward(self, loaded: Loaded, prepared: Prepared) -> Scored:
        metrics = self._context.metrics
        with self._timed("forward"):
            scored = loaded.engine.finish(loaded.engine.forward(prepared))
        metrics.batch_rows.labels(self.dataset, self.fm).observe(prepared.num_rows)
        metrics.forward_rows.labels(self.dataset, self.fm, loaded.publisher.snapshot_id).inc(prepared.num_rows)
        return scored

    def _score_suspect(self, work: _Work) -> None:
        """Try one entry range by range, writing each down before its forward; then publish."""
        (delivery,) = work.rows.deliveries
        key = keys.attempts(self.dataset, delivery.partition, self.fm, delivery.kind)
        entry_id = delivery.entry.position.entry_id
        loaded, columns = work.loaded, work.rows.columns
        attempt = resume_attempt(self._patiently(lambda: self._client.hget(key, entry_id)), columns.num_rows)
        done: list[tuple[NDArray[np.int64], Scored]] = []

        def forward(rows: NDArray[np.int64]) -> None:
            try:
                done.append((rows, self._forward(loaded, loaded.engine.prepare(columns.take(rows)))))
            except ModelOutputError as error:
                if error.rows:
                    raise RowsFailedError(str(error)[:500], error.rows) from error
                raise
            except Exception:
                loaded.engine.warm_up()
                raise

        failed = try_rows(
            attempt,
            work.rows.wanted,
            note=lambda a: self._patiently(
                lambda: run_script(self._client, "put_field", [key], [entry_id, a.to_json()])
            ),
            forward=forward,
        )
        if not done:  # no row is left to score: the outputs of none
            forward(np.zeros(0, np.int64))
        rows, scored = joined_in_order(done)
        if failed:
            log.error("%s: %d rows of entry %s go to the dead letters", self.name, len(failed), entry_id)
        outcome = Outcome(delivery=delivery, columns=columns, scored_rows=rows, scored=scored, failed=failed)
        self._publish(loaded, [outcome])

    def _publish(self, loaded: Loaded, outcomes: Sequence[Outcome]) -> None:
        with self._timed("publish"):
            results = self._patiently(lambda: publish(self._client, loaded.publisher, outcomes))
        self._intake.finished(outcome.delivery for outcome in outcomes)
        if Published.DONE in results:
            self._pace.note(loaded.publisher.snapshot_id, [outcome.delivery.entry.taken_at_us for outcome in outcomes])
        for outcome, result in zip(outcomes, results, strict=True):
            if result is Published.DONE:
                self.rows_scored += len(outcome.scored_rows)
                if not outcome.delivery.suspect:
                    self.shadower.offer(outcome.delivery.partition, outcome.columns, outcome.scored_rows)
                if outcome.delivery.entry.trace:
                    log.debug("%s: %s, trace %s", self.name, outcome.delivery.key, outcome.delivery.entry.trace_id)
                continue
            self._context.metrics.wasted_rows.labels(self.dataset, self.fm).inc(len(outcome.scored_rows))
            if result in {Published.LOST, Published.OTHER_EPOCH}:
                self.halted = "the log does not agree with the tables; run `das recover`"
            self._intake.recheck()  # one that was not ours may have become so before we let go of it
        if Published.WITHDRAWN in results:
            self._await_successor(loaded)

    def _await_successor(self, withdrawn: Loaded) -> None:
        """Give the worker a moment to put what is active now in the place of what was withdrawn."""
        self._hurry()
        deadline = time.monotonic() + _RETRY_SECONDS
        while self.loaded is withdrawn and time.monotonic() < deadline:
            self._context.stopping.wait(_LOOK_SECONDS)

    def _patiently(self, call: Callable[[], _T]) -> _T:
        """Give what a call to the server gives, however often the server can't answer meanwhile.

        Raises:
            LaneStoppedError: The role stops and the server is away.
            redis.exceptions.ResponseError: The server refuses the call for good.
        """
        while True:
            try:
                return call()
            except redis.exceptions.RedisError as error:
                if not _is_passing(error):
                    raise
                if self.is_stopping():
                    raise LaneStoppedError from error
                log.warning("%s: the server can't be reached (%s); trying again", self.name, error)
                self._intake.recheck()
                self._context.stopping.wait(_RETRY_SECONDS)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._stages.labels("worker", stage).observe(time.perf_counter() - start)


def _is_passing(error: redis.exceptions.RedisError) -> bool:
    """Give whether a server is away, busy with somebody's script, a replica for a moment, or can't write its log."""
    is_away = isinstance(error, (*UNREACHABLE, redis.exceptions.ReadOnlyError))
    return is_away or str(error).startswith(("BUSY ", "MISCONF "))


def _one_delivery(rows: Rows, i: int) -> Rows:
    lo, hi = int(rows.bounds[i]), int(rows.bounds[i + 1])
    wanted = rows.wanted[(rows.wanted >= lo) & (rows.wanted < hi)] - lo
    return Rows(
        deliveries=(rows.deliveries[i],),
        columns=rows.columns.slice(lo, hi - lo),
        wanted=wanted,
        bounds=np.array([0, hi - lo]),
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
