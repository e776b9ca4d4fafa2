"""The shadow: a second snapshot that scores a share of what the active one has published, best effort, by itself.

Rows come here only after the active snapshot's outcome of them is published and acknowledged, so nothing that happens
here can lose, hold up or dead-letter them. A shadow that can't follow leaves rows out; one that fails is said in
metrics and notices. What it says goes to the scored log alone, never to the online store.

Which rows are its share is decided by the id, so that it is the same rows wherever they are scored.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import redis
import torch
from numpy.typing import NDArray

from das_service.role import RoleContext
from fm_inference.engine import Scored, TorchEngine
from fm_inference.outputs import first_line
from fm_inference.publishing import Publisher, append_shadow
from schemas import keys

log = logging.getLogger("das.worker")
WAITING_BYTES = 64 * 1024 * 1024
_LOOK_SECONDS = 0.2
_HELD_SECONDS = 5.0
_LOG_SHARE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """A snapshot that is ready to score a share of the examples beside the active one."""

    engine: TorchEngine
    publisher: Publisher
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    shadow: Shadow
    partition: int
    columns: pa.Table


def in_share(digest: pa.Array, share: float) -> NDArray[np.bool_]:
    """Give which examples are the shadow's, by the first half of the id's digest; partitions go by the second."""
    words = keys.digest_words(digest)[:, 0]
    return (words >> np.uint64(11)).astype(np.float64) < share * 2.0**53


class Shadower:
    """Runs one lane's shadow. `shadow` is set by the worker, None where there is none; the lane offers rows.

    problem: why the last rows were not scored, '' if they were.
    """

    def __init__(self, context: RoleContext, client: redis.Redis, *, dataset: str, fm: str, partitions: int) -> None:
        """Make it; nothing runs yet. client: of its own, which refuses a server that has lost data."""
        self.shadow: Shadow | None = None
        self.problem = ""
        self._context = context
        self._client = client
        self._rows = {
            result: context.metrics.shadow_rows.labels(dataset, fm, result)
            for result in ("scored", "skipped", "failed")
        }
        self._forwards = context.metrics.forward_rows
        self._names = (dataset, fm)
        self._max_bytes = context.settings.max_backlog_bytes // (_LOG_SHARE * partitions)
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._at_work = threading.Lock()

    def offer(self, partition: int, columns: pa.Table, scored_rows: NDArray[np.int64]) -> None:
        """Take the shadow's share of rows that the active snapshot has published, unless too much waits already."""
        shadow = self.shadow
        if shadow is None or not len(scored_rows):
            return
        try:
            self._take_share(shadow, partition, columns, scored_rows)
        except Exception as error:  # noqa: BLE001 - the caller's thread is the active snapshot's
            self._rows["failed"].inc(len(scored_rows))
            self._note(f"rows can't be taken for the shadow: {first_line(error)}")

    def _take_share(self, shadow: Shadow, partition: int, columns: pa.Table, scored_rows: NDArray[np.int64]) -> None:
        digests = columns["example_digest"].combine_chunks().take(pa.array(scored_rows))
        chosen = scored_rows[in_share(digests, shadow.share)]
        if not len(chosen):
            return
        rows = columns.take(pa.array(chosen))
        with self._changed:
            if self._waiting_bytes + rows.nbytes > WAITING_BYTES:
                self._rows["skipped"].inc(rows.num_rows)
                return
            self._waiting.append(_Waiting(shadow=shadow, partition=partition, columns=rows))
            self._waiting_bytes += rows.nbytes
            self._changed.notify()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the shadow from running meanwhile, as far as it comes to an end by itself within seconds.

        While suspect rows are tried nothing else shall be able to end the process: they would be blamed for it.
        """
        is_held = self._at_work.acquire(timeout=_HELD_SECONDS)
        try:
            yield
        finally:
            if is_held:
                self._at_work.release()

    def score_until_stopped(self) -> None:
        """Score what waits, some chunks at a time, until the role stops; what waits then is left."""
        while not self._context.stopping.is_set():
            waiting = self._take()
            if not waiting:
                continue
            shadow, num_rows = waiting[0].shadow, sum(each.columns.num_rows for each in waiting)
            if shadow.publisher.snapshot_id != self._snapshot_id():
                self._rows["skipped"].inc(num_rows)
                continue
            try:
                self._score(shadow, waiting)
            except Exception as error:  # noqa: BLE001 - whatever a model raises, or the server: none of it matters
                self._rows["failed"].inc(num_rows)
                self._note(f"snapshot {shadow.publisher.snapshot_id} failed in the shadow: {first_line(error)}")

    def _snapshot_id(self) -> str | None:
        return None if self.shadow is None else self.shadow.publisher.snapshot_id

    def _take(self) -> list[_Waiting]:
        """Give chunks of one shadow, about a batch of rows; none after a moment without any."""
        taken: list[_Waiting] = []
        with self._changed:
            if not self._waiting:
                self._changed.wait(_LOOK_SECONDS)
            num_rows = 0
            while self._waiting and (not taken or self._waiting[0].shadow is taken[0].shadow):
                num_rows += self._waiting[0].columns.num_rows
                if taken and num_rows > self._context.settings.batch_rows:
                    break
                taken.append(self._waiting.popleft())
                self._waiting_bytes -= taken[-1].columns.nbytes
        return taken

    def _score(self, shadow: Shadow, waiting: Sequence[_Waiting]) -> None:
        columns = pa.concat_tables([each.columns for each in waiting]).combine_chunks()
        start = time.perf_counter()
        with self._at_work, _own_stream(shadow.engine.device):
            scored = shadow.engine.score(columns)
        self._context.metrics.stage_seconds.labels("worker", "shadow").observe(time.perf_counter() - start)
        self._forwards.labels(*self._names, shadow.publisher.snapshot_id).inc(columns.num_rows)
        first = 0
        refused = ""
        for each in waiting:
            last = first + each.columns.num_rows
            part = _part(scored, first, last)
            problem = append_shadow(
                self._client, shadow.publisher, each.partition, each.columns, part, max_bytes=self._max_bytes
            )
            self._rows["skipped" if problem else "scored"].inc(last - first)
            refused = refused or problem
            first = last
        self._note(f"snapshot {shadow.publisher.snapshot_id} is left out: {refused}" if refused else "")

    def _note(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("%s/%s: %s", *self._names, problem)
        self.problem = problem


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Give a stream of the device for the shadow alone, so that the active snapshot's work does not queue behind it."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _part(scored: Scored, first: int, last: int) -> Scored:
    return Scored(
        logits={name: values[first:last] for name, values in scored.logits.items()},
        embeddings={name: values[first:last] for name, values in scored.embeddings.items()},
    )
