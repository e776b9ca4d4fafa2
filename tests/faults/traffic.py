"""A traffic generator that writes down, fsynced, every row it got a 2xx for.

Rows are a function of a number, so that a judge can say what each must look like: the ledger holds ranges of numbers.
Some requests are sent again, whole or cut at other boundaries, as callers do after a time-out.
"""

import json
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from das_service.client import Client, DasClientError

SPEC: dict[str, Any] = {
    "entity_key": ["user"],
    "features": [
        {"name": "price", "type": "float"},
        {"name": "user", "type": "category", "value_type": "string"},
        {"name": "item", "type": "category", "value_type": "int64", "nullable": True},
        {"name": "tags", "type": "category_list", "value_type": "string", "max_length": 8},
        {"name": "image", "type": "vector", "size": 4},
    ],
    "tasks": [{"name": "click", "label_window_seconds": 3600}],
    "partitions": 4,
}
START = datetime(2026, 1, 1, tzinfo=UTC)
CHUNK_ROWS = 500


def rows(first: int, count: int) -> pa.Table:
    """Give rows first..first+count: 32-byte ids, spread over a few event days."""
    i = np.arange(first, first + count)
    users = [f"usér-{n % 97}" for n in i]
    return pa.table(
        {
            "example_id": pa.array([f"{n:032x}" for n in i]),
            "event_time": pa.array([START + timedelta(seconds=int(n) % 300_000) for n in i], pa.timestamp("us", "UTC")),
            "price": pa.array((i % 1000) / 8),
            "user": pa.array(users),
            "item": pa.array([None if n % 13 == 0 else int(n) % 5000 for n in i], pa.int64()),
            "tags": pa.array([[f"t{n % 7}", "ü"][: n % 3] for n in i], pa.list_(pa.string())),
            "image": pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(i % 50, 4) / 4, pa.float32()), 4),
        }
    )


@dataclass
class Ledger:
    """Ranges of row numbers that were acknowledged, on disk before the next request is sent."""

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, first: int, count: int) -> None:
        with self._lock, self.path.open("ab") as handle:
            handle.write(json.dumps({"first": first, "count": count}).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())

    def ranges(self) -> Iterator[tuple[int, int]]:
        for line in self.path.read_text().splitlines():
            record = json.loads(line)
            yield record["first"], record["count"]


class Traffic:
    """Clients that post without a pause until they are stopped."""

    def __init__(self, url: str, dataset: str, ledger: Ledger, *, seed: int, clients: int = 3) -> None:
        self._url = url
        self._dataset = dataset
        self._ledger = ledger
        self._random = random.Random(seed)
        self._next = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.in_flight = 0
        self.acked_rows = 0
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._guarded, daemon=True) for _ in range(clients)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def sent_rows(self) -> int:
        """Rows that were sent, acknowledged or not."""
        return self._next

    @contextmanager
    def held(self) -> Iterator[int]:
        """Let no request begin or count as over; give how many are in flight."""
        with self._lock:
            yield self.in_flight

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _guarded(self) -> None:
        try:
            self._post_until_stopped()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.errors.append(error)

    def _post_until_stopped(self) -> None:
        with Client(self._url, timeout_seconds=5) as client:
            while not self._stopping.is_set():
                with self._lock:
                    first, count = self._next, self._random.choice((1, 50, CHUNK_ROWS, CHUNK_ROWS))
                    self._next += count
                    again = self._random.random()
                if self._post(client, first, count) and again < 0.2:
                    shift = count // 2 if again < 0.1 else 0
                    self._post(client, max(first - shift, 0), count)

    def _post(self, client: Client, first: int, count: int) -> bool:
        table = rows(first, count)
        with self._lock:
            self.in_flight += 1
        try:
            result = client.ingest(self._dataset, table)
        except DasClientError:
            return False
        finally:
            with self._lock:
                self.in_flight -= 1
        assert (result.accepted, result.rejected) == (count, 0)
        self._ledger.write(first, count)
        with self._lock:
            self.acked_rows += count
        return True
