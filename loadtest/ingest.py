"""Ingest: POSTs of 5,000-row Arrow chunks to a running API, against XADD of the very entries that the door makes.

As many connections on both sides; the standard library's HTTP client, whose own share of the machine is the smallest.
Bodies and entries are made before the clock starts. A round is a number of requests
and then their entries, or the other way round. Every XADD is on disk before its reply, as every 2xx is.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis

from das_service.client import Client
from das_service.logs.streams import Chunk
from das_service.up.supervisor import RunningService
from loadtest.lines import Round, to_line
from loadtest.workload import CHUNK_ROWS, DATASET, DECLARATION, SPEC, bodies, entries
from schemas.wire import ARROW_STREAM

CLIENTS = 4
_T = TypeVar("_T")


def measure(service: RunningService, *, num_chunks: int, rounds: int) -> dict[str, Any]:
    """Give the line; the service has no FM yet. The first round of all only warms up."""
    with Client(service.url) as client:
        client.put_dataset(DATASET, DECLARATION)
    measured = []
    for i in range(rounds + 1):
        requests = bodies(i * num_chunks * CHUNK_ROWS, num_chunks)
        made = entries(requests)
        if i % 2:
            floor_seconds = add_all(service.redis_url, made)
            seconds = post_all(service.url, requests)
        else:
            seconds = post_all(service.url, requests)
            floor_seconds = add_all(service.redis_url, made)
        measured.append(Round(num_chunks * CHUNK_ROWS, seconds, floor_seconds))
    return to_line(measured[1:], chunk_rows=CHUNK_ROWS, connections=CLIENTS)


def post_all(url: str, requests: Sequence[bytes]) -> float:
    """Post the requests from a few threads; give the seconds it took."""
    connections = [HTTPConnection(urlsplit(url).netloc, timeout=60) for _ in range(CLIENTS)]
    try:
        for connection in connections:
            connection.connect()
        return _spread([partial(_post, connection) for connection in connections], requests)
    finally:
        for connection in connections:
            connection.close()


def _post(connection: HTTPConnection, body: bytes) -> None:
    """Post a body, again while the service asks to wait.

    Raises:
        RuntimeError: It is refused.
    """
    while True:
        connection.request("POST", f"/v1/datasets/{DATASET}/examples", body, {"Content-Type": ARROW_STREAM})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status == HTTPStatus.ACCEPTED:
            return
        if answer.status != HTTPStatus.TOO_MANY_REQUESTS:
            raise RuntimeError(f"ingest answered {answer.status}: {text[:500]!r}")
        time.sleep(float(answer.headers.get("Retry-After", "1")))


def add_all(redis_url: str, made: Sequence[Sequence[Chunk]]) -> float:
    """XADD the entries of each request in one round trip, from as many threads; give the seconds it took."""
    servers = [redis.Redis.from_url(redis_url, protocol=2) for _ in range(CLIENTS)]
    try:
        for server in servers:
            server.ping()
        return _spread([partial(_add, server) for server in servers], made)
    finally:
        servers[0].unlink(*[f"floor:{partition}" for partition in range(SPEC.partitions)])
        for server in servers:
            server.close()


def _add(server: redis.Redis, chunks: Sequence[Chunk]) -> None:
    pipeline = server.pipeline(transaction=False)
    for made in chunks:
        fields = dict(zip(made.head[::2], made.head[1::2], strict=True))
        pipeline.xadd(f"floor:{made.partition}", {**fields, "d": made.data})
    pipeline.execute()


def _spread(workers: Sequence[Callable[[_T], None]], items: Iterable[_T]) -> float:
    """Let each worker take the next item until there is none; give the seconds it took."""
    waiting, lock = iter(items), Lock()

    def work(take: Callable[[_T], None]) -> None:
        while True:
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            take(item)

    start = time.perf_counter()
    with ThreadPoolExecutor(len(workers)) as pool:
        for done in [pool.submit(work, worker) for worker in workers]:
            done.result()
    return time.perf_counter() - start
