"""How fast a backfill goes: at most so many rows a second, and never where it would hold up live traffic.

It stands still while the FM's scored log keeps much, so that the sink comes first, and while the FM's workers have
more than a little to score, so that they have the device and the processors.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from das_service.errors import UnavailableError
from das_service.logs.backlog import Reader, read_unfinished
from das_service.logs.records import EXAMPLES, rescore_log, scored_log
from das_service.logs.streams import read_counters
from schemas import keys

STANDSTILL_SECONDS = 600.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What of an FM is on its way: bytes of the scored log, and rows that its workers have yet to score."""

    scored_bytes: int
    live_rows: int


def read_backlog(client: redis.Redis, dataset: str, fm: str, *, partitions: int) -> Backlog:
    """Give what of an FM is on its way now."""
    counters = read_counters(client, dataset, range(partitions), [scored_log(fm)])
    readers = [
        Reader(partition=partition, kind=kind, group=keys.group(fm))
        for partition in range(partitions)
        for kind in (EXAMPLES, rescore_log(fm))
    ]
    return Backlog(
        scored_bytes=sum(counted.kept_bytes for counted in counters.values()),
        live_rows=sum(found.rows for found in read_unfinished(client, dataset, readers)),
    )


class Pace:
    """Holds a backfill back. read: gives the backlog now. rows_per_second: None for as many as there is room for."""

    def __init__(
        self,
        read: Callable[[], Backlog],
        *,
        most_bytes: int,
        most_live_rows: int,
        rows_per_second: float | None,
        stopping: threading.Event,
    ) -> None:
        self._read = read
        self._most_bytes = most_bytes
        self._most_live_rows = most_live_rows
        self._rows_per_second = rows_per_second
        self._stopping = stopping
        self._next_at = 0.0

    def wait(self, num_rows: int) -> bool:
        """Wait until so many more rows may be scored; give False if the run is to stop instead.

        Raises:
            UnavailableError: Nothing has moved for STANDSTILL_SECONDS.
        """
        wait_until(self._has_room, self._stopping, "live traffic or the sink is behind, and what waits does not change")
        if self._rows_per_second is not None:
            now = time.monotonic()
            self._stopping.wait(max(0.0, self._next_at - now))
            self._next_at = max(now, self._next_at) + num_rows / self._rows_per_second
        return not self._stopping.is_set()

    def _has_room(self) -> tuple[bool, object]:
        backlog = self._read()
        return backlog.scored_bytes < self._most_bytes and backlog.live_rows <= self._most_live_rows, backlog


def wait_until(look: Callable[[], tuple[bool, object]], stopping: threading.Event, trouble: str) -> bool:
    """Wait until a look says so, and give that; False if the run is to stop. look: whether, and what it saw.

    Raises:
        UnavailableError: What is seen has been the same for STANDSTILL_SECONDS.
    """
    seen: object = None
    since = time.monotonic()
    while not stopping.is_set():
        is_so, found = look()
        if is_so:
            return True
        if found != seen:
            seen, since = found, time.monotonic()
        if time.monotonic() - since > STANDSTILL_SECONDS:
            raise UnavailableError(f"{trouble}; `das status` says more. Run it again: it goes on", code="standstill")
        stopping.wait(_LOOK_SECONDS)
    return False
