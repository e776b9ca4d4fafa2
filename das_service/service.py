"""What the API's requests share: made once at start, handed to each as request.state.service."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread
import redis
from fastapi import Request

from das_service.batches.stream import PageBudget, page_pool
from das_service.beats import instance_name
from das_service.declarations import Declarations
from das_service.door.arrow_body import Body
from das_service.door.auth import Tokens
from das_service.door.door import Permits, read_body
from das_service.door.validation import BodyLimits
from das_service.folder import Folder
from das_service.logs.log_guard import CatalogCache, LogGuard
from das_service.metrics import Metrics
from das_service.redis_client import connect
from das_service.registry import Catalog
from das_service.settings import Settings
from das_service.supervision.buffers import BufferPool
from das_service.supervision.coverage import Coverage
from das_service.tables.duck import Duck
from das_service.watch.monitor import Monitor

_SPARE_THREADS = 8
_WAIT_THREADS = 4
_PROBE_THREADS = 2
_PAGE_THREADS = 2
_TURN_SECONDS = 0.05
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """How many threads each kind of work may hold at once, so that none keeps another from being done."""

    requests: anyio.CapacityLimiter
    waits: anyio.CapacityLimiter
    probes: anyio.CapacityLimiter
    pages: anyio.CapacityLimiter


async def _run(limiter: anyio.CapacityLimiter, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    return await anyio.to_thread.run_sync(lambda: function(*args, **kwargs), limiter=limiter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The parts of one API process.

    `door` refuses to connect to a server that lost data; `client` only reads. `turns` are for threads that make entries
    of an Arrow body of examples, for some milliseconds: more at once than half the cores wait for each other.
    """

    settings: Settings
    metrics: Metrics
    tables: Folder
    tokens: Tokens
    client: redis.Redis
    door: redis.Redis
    probe: redis.Redis
    ready: redis.Redis
    guard: LogGuard
    catalog: CatalogCache
    declarations: Declarations
    monitor: Monitor
    permits: Permits
    waits: Permits
    replays: Permits
    augments: Permits
    readers: Permits
    duck: Duck
    buffers: BufferPool
    page_budget: PageBudget
    page_pool: ThreadPoolExecutor
    coverage: Coverage
    threads: Threads
    turns: threading.Semaphore
    stopping: threading.Event

    @property
    def limits(self) -> BodyLimits:
        """What one request may hold."""
        return BodyLimits(max_rows=self.settings.max_rows, max_decoded_bytes=self.settings.max_decoded_bytes)

    async def in_thread(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Give what a blocking function gives, without blocking the event loop."""
        return await _run(self.threads.requests, function, *args, **kwargs)

    async def in_wait_thread(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Do the same for callers that wait for scores: however many there are, others find a thread."""
        return await _run(self.threads.waits, function, *args, **kwargs)

    async def in_probe_thread(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Do the same for probes, which must be answered whatever the service is busy with."""
        return await _run(self.threads.probes, function, *args, **kwargs)

    async def in_page_thread(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Do the same for readers of batches, who take turns: each waits for its next page without a thread."""
        return await _run(self.threads.pages, function, *args, **kwargs)

    async def read_body(self, request: Request) -> Body:
        """Give the whole body; raises as door.read_body does."""
        return await read_body(
            request, max_bytes=self.settings.max_body_bytes, timeout_seconds=self.settings.body_timeout_seconds
        )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold one of `turns`, or none if that takes too long: a large body must not keep the others waiting."""
        is_held = self.turns.acquire(timeout=_TURN_SECONDS)
        try:
            yield
        finally:
            if is_held:
                self.turns.release()

    def free_buffers(self) -> None:
        """Give the memory of the last window back once nobody's table is joined."""
        if self.augments.are_free:
            self.buffers.clear()

    def close(self) -> None:
        """Stop the background threads and close the connections."""
        self.monitor.stop()
        for client in (self.client, self.door, self.probe, self.ready):
            client.close()
        self.page_pool.shutdown(cancel_futures=True)
        self.duck.close()

    def current_catalog(self) -> Catalog:
        """Give the registry as it is now."""
        return self.catalog.current()


def build_service(settings: Settings, *, metrics: Metrics, tokens: Tokens, stopping: threading.Event) -> Service:
    """Give the parts of an API process; whoever asks for them closes them. stopping: set when the process shall end."""
    tables = Folder(settings.tables_uri, settings.storage_options)
    probe, client = connect(settings), connect(settings)
    guard = LogGuard(probe, tables)
    door = connect(settings, on_connect=guard.refuse_connection)
    instance = instance_name(settings, "api")
    return Service(
        settings=settings,
        metrics=metrics,
        tables=tables,
        tokens=tokens,
        client=client,
        door=door,
        probe=probe,
        ready=connect(settings, timeout_seconds=2.0),
        guard=guard,
        catalog=CatalogCache(client, guard),
        declarations=Declarations(door, tables, settings.snapshots_uri),
        monitor=Monitor(settings, probe=probe, guard=guard, metrics=metrics, instance=instance),
        permits=Permits(settings.max_concurrent_requests),
        waits=Permits(4 * settings.max_concurrent_requests),
        replays=Permits(1),
        augments=Permits(settings.max_concurrent_augments),
        readers=Permits(settings.max_concurrent_readers),
        duck=Duck(memory_bytes=settings.duckdb_memory_bytes, joins_as_written=True),
        buffers=BufferPool(),
        page_budget=PageBudget(total_bytes=settings.batches_memory_bytes),
        page_pool=page_pool(),
        coverage=Coverage(metrics),
        threads=Threads(
            requests=anyio.CapacityLimiter(settings.max_concurrent_requests + _SPARE_THREADS),
            waits=anyio.CapacityLimiter(_WAIT_THREADS),
            probes=anyio.CapacityLimiter(_PROBE_THREADS),
            pages=anyio.CapacityLimiter(_PAGE_THREADS),
        ),
        turns=threading.Semaphore(max(1, (os.cpu_count() or 1) // 2)),
        stopping=stopping,
    )


async def service_of(request: Request) -> Service:
    """Give the service that a request belongs to: a dependency of routes; async, so that it takes no thread."""
    service: Service = request.state.service
    return service
