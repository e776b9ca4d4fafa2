"""Lookup: 4,096 random ids over HTTP, Arrow in and out, against one MGET of the same keys with redis-py, in turn."""

import time
from collections.abc import Sequence
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import redis

from das_service.up.supervisor import RunningService
from loadtest.end_to_end import FM
from loadtest.lines import Round, to_line
from loadtest.workload import DATASET, SPEC
from schemas import keys
from schemas.wire import ARROW_STREAM, read_table, write_table

NUM_IDS = 4096
MISSING_RATIO = 0.05
_WARM_UP_ROUNDS = 5


def measure(service: RunningService, *, num_rows: int, rounds: int) -> dict[str, Any]:
    """Give the line; rows 0..num_rows are in the store. The seed is fixed, the ids are others in every round."""
    random = np.random.default_rng(1)
    measured, found = [], 0
    connection = HTTPConnection(urlsplit(service.url).netloc, timeout=60)
    with redis.Redis.from_url(service.redis_url, protocol=2) as server, closing(connection) as http:
        num_keys = server.dbsize()
        for i in range(rounds + _WARM_UP_ROUNDS):
            numbers = random.integers(0, num_rows, NUM_IDS)
            numbers[random.random(NUM_IDS) < MISSING_RATIO] += 10 * num_rows
            ids = pa.array([f"{n:032x}" for n in numbers])
            names, body = _key_names(ids), write_table(pa.table({"example_id": ids}))
            if i % 2:
                floor_seconds, values = _mget(server, names)
                seconds, answer = _look_up(http, body)
            else:
                seconds, answer = _look_up(http, body)
                floor_seconds, values = _mget(server, names)
            present = answer[f"{FM}__status"].to_pylist().count("present")
            if present != NUM_IDS - values.count(None):
                raise RuntimeError(f"{present} of {NUM_IDS} rows are present, and {values.count(None)} have no value")
            found += present
            measured.append(Round(NUM_IDS, seconds, floor_seconds))
    share = found / (NUM_IDS * len(measured))
    return to_line(measured[_WARM_UP_ROUNDS:], ids=NUM_IDS, keys=num_keys, found_ratio=round(share, 3))


def _key_names(ids: pa.Array) -> list[bytes]:
    digest = keys.digest_array(ids)
    partitions = keys.partitions_of(digest, SPEC.partitions)
    return [keys.online_prefix(DATASET, int(p), FM) + d.as_py() for p, d in zip(partitions, digest, strict=True)]


def _mget(server: redis.Redis, names: Sequence[bytes]) -> tuple[float, list[bytes | None]]:
    start = time.perf_counter()
    values = server.mget(names)
    return time.perf_counter() - start, list(values)


def _look_up(http: HTTPConnection, body: bytes) -> tuple[float, pa.Table]:
    """Give the seconds from the request to the table.

    Raises:
        RuntimeError: It is refused.
    """
    start = time.perf_counter()
    http.request(
        "POST",
        f"/v1/datasets/{DATASET}/supervision/lookup?fms={FM}",
        body,
        {"Content-Type": ARROW_STREAM, "Accept": ARROW_STREAM},
    )
    answer = http.getresponse()
    content = answer.read()
    if answer.status != HTTPStatus.OK:
        raise RuntimeError(f"lookup answered {answer.status}: {content[:500]!r}")
    table = read_table(content)
    return time.perf_counter() - start, table
