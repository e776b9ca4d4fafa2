"""Which entries one commit takes: whole ones, a prefix of each partition, up to bounds on rows, bytes and event days.

The oldest entry goes first whatever its partition, so that none starves. The first entry is always taken: a chunk
that is over a bound by itself makes a commit of its own.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from das_service.ingest import CHUNK_BYTES
from das_service.logs.streams import LogCounters, follows
from das_service.settings import MIB
from schemas.entries import Entry, Position

_READ_BYTES = 16 * MIB
_MOST_ENTRIES = 64


class LogGapError(Exception):
    """The log does not follow on the table; code is log_lost or log_rewound."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}; nothing more is committed until `das recover` was run")
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a commit may hold at most."""

    num_rows: int
    num_bytes: int
    num_event_days: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What lies in a log after the table's positions; rows and bytes may be counted too high, never too low."""

    entries: int = 0
    num_rows: int = 0
    num_bytes: int = 0

    def entries_per_read(self, num_partitions: int) -> int:
        """Give how many entries of each partition to ask for at once, so that a reply is about 16 MiB.

        Entries of older epochs, which are not counted, are taken to be as large as they may.
        """
        entry_bytes = max(1, self.num_bytes // max(1, self.entries)) if self.num_bytes else CHUNK_BYTES
        return max(1, min(_MOST_ENTRIES, _READ_BYTES // (entry_bytes * num_partitions)))


@dataclass(slots=True)
class Cut:
    """The entries of the next commit, taken one by one."""

    bounds: Bounds
    days_of: Callable[[Entry], set[int]]
    at: dict[int, Position | None]
    taken: list[tuple[int, Entry]] = field(default_factory=list)
    is_full: bool = False
    _rows: int = 0
    _bytes: int = 0
    _days: set[int] = field(default_factory=set)

    def add(self, reply: Mapping[int, Sequence[Entry]]) -> None:
        """Take what fits of the entries that were read after `at`, oldest first; full once one does not fit.

        Raises:
            LogGapError: An entry is missing between two.
        """
        for partition, entry in in_order(reply):
            refuse_hole(partition, self.at[partition], entry.position)
            days = self._days | self.days_of(entry)
            fits = (
                self._rows + entry.num_rows <= self.bounds.num_rows
                and self._bytes + len(entry.data) <= self.bounds.num_bytes
                and len(days) <= self.bounds.num_event_days
            )
            if self.taken and not fits:
                self.is_full = True
                return
            self.taken.append((partition, entry))
            self.at[partition] = entry.position
            self._rows += entry.num_rows
            self._bytes += len(entry.data)
            self._days = days


def in_order(reply: Mapping[int, Sequence[Entry]]) -> Iterator[tuple[int, Entry]]:
    """Give (partition, entry), the oldest first; within a partition always in the order of the log."""
    pairs = [[(partition, entry) for entry in entries] for partition, entries in sorted(reply.items())]
    return heapq.merge(*pairs, key=lambda pair: pair[1].taken_at_us)


def refuse_hole(partition: int, last: Position | None, position: Position) -> None:
    """Raise unless an entry is the very next one after the last.

    Raises:
        LogGapError: An entry is missing between the two.
    """
    if not follows(last, position):
        where = "the beginning" if last is None else last.entry_id
        raise LogGapError("log_lost", f"partition {partition} has {position.entry_id} after {where}")


def refuse_gap(found: LogCounters | None, position: Position | None, *, epoch: int, where: str) -> LogCounters:
    """Give the counters of a log that agrees with the table's position and epoch.

    Raises:
        LogGapError: The server lacks the log, is in another epoch, or stands behind the table.
    """
    if found is None:
        raise LogGapError("log_lost", f"{where}: the server does not have it")
    if found.epoch != epoch:
        raise LogGapError("log_rewound", f"{where}: the server is in epoch {found.epoch}, the tables in {epoch}")
    if position is not None and position.epoch == epoch and found.last < position.seq:
        raise LogGapError("log_rewound", f"{where}: the server ends at {found.last}, the table has {position.seq}")
    return found
